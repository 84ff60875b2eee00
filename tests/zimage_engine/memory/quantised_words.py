"""The words of `--quantize` as parameters of tests, but for what this processor is refused."""

from __future__ import annotations

import pytest
import torch

from zimage_engine.memory.residency import QUANTISATIONS

#: Processors without int8 instructions are refused.
HAS_INT8 = torch.cpu._is_vnni_supported() or torch.cpu._is_amx_tile_supported()
needs_int8 = pytest.mark.skipif(not HAS_INT8, reason="this processor does not multiply in int8")
WORDS = [
    pytest.param(word, marks=needs_int8) if row.needs_int8 else word for word, row in QUANTISATIONS.items()
]
