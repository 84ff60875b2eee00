"""Requests that are drawn at once by one worker: they join, they leave, and they keep nobody waiting."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest

from serve_app import shared_turns
from serve_app.shared_turns import SharedTurns, ToDraw, Turn, most_together
from zimage_engine import Engine
from zimage_engine.errors import GenerationCancelled
from zimage_engine.sampling.control import DrawingControl
from zimage_engine.types import GenerationRequest, GenerationResult, StepProgress

REQUEST = GenerationRequest(
    "a red circle on a white background",
    width=128,
    height=128,
    num_inference_steps=6,
    guidance_scale=1.0,
    seed=1,
    enhance=False,
    refine=False,
)
OTHER_SIZE = replace(REQUEST, width=64)


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine.load(None, "cpu", dtype="bfloat16")


@pytest.fixture(scope="module")
def device_thread() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(1) as executor:
        yield executor


class Worker:
    """Turns, and what they told."""

    def __init__(self, engine: Engine, device_thread: ThreadPoolExecutor, most: int = 8) -> None:
        self.turn = Turn()
        self.busy: list[bool] = []
        self.passes: list[int] = []
        self.failed: list[BaseException] = []
        self.began: list[str] = []
        self.ended: list[str] = []
        self._engine = engine
        self.turns = SharedTurns(
            self.turn, device_thread, most, self.busy.append, self.passes.append, self.failed.append
        )

    async def draw(
        self,
        name: str,
        request: GenerationRequest,
        control: DrawingControl | None = None,
        *,
        alone: bool = False,
    ) -> GenerationResult:
        async def on_turn() -> None:
            self.began.append(name)

        todo = ToDraw(request, control or DrawingControl(), lambda engine: None, alone)
        try:
            return await self.turns.draw(self._engine, todo, on_turn)
        finally:
            self.ended.append(name)

    def at_step(self, step: int) -> tuple[DrawingControl, asyncio.Event]:
        """A control whose drawing sets the event as that step ends."""
        reached, loop = asyncio.Event(), asyncio.get_running_loop()

        def on_step(progress: StepProgress) -> None:
            if progress.step == step:
                loop.call_soon_threadsafe(reached.set)

        return DrawingControl(on_step=on_step), reached


def pixels(result: GenerationResult) -> bytes:
    return result.images[0].tobytes()


async def test_who_comes_while_another_is_drawn_joins_it(
    engine: Engine, device_thread: ThreadPoolExecutor
) -> None:
    worker = Worker(engine, device_thread)
    control, reached = worker.at_step(1)
    long = replace(REQUEST, num_inference_steps=40)
    first = asyncio.create_task(worker.draw("first", long, control))
    await reached.wait()
    drawn = await asyncio.gather(*(worker.draw(f"{seed}", replace(REQUEST, seed=seed)) for seed in range(3)))
    assert not first.done()
    result = await first
    assert worker.ended[-1] == "first"
    assert max(worker.passes) == 4
    assert result.report.sharing > 1
    for seed, each in enumerate(drawn):
        assert pixels(each) == pixels(engine.generate(replace(REQUEST, seed=seed)))
    assert pixels(result) == pixels(engine.generate(long))
    assert worker.busy[0] and not worker.busy[-1]
    async with worker.turn:
        pass


async def test_nobody_joins_while_another_waits_for_the_turn(
    engine: Engine, device_thread: ThreadPoolExecutor
) -> None:
    worker = Worker(engine, device_thread)
    control, reached = worker.at_step(1)
    first = asyncio.create_task(worker.draw("first", replace(REQUEST, num_inference_steps=20), control))
    await reached.wait()
    waiting = asyncio.create_task(worker.draw("other size", OTHER_SIZE))
    while not worker.turn.waiting:
        await asyncio.sleep(0)
    late = asyncio.create_task(worker.draw("late", replace(REQUEST, seed=2)))
    await asyncio.gather(first, waiting, late)
    assert worker.began == worker.ended == ["first", "other size", "late"]
    assert max(worker.passes) == 1


async def test_one_that_is_to_be_drawn_alone_is(engine: Engine, device_thread: ThreadPoolExecutor) -> None:
    worker = Worker(engine, device_thread)
    control, reached = worker.at_step(1)
    first = asyncio.create_task(worker.draw("first", REQUEST, control, alone=True))
    await reached.wait()
    second = asyncio.create_task(worker.draw("second", replace(REQUEST, seed=2)))
    await asyncio.gather(first, second, worker.draw("third", REQUEST, alone=True))
    assert worker.ended == ["first", "second", "third"]
    assert max(worker.passes) == 1


async def test_who_goes_leaves_the_others_and_frees_the_turn(
    engine: Engine, device_thread: ThreadPoolExecutor
) -> None:
    worker = Worker(engine, device_thread)
    control, reached = worker.at_step(1)
    first = asyncio.create_task(worker.draw("first", replace(REQUEST, num_inference_steps=60), control))
    await reached.wait()
    second = asyncio.create_task(worker.draw("second", REQUEST))
    while "second" not in worker.began:
        await asyncio.sleep(0)
    first.cancel()
    with pytest.raises(asyncio.CancelledError):
        await first
    assert pixels(await second) == pixels(engine.generate(REQUEST))
    assert [type(error) for error in worker.failed] == [GenerationCancelled]
    assert not worker.busy[-1]
    async with worker.turn:
        pass


async def test_what_its_beginning_raises_ends_it_alone(
    engine: Engine, device_thread: ThreadPoolExecutor
) -> None:
    worker = Worker(engine, device_thread)
    control, reached = worker.at_step(1)
    first = asyncio.create_task(worker.draw("first", replace(REQUEST, num_inference_steps=20), control))
    await reached.wait()

    async def unfit() -> None:
        raise RuntimeError("no longer fit")

    for each in (REQUEST, OTHER_SIZE):
        with pytest.raises(RuntimeError, match="no longer fit"):
            await worker.turns.draw(engine, ToDraw(each, DrawingControl(), lambda engine: None), unfit)
    await first
    assert not worker.busy[-1]
    async with worker.turn:
        pass


async def test_one_after_another_where_one_is_the_most(
    engine: Engine, device_thread: ThreadPoolExecutor
) -> None:
    worker = Worker(engine, device_thread, most=1)
    await asyncio.gather(*(worker.draw(f"{seed}", replace(REQUEST, seed=seed)) for seed in range(3)))
    assert worker.ended == ["0", "1", "2"]
    assert worker.passes == []


async def test_those_who_come_at_the_same_moment_share(
    engine: Engine, device_thread: ThreadPoolExecutor
) -> None:
    worker = Worker(engine, device_thread)
    await asyncio.gather(*(worker.draw(f"{seed}", replace(REQUEST, seed=seed)) for seed in range(8)))
    assert max(worker.passes) == 8
    assert not worker.busy[-1] and not worker.turn.waiting


async def test_sharing_goes_on_after_somebody_of_another_kind(
    engine: Engine, device_thread: ThreadPoolExecutor
) -> None:
    worker = Worker(engine, device_thread)
    control, reached = worker.at_step(1)
    first = asyncio.create_task(worker.draw("first", replace(REQUEST, num_inference_steps=20), control))
    await reached.wait()
    other = asyncio.create_task(worker.draw("other size", OTHER_SIZE))
    while not worker.turn.waiting:
        await asyncio.sleep(0)
    late = [asyncio.create_task(worker.draw(f"{seed}", replace(REQUEST, seed=seed))) for seed in range(4)]
    await asyncio.gather(first, other, *late)
    assert worker.ended[:2] == ["first", "other size"]
    assert worker.passes[-1] == 4


async def test_no_more_are_drawn_at_once_than_the_most(
    engine: Engine, device_thread: ThreadPoolExecutor
) -> None:
    worker = Worker(engine, device_thread, most=3)
    drawn = await asyncio.gather(*(worker.draw(f"{seed}", replace(REQUEST, seed=seed)) for seed in range(7)))
    assert max(worker.passes) == 3
    assert [pixels(each) for each in drawn] == [
        pixels(engine.generate(replace(REQUEST, seed=seed))) for seed in range(7)
    ]
    shares = [result.report.device_seconds or result.report.seconds for result in drawn]
    assert all(share < result.report.seconds for share, result in zip(shares, drawn, strict=True))


async def test_the_turn_goes_round_however_many_come(
    engine: Engine, device_thread: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shared_turns, "JOINING_SECONDS", 0.0)
    worker = Worker(engine, device_thread)
    control, reached = worker.at_step(1)
    first = asyncio.create_task(worker.draw("first", replace(REQUEST, num_inference_steps=20), control))
    await reached.wait()
    await asyncio.gather(worker.draw("second", REQUEST), first)
    assert worker.ended == ["first", "second"]


async def test_who_gives_up_waiting_frees_the_place(
    engine: Engine, device_thread: ThreadPoolExecutor
) -> None:
    worker = Worker(engine, device_thread)
    control, reached = worker.at_step(1)
    first = asyncio.create_task(worker.draw("first", replace(REQUEST, num_inference_steps=20), control))
    await reached.wait()
    waiting = [asyncio.create_task(worker.draw("other size", OTHER_SIZE)) for _ in range(3)]
    while worker.turn.waiting < 3:
        await asyncio.sleep(0)
    for each in waiting:
        each.cancel()
    await asyncio.gather(*waiting, return_exceptions=True)
    assert not worker.turn.waiting
    await worker.draw("late", REQUEST)
    assert not first.done()
    await first
    assert worker.began == ["first", "late"]


async def test_pictures_of_one_request_share_and_count(
    engine: Engine, device_thread: ThreadPoolExecutor
) -> None:
    worker = Worker(engine, device_thread, most=4)
    control, reached = worker.at_step(1)
    several = replace(REQUEST, n=5, num_inference_steps=20)
    first = asyncio.create_task(worker.draw("first", several, control))
    await reached.wait()
    late = asyncio.create_task(worker.draw("late", replace(REQUEST, seed=9)))
    while not worker.turn.waiting:
        await asyncio.sleep(0)
    assert worker.began == ["first"], "no place beside five"
    drawn = await first
    assert max(worker.passes) == 4
    assert worker.passes[-1] == 1
    assert [each.tobytes() for each in drawn.images] == [
        each.tobytes() for each in engine.generate(several).images
    ]
    assert pixels(await late) == pixels(engine.generate(replace(REQUEST, seed=9)))


def test_how_many_share_is_asked_for(engine: Engine) -> None:
    model = engine.description
    assert most_together(3, model) == 3
    assert most_together(3, replace(model, shares_passes=False)) == 1
