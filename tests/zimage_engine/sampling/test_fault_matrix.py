"""Whatever goes wrong, wherever and however often: the right picture or GuardExhausted, and no trace after.

Each test is one cell of the matrix; `python -m tests.benchmarks.fault_matrix` runs all that there are.
"""

from __future__ import annotations

import pytest

from tests.zimage_engine.sampling.faults import (
    FAMILIES,
    HALVES,
    OFFLOADS,
    PLACES,
    STEPS,
    TIMES,
    VALUES,
    Cell,
    Rigs,
    judge,
    suite_matrix,
)

CELLS = suite_matrix()


@pytest.fixture(scope="module")
def rigs(tmp_path_factory: pytest.TempPathFactory) -> Rigs:
    return Rigs(tmp_path_factory.mktemp("fault-matrix"))


@pytest.mark.parametrize("cell", CELLS, ids=str)
def test_a_fault_is_recovered_from_or_refused_and_leaves_no_trace(cell: Cell, rigs: Rigs) -> None:
    verdict = judge(rigs[cell], cell)

    assert not verdict.wrong
    assert verdict.outcome == ("exhausted" if cell.expected_rung is None else "recovered")


def test_every_dimension_is_in_the_matrix_of_each_family() -> None:
    for family in ("z-image", "pixart", "sdxl-lcm"):
        own = [cell for cell in CELLS if cell.family == family]
        steps = {cell.step for cell in own if cell.step is not None}
        assert steps == set(range(STEPS)), family
        assert {cell.value for cell in own} == set(VALUES), family
        assert {cell.times for cell in own} == set(TIMES), family
        assert {cell.place for cell in own} == set(PLACES), family
        assert {cell.offload for cell in own} == set(OFFLOADS), family
        if family != "sdxl-lcm":
            assert {cell.half for cell in own} == set(HALVES), family
    assert {cell.family for cell in CELLS} == set(FAMILIES)
