"""Weights that are the same every time, for models that are only built and never trained."""

from __future__ import annotations

import torch


def seeded(module: torch.nn.Module) -> torch.nn.Module:
    """Weights in bfloat16 that depend on nothing but their order; norms keep their ones."""
    generator = torch.Generator("cpu").manual_seed(0)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if parameter.ndim > 1:
                fan_in = parameter[0].numel()
                parameter.normal_(0, fan_in**-0.5, generator=generator)
            elif "norm" in name and name.endswith("weight"):
                parameter.fill_(1.0)
            else:
                parameter.normal_(0, 0.1, generator=generator)
    return module.to(torch.bfloat16)
