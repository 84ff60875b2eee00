"""The schedulers of diffusers by name, so that a folder is judged without importing it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

#: Those of diffusers 0.42; the tests compare.
SCHEDULERS = frozenset(
    {
        "AmusedScheduler",
        "BlockRefinementScheduler",
        "CMStochasticIterativeScheduler",
        "CogVideoXDDIMScheduler",
        "CogVideoXDPMScheduler",
        "CosineDPMSolverMultistepScheduler",
        "DDIMInverseScheduler",
        "DDIMParallelScheduler",
        "DDIMScheduler",
        "DDPMParallelScheduler",
        "DDPMScheduler",
        "DDPMWuerstchenScheduler",
        "DEISMultistepScheduler",
        "DPMSolverMultistepInverseScheduler",
        "DPMSolverMultistepScheduler",
        "DPMSolverSDEScheduler",
        "DPMSolverSinglestepScheduler",
        "DiscreteDDIMScheduler",
        "EDMDPMSolverMultistepScheduler",
        "EDMEulerScheduler",
        "EntropyBoundScheduler",
        "EulerAncestralDiscreteScheduler",
        "EulerDiscreteScheduler",
        "FlowMapEulerDiscreteScheduler",
        "FlowMatchEulerDiscreteScheduler",
        "FlowMatchHeunDiscreteScheduler",
        "FlowMatchLCMScheduler",
        "HeliosDMDScheduler",
        "HeliosScheduler",
        "HeunDiscreteScheduler",
        "IPNDMScheduler",
        "KDPM2AncestralDiscreteScheduler",
        "KDPM2DiscreteScheduler",
        "KarrasVeScheduler",
        "LCMScheduler",
        "LMSDiscreteScheduler",
        "LTXEulerAncestralRFScheduler",
        "MiniMaxH3Scheduler",
        "PNDMScheduler",
        "PiflowScheduler",
        "RFD4ProteinaScheduler",
        "RePaintScheduler",
        "SASolverScheduler",
        "SCMScheduler",
        "ScoreSdeVeScheduler",
        "TCDScheduler",
        "UnCLIPScheduler",
        "UniPCMultistepScheduler",
        "VQDiffusionScheduler",
    }
)


def is_known_scheduler(class_name: object) -> bool:
    """Whether diffusers has a scheduler of this name; a file may say anything there."""
    return isinstance(class_name, str) and class_name in SCHEDULERS


def listed_scheduler(model_index: Mapping[str, Any]) -> str:
    """The scheduler class that model_index.json lists, "" where it lists none that diffusers has."""
    entry = model_index.get("scheduler")
    if isinstance(entry, list) and len(entry) == 2 and is_known_scheduler(entry[1]):
        return str(entry[1])
    return ""
