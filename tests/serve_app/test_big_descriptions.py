"""A server whose worker has more to tell than fits into one message by default."""

from __future__ import annotations

import json
from pathlib import Path

import httpx
import pytest

from tests.running_server import running_server
from tests.zimage_engine.tiny_models import write_tiny_z_image

#: A published tokenizer has 11 MB; gRPC refuses messages of more than 4 where nothing else is said.
BYTES = 6_000_000


@pytest.mark.server
def test_a_model_with_a_tokenizer_of_published_size_becomes_ready_and_draws(tmp_path: Path) -> None:
    model = write_tiny_z_image(tmp_path / "model")
    file = model / "tokenizer" / "tokenizer.json"
    tokenizer = json.loads(file.read_text(encoding="utf-8"))
    words = 60
    # Words that no text has, so that no token beyond the text encoder's embeddings is ever made.
    tokenizer["model"]["vocab"] |= {
        f"{number:03}" + "#" * (BYTES // words): 10_000 + number for number in range(words)
    }
    file.write_text(json.dumps(tokenizer), encoding="utf-8")
    with running_server("--model", str(model), "--device", "cpu") as server:
        asked = {"prompt": "a red circle", "num_inference_steps": 1, "guidance_scale": 1, "size": "32x32"}
        answer = httpx.post(f"{server.base_url}/v1/images/generations", json=asked, timeout=300)
        assert answer.status_code == 200, answer.text
