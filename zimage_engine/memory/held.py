"""A keeper's face for one of several drawings under way at once: nothing is moved until all have gone."""

from __future__ import annotations

from zimage_engine.errors import OutOfMemory
from zimage_engine.memory.residency import OffloadPlan


class HeldMemory:
    """Says what a MemoryKeeper would, of a plan that stays in force whatever is asked for."""

    def __init__(self, plan: OffloadPlan, has_own_memory: bool) -> None:
        self.plan = plan
        self.has_own_memory = has_own_memory

    def before(self, width_px: int, height_px: int, guided: bool) -> OffloadPlan:
        """The plan that is in force."""
        return self.plan

    def encoded(self) -> None:
        """The text encoders stay for whoever comes next."""

    def after(self) -> None:
        """Memory is tidied up when all have gone."""

    def on_oom(self, stage: str, error: BaseException | None = None) -> str:
        """Raises OutOfMemory: room is made when it is drawn alone."""
        raise OutOfMemory("the device's memory does not suffice for this picture beside others")
