"""Blocks that repeat are recognised, and planned together."""

import pytest
from test_region import joint
from torch import Tensor, fx

from memcompile import Proposal, Step
from memcompile.alike import families
from memcompile.analysis.cost import FIXED
from memcompile.draft import Draft
from memcompile.plan import Plan
from memcompile.planner import Ladder, Planner


def layers(count: int, widths: tuple[int, ...] = (32,)) -> Step:
    """So many residual blocks, their hidden widths in turn."""
    shapes = [s for n in range(count) for w in [widths[n % len(widths)]] for s in [(8, w), (w, 8)]]

    def stack(x: Tensor, *weights: Tensor) -> Tensor:
        for up, down in zip(weights[::2], weights[1::2], strict=True):
            x = x + (x @ up).tanh().sin() @ down
        return x

    return joint(stack, (64, 8), *shapes)


def alike(step: Step) -> dict[fx.Node, tuple[fx.Node, ...]]:
    return families(step, Draft(step, FIXED).info, step.early_values())


def of(step: Step, name: str) -> list[fx.Node]:
    return [n for n in step.nodes if n in step.sides.early and f"{name}." in str(n.target)]


def test_the_same_value_of_inner_blocks_is_one_family() -> None:
    """The first and the last block have other neighbours than those between."""
    step = layers(8)
    found = alike(step)
    sines = of(step, "sin")
    assert max(len(found[sine]) for sine in sines) >= 3
    for sine in sines:
        assert sine in found[sine] and set(found[sine]) <= set(sines)


def test_blocks_of_other_widths_are_not_alike() -> None:
    step = layers(8, (32, 16))
    for same in alike(step).values():
        assert len({step.bytes(value) for value in same}) == 1


def test_what_stands_elsewhere_in_a_block_is_not_alike() -> None:
    step = layers(6)
    found = alike(step)
    assert not {*of(step, "tanh")} & {v for sine in of(step, "sin") for v in found[sine]}


@pytest.mark.parametrize("drafts", [60, 100])
def test_planning_repeated_blocks_together_loses_no_plan(drafts: int) -> None:
    """With as many drafts, no higher floor, and no budget's plan slower by a thousandth."""
    step = layers(12)

    def ladder(together: bool) -> Ladder:
        draft = Draft(step, FIXED)
        kept = frozenset(n for n in draft.needed_late if n.op == "call_function")
        planner = Planner(draft, Plan(kept), [Proposal(v) for v in step.early_values()])
        planner.limit = drafts
        if not together:
            planner.alike = {value: (value,) for value in planner.alike}
        return planner.build()

    one, other = ladder(True), ladder(False)
    assert one.floor.peak <= other.floor.peak
    for rung in other.rungs:
        beside = one.fit(rung.peak)
        assert beside is not None and beside.seconds <= 1.001 * rung.seconds
