"""The closed loop: which rungs are lowered, and which of what was lowered is taken."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from memcompile.ladder import Ladder, Rung
from memcompile.search import Search, Tried

INPUTS = 1000


def search(
    rungs: list[tuple[int, float]], lowered: dict[int, int], loops: bool = False
) -> tuple[Search, list[int]]:
    """Over rungs of such peaks and seconds that are lowered to other peaks; which are lowered."""
    loop = SimpleNamespace(target=torch.ops.higher_order.while_loop)
    step: Any = SimpleNamespace(input_bytes=lambda: INPUTS, nodes=[loop] if loops else [])
    ladder, seen = Ladder(), []
    for peak, seconds in rungs:
        planner = SimpleNamespace(draft=SimpleNamespace(step=step))
        plan: Any = SimpleNamespace()
        assert ladder.offer(Rung(peak, seconds, plan, planner))

    def tried(peak: int, seconds: float) -> Tried:
        drafted: Any = SimpleNamespace(peak=peak, seconds=seconds)
        cut: Any = None
        real = lowered.get(peak, peak)
        return Tried(step, drafted, cut, real, real)

    found = Search(step, ladder, lambda *_: (0, 0), tried(9000, 1.0), 0)

    def lower(rung: Rung, budget: int | None) -> Tried:
        seen.append(rung.peak)
        return tried(rung.peak, rung.seconds)

    found._lowered = lower  # type: ignore[method-assign]
    return found, seen


def test_the_lowest_is_the_least_that_was_lowered() -> None:
    found, seen = search([(2000, 2.0), (2100, 1.5), (4000, 1.2)], {2000: 2200})
    assert found.lowest().peak == 2100
    assert seen == [2000, 2100]


@pytest.mark.parametrize(
    ("seconds", "loops", "tries"),
    [(1.999, True, [2000]), (1.9, True, [2000, 2100]), (1.999, False, [2000, 2100])],
)
def test_a_rung_above_a_floor_with_loops_is_lowered_only_where_it_is_sooner(
    seconds: float, loops: bool, tries: list[int]
) -> None:
    """Lowering loops takes as long as planning all: a thousandth of a step is not worth it."""
    found, seen = search([(2000, 2.0), (2100, seconds)], {2000: 2200}, loops)
    found.lowest()
    assert seen == tries


def test_what_is_left_to_inductor_is_taken_where_nothing_is_lower() -> None:
    found, _ = search([(2000, 2.0)], {2000: 9500})
    assert found.lowest().peak == 9000


def test_the_cheapest_rung_that_is_lowered_within_a_budget_is_taken() -> None:
    rungs = [(2000, 2.0), (3000, 1.5), (4000, 1.2)]
    found, _ = search(rungs, {})
    fits = found.fitting(3100)
    assert fits is not None
    assert fits.peak == 3000
    found, seen = search(rungs, {3000: 3500})
    fits = found.fitting(3100)
    assert fits is not None
    assert fits.peak == 2000
    assert seen == [3000, 2000]


def test_no_rung_fits_only_where_the_floor_was_lowered_and_did_not() -> None:
    found, seen = search([(2000, 2.0), (3000, 1.5)], {3000: 4000, 2000: 3200})
    assert found.fitting(3100) is None
    assert 2000 in seen
