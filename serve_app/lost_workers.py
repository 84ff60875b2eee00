"""What a request has met of lost workers, and which requests are to meet no more of them.

Knows no Ray: the service says what happened, and asks what follows.
"""

from __future__ import annotations

import secrets
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, replace
from hashlib import blake2b

from zimage_engine.sampling.plan import SamplingPlan
from zimage_engine.types import GenerationRequest

#: Workers that may die of one request: the first may have been ended by anything.
DEATHS = 2
#: Workers whose device may fail under one request before it is given up.
DEVICE_FAILURES = 3
#: Workers that may be lost before they had begun with a request; each costs it time alone.
HANDOVERS = 20
#: A request that ended workers is refused for so long, and so many of them are known at once.
REFUSED_SECONDS = 3600.0
MOST_REFUSED = 1000


@dataclass
class Losses:
    """The workers that one request has lost so far, by what it had to do with it."""

    deaths: int = 0
    device_failures: int = 0
    handovers: int = 0

    @property
    def any(self) -> bool:
        """Whether a worker was lost at all: from then on it is asked of each whether it had begun."""
        return bool(self.deaths or self.device_failures or self.handovers)

    @property
    def are_its_own_doing(self) -> bool:
        """Whether it is taken to be what ends the workers."""
        return self.deaths >= DEATHS

    @property
    def are_too_many(self) -> bool:
        """Whether it is given up, though nothing says that it is to blame."""
        return self.device_failures >= DEVICE_FAILURES or self.handovers >= HANDOVERS


@dataclass(frozen=True)
class NamedRequest:
    """A request as a person finds it again: by its id in the log and by its figures, never by its words."""

    id: str
    width: int
    height: int
    steps: int
    pictures: int

    def __str__(self) -> str:
        named = f"request {self.id}: " if self.id else ""
        return f"{named}{self.width}x{self.height}, {self.steps} steps, n {self.pictures}"


def named_request(request_id: str, plan: SamplingPlan) -> NamedRequest:
    """What a refusal and the log call the request that `plan` was made of."""
    return NamedRequest(request_id, plan.width_px, plan.height_px, plan.steps, len(plan.seeds))


class RefusedRequests:
    """The requests that ended workers, known by fingerprints, in this process and for a time.

    A fingerprint is a hash of all that is drawn from but the seed, with a key that ends with the process: it
    tells nobody what was asked. Each ingress has its own, so behind several the same request may end two
    workers of each. The seed is left out because a request without one gets another each time; so a request
    that ends workers with one seed alone is refused with every seed.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._key = secrets.token_bytes(32)
        self._known: OrderedDict[bytes, tuple[float, NamedRequest]] = OrderedDict()

    def add(self, request: GenerationRequest, plan: SamplingPlan, named: NamedRequest) -> None:
        """Remember it; the oldest is forgotten where there are too many."""
        fingerprint = self._fingerprint(request, plan)
        self._known.pop(fingerprint, None)
        self._known[fingerprint] = (self._clock() + REFUSED_SECONDS, named)
        while len(self._known) > MOST_REFUSED:
            self._known.popitem(last=False)

    def find(self, request: GenerationRequest, plan: SamplingPlan) -> NamedRequest | None:
        """The request that ended workers and was the same; None where there was none lately."""
        if not self._known:
            return None
        until, named = self._known.get(self._fingerprint(request, plan), (float("-inf"), None))
        return named if self._clock() < until else None

    def _fingerprint(self, request: GenerationRequest, plan: SamplingPlan) -> bytes:
        drawn_from = (
            plan.prompt,
            plan.negative_prompt,
            plan.width_px,
            plan.height_px,
            plan.steps,
            plan.guidance_scale,
            plan.guidance_until,
            plan.refine,
            request.exact,
            len(plan.seeds),
            request.enhance,
            request.enhancer,
            request.model,
            request.loras,
        )
        digest = blake2b(repr(drawn_from).encode("utf-8", "backslashreplace"), key=self._key)
        source = request.image
        if source is not None:
            digest.update(repr(replace(source, rgb=b"", mask=None)).encode())
            digest.update(repr(request.strength).encode())
            digest.update(source.rgb)
            digest.update(source.mask or b"")
        return digest.digest()
