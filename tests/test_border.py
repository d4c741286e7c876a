"""A region's border goes where least crosses it, and the loops still compute the step."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from test_region import joint, named
from torch import Tensor

from memcompile import Step, region
from memcompile.analysis.cost import FIXED
from memcompile.border import Border, widened
from memcompile.loop import Looped
from memcompile.region import Region


def attend_to_itself(x: Tensor, w: Tensor, out: Tensor) -> Tensor:
    """Attention whose projections and product are as wide as its input."""
    q, k, v = (x @ w).chunk(3, -1)
    return x + (q @ k.T).softmax(-1) @ v @ out


def attend_with_bias(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    """Rows of pairs attend; the bias is made of all pairs, so what it is made of is read twice."""
    y = x.tanh() * x.sigmoid()
    q, k, v = (y @ w).chunk(3, -1)
    bias = (y @ b).squeeze(-1)
    return x + (torch.einsum("iqc,ikc->iqk", q, k) + bias).softmax(-1) @ v


def transition(x: Tensor, up: Tensor, down: Tensor) -> Tensor:
    return x + (x.sin() @ up).tanh() @ down


SUBJECTS: dict[str, tuple[Callable[..., Tensor], tuple[tuple[int, ...], ...], str]] = {
    "attention": (attend_to_itself, ((24, 4), (4, 12), (4, 4)), "div"),
    "attention, prime": (attend_to_itself, ((37, 4), (4, 12), (4, 4)), "div"),
    "pairs": (attend_with_bias, ((16, 16, 2), (2, 6), (2, 1)), "div"),
    "transition": (transition, ((24, 3), (3, 24), (24, 3)), "tanh"),
}


def found(name: str) -> tuple[Step, Region, Region]:
    """The step, the region as grown, and the one with the moved border."""
    forward, shapes, seed = SUBJECTS[name]
    step = joint(forward, *shapes)
    grown = region.find(step, named(step, seed), 0)
    assert grown is not None
    wide = widened(step, grown)
    assert wide is not None
    return step, grown, wide


@pytest.mark.parametrize("name", SUBJECTS)
def test_less_crosses_the_moved_border(name: str) -> None:
    step, grown, wide = found(name)
    crossing = Border(step, grown).crossing
    assert crossing(wide) < crossing(grown)
    assert set(grown.places) < set(wide.places)


def test_a_loop_reads_what_its_projections_are_made_of() -> None:
    step, _, wide = found("pairs")
    assert wide.late is not None
    sizes = [step.bytes(step.roots[n]) for n in wide.early.inputs]
    assert max(sizes) == step.bytes(step.primals[0]), "the pairs, no projection of them"
    weights = [step.gradients[1], step.gradients[0]]
    assert weights[0] is not None
    assert step.roots[weights[0]] in wide.late.outputs, "a weight's gradient is added up inside"


def test_what_others_read_too_runs_outside_as_well() -> None:
    _, _, wide = found("pairs")
    assert wide.again
    inside = set(wide.places) - wide.again
    for node in wide.again:
        assert any(user not in inside for user in node.users)
        for part in (wide.early, wide.late):
            assert part is None or node not in part.outputs


@pytest.mark.parametrize("chunks", [3, 5])
@pytest.mark.parametrize("name", SUBJECTS)
def test_loops_with_a_moved_border_compute_the_step(name: str, chunks: int) -> None:
    torch.set_default_dtype(torch.float64)
    try:
        step, _, wide = found(name)
        primals, tangents = (
            [torch.randn(n.meta["val"].shape) for n in nodes]
            for nodes in (step.primals, step.tangents)
        )
        wanted = step.module(primals, tangents)
        got = Looped(step, wide, chunks, FIXED).write()(*primals, *tangents)
    finally:
        torch.set_default_dtype(torch.float32)
    assert len(got) == len(wanted)
    for one, other in zip(got, wanted, strict=True):
        assert other.abs().max() > 0
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


def test_what_the_user_has_bound_to_be_saved_is_not_made_again() -> None:
    forward, shapes, seed = SUBJECTS["transition"]
    step = joint(forward, *shapes)
    for node in step.nodes:
        if node.op == "call_function":
            node.meta["recompute"] = torch.utils.checkpoint.CheckpointPolicy.MUST_SAVE
    grown = region.find(step, named(step, seed), 0)
    assert grown is not None
    wide = widened(step, grown)
    assert wide is None or not wide.again
