"""Which loops are looked for, and from which plan."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from chunk_subjects import Transition, Triangle, TriangleProduct
from helpers import planned
from memcompile_passes.chunk import Chunk
from torch import nn

from memcompile import looping, rounds
from memcompile.analysis.cost import FIXED, Rates, use_rates
from memcompile.looping import DEEPEST, leanest
from memcompile.plan import Drafted, Plan
from memcompile.planner import Planner

#: Devices of which each is good at something else.
DEVICES = {
    "as in all tests": FIXED,
    "slow products": dataclasses.replace(FIXED, matmul=dict.fromkeys(FIXED.matmul, 1e9)),
    "quick exponentials": dataclasses.replace(FIXED, slow=1e10),
    "slow memory": dataclasses.replace(FIXED, memory=1e9),
}


def looked_from(rates: Rates) -> tuple[list[str], int, int]:
    """The values kept by the plan that the floor's loops of one step are looked for from, their
    bytes, and the bytes that the plan of least peak keeps."""
    seen: list[tuple[list[str], int, int]] = []

    def kept(planner: Planner, drafted: Drafted) -> int:
        return sum(planner.draft.info[value].bytes for value in drafted.saved)

    def spied(planner: Planner, plan: Plan) -> Drafted:
        found = leanest(planner, plan)
        names = sorted(value.name for value in found.saved)
        seen.append((names, kept(planner, found), kept(planner, planner.drafted(plan))))
        return found

    model = nn.Sequential(TriangleProduct(True), Transition(torch.relu), Triangle())
    with use_rates(rates), mock.patch.object(looping, "leanest", spied):
        planned(model, [torch.randn(20, 20, 4)], "min", passes=["default", Chunk()], strict=True)
    return seen[0]


def test_the_floors_loops_are_looked_for_from_one_plan_on_every_device() -> None:
    """From what layers hand on, not from the plan of least peak: what that keeps, beside a moment
    that is higher than all others, hangs on what is slow to make again."""
    found = [looked_from(rates) for rates in DEVICES.values()]
    assert {tuple(names) for names, _, _ in found} == {tuple(found[0][0])}
    assert found[0][0]
    assert len({floors for _, _, floors in found}) > 1
    assert all(kept < floors for _, kept, floors in found)


# ---------------------------------------------------------------- which of the loops is taken


def state(*live: int, seconds: float = 1.0) -> Any:
    """A step with some loops, by the bytes alive at each moment."""
    return SimpleNamespace(
        drafted=SimpleNamespace(
            forward=SimpleNamespace(live=live), backward=SimpleNamespace(live=()), seconds=seconds
        ),
        planner=SimpleNamespace(draft=SimpleNamespace(before=0)),
        peak=max(live),
    )


@pytest.mark.parametrize(
    ("live", "taken"),
    [
        ((60, 100, 60), True),  # less in all, the peak as it was
        ((95, 95, 95), True),  # a lower peak for a little more in all
        ((95, 95, 95, 95, 95), False),  # a lower peak for much more in all
        ((99, 100, 99), False),
    ],
)
def test_a_loop_lowers_the_peak_or_what_there_is_in_all(live: tuple[int, ...], taken: bool) -> None:
    now, new = state(90, 100, 90), state(*live)
    chosen = rounds._chosen(now, DEEPEST, [new], now)
    assert chosen is (new if taken else None)


def test_of_loops_that_leave_as_little_the_quickest_is_taken() -> None:
    now, slow, quick = state(90, 100), state(50, 50), state(50, 50, seconds=0.5)
    assert rounds._chosen(now, DEEPEST, [slow, quick, state(50, 51)], now) is quick
