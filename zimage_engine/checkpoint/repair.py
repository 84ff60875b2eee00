"""What a repair is called and why it is made; knows nothing of how."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Repair:
    """A kind of damage that we mend. `because` says, as a clause, why mending it this way is right."""

    name: str
    because: str


@dataclass(frozen=True, slots=True)
class AppliedRepair:
    """One repair of one checkpoint. `place` is a component or file, `detail` a clause with what was found."""

    repair: Repair
    place: str
    detail: str
