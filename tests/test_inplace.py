"""Loops write in the place of what only they still read; nobody sees a value change."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from chunk_subjects import TriangleProduct, Trunk, double
from helpers import memopt, new_reports, short_planning, tensor
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

import memcompile
from memcompile import Step, measure_peak, region
from memcompile.analysis.cost import FIXED
from memcompile.analysis.timeline import Kind, Op, simulate
from memcompile.border import widened
from memcompile.inplace import write_over
from memcompile.loop import Looped
from memcompile.step import is_loop

#: How a finished graph's text names the body of a loop that writes over what it reads.
OVER = "_over_"


class Stream(nn.Module):
    """Layers along a residual stream, and what ``use`` makes of the stream before and after."""

    def __init__(self, use: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.layers = nn.Sequential(TriangleProduct(True), TriangleProduct(False))
        self.use = use

    def forward(self, z: Tensor) -> Any:
        before = z.tanh()
        return self.use(before, self.layers(before))


def planned(model: nn.Module, x: Tensor, lower: str = "eager") -> tuple[Any, memcompile.Report]:
    """An inference step at its floor: what it gives, and its report; ``x`` stays as it is."""
    torch._dynamo.reset()
    since, given = len(memcompile.reports()), x.clone()
    call = memopt(model, "min", lower, passes="default,chunk", strict=True)
    with torch.no_grad(), short_planning(400):
        found = call(x)
    assert torch.equal(x, given), "the caller's input is never written over"
    (report,) = new_reports(since)
    return found, report


def frozen(make: Callable[..., nn.Module], *args: Any) -> nn.Module:
    return double(make, *args).eval().requires_grad_(False)


@pytest.mark.parametrize("length", [12, 13])
def test_a_stream_is_held_once_while_its_layers_run_over_it(length: int) -> None:
    """Beside it stands one factor: rows of outgoing edges, columns of incoming ones."""
    model, x = frozen(Trunk), tensor(length, length, 4, grad=False)
    found, report = planned(model, x)
    torch.testing.assert_close(found, model(x), rtol=1e-12, atol=1e-12)
    assert report.forward.count(OVER) >= 3, "every layer, with a shorter last chunk or without"
    pair = x.numel() * x.element_size()
    assert report.predicted - report.before < 2.9 * pair


USES = {
    "returned": lambda before, after: (before, after),
    "read later": lambda before, after: after * before.mean() + before.amax(),
}


@pytest.mark.parametrize("name", USES)
def test_what_others_read_later_is_theirs_as_it_was(name: str) -> None:
    model, x = frozen(Stream, USES[name]), tensor(12, 12, 4, grad=False)
    found, _ = planned(model, x)
    torch.testing.assert_close(found, model(x), rtol=1e-12, atol=1e-12)


def transition(stream: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """A residual layer that is wide inside."""
    return stream + (stream.sin() @ up).tanh() @ down


#: What a step makes of its stream, and whether a loop over its layer may write over it.
STEPS: dict[str, tuple[Callable[..., list[Tensor]], bool]] = {
    "read by the layer alone": (lambda x, *w: [transition(x.exp(), *w)], True),
    "read before it": (lambda x, *w: [transition((s := x.exp()), *w[:-1], w[-1] * s.mean())], True),
    "returned": (lambda x, *w: [transition(s := x.exp(), *w), s], False),
    "a view returned": (lambda x, *w: [transition(s := x.exp(), *w), s.T], False),
    "read by what does not wait": (lambda x, *w: [transition(s := x.exp(), *w), s.sum()], False),
    "the caller's": (lambda x, *w: [transition(x, *w)], False),
}


@pytest.mark.parametrize("chunks", [3, 5])
@pytest.mark.parametrize("name", STEPS)
def test_a_loop_writes_over_what_nothing_can_read_after_it(name: str, chunks: int) -> None:
    forward, able = STEPS[name]
    inputs = [torch.randn(shape, dtype=torch.float64) for shape in ((24, 3), (3, 24), (24, 3))]
    module = make_fx(lambda *given: forward(*given), tracing_mode="fake")(*inputs)
    step = Step(module, len(forward(*inputs)))
    found = region.find(step, next(n for n in step.nodes if n.name == "tanh"), 0)
    assert found is not None
    wide = widened(step, found, [n for n in step.nodes if n.name == "exp"])
    assert wide is not None
    looped = Looped(step, wide, chunks, FIXED).write()
    before = [node for node in looped.graph.nodes if is_loop(node)]
    given = [len(loop.args[3]) for loop in before]
    write_over(looped)
    loops = [node for node in looped.graph.nodes if is_loop(node)]
    assert len(loops) == (1 if chunks == 3 else 2)
    assert [len(loop.args[3]) for loop in loops] == [n - able for n in given]
    assert (loops[0].args[2][1].name == "exp") == able
    kept = [value.clone() for value in inputs]
    torch.testing.assert_close(looped(*inputs), forward(*kept), rtol=1e-12, atol=1e-12)
    assert all(map(torch.equal, inputs, kept))


def test_the_second_call_is_the_first_again() -> None:
    model, x = frozen(Trunk), tensor(12, 12, 4, grad=False)
    torch._dynamo.reset()
    call = memopt(model, "min", "eager", passes="default,chunk", strict=True)
    with torch.no_grad(), short_planning(400):
        first = call(x)
        kept = first.clone()
        assert torch.equal(call(x), kept)
    assert torch.equal(first, kept), "what was returned stays as it is"


@pytest.mark.long
@pytest.mark.parametrize("length", [32, 37])
def test_inductor_writes_over_it_too_and_peaks_where_drafted(length: int) -> None:
    model = Trunk(16).eval().requires_grad_(False)
    x = torch.randn(length, length, 16)
    found, report = planned(model, x, "inductor")
    torch.testing.assert_close(found, model(x), rtol=1e-4, atol=1e-5)
    assert OVER in report.forward
    assert report.lowered <= 1.03 * report.predicted
    call = memopt(model, "min", "inductor", passes="default,chunk", strict=True)
    with torch.no_grad(), short_planning(400):
        peak = measure_peak(call, x)
    assert peak.bytes <= 1.03 * (report.lowered - report.before)


# ---------------------------------------------------------------- in drafts


def loop_over(*later: int) -> list[int]:
    """Bytes alive in a step of a value, a loop that may write over it, and what it gives.

    Args:
        later: places that one more op, the last, reads.
    """
    ops = [
        Op("x", Kind.SOURCE, (), 0),
        Op("value", Kind.EXTERN, (0,), 100),
        Op("loop", Kind.EXTERN, (1,), 0, work=110, over=(1,), group="loop"),
        Op("given", Kind.PART, (2, 1), 100, over=(1,), group="loop"),
        Op("last", Kind.EXTERN, (3, *later), 1, keep=True),
    ]
    return simulate(ops).live


def test_a_draft_counts_what_dies_in_a_loop_and_what_it_gives_once() -> None:
    assert loop_over() == [0, 100, 110, 100, 101]


def test_a_draft_counts_both_where_the_value_is_read_later() -> None:
    assert loop_over(1) == [0, 100, 210, 200, 201]
