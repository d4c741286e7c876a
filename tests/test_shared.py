"""Loops that do the same share their functions; values keep their names when loops are written."""

from __future__ import annotations

import operator
from unittest import mock

import pytest
import torch
from chunk_subjects import Triangle
from helpers import FUSED_CLOSE, assert_same, expected, planned
from memcompile_passes.chunk import Chunk
from torch import Tensor, fx, nn
from torch.fx.experimental.proxy_tensor import make_fx

from memcompile import Step, region, split
from memcompile.analysis.cost import FIXED
from memcompile.loop import Looped
from memcompile.shared import fingerprint, share_functions
from memcompile.step import is_loop

PASSES = ["default", Chunk()]


def pairs(x: Tensor, y: Tensor) -> list[Tensor]:
    """Of two tensors, what a loop over all pairs of their rows gives of each."""
    return [(each[:, None] - each).exp().sum(1) for each in (x, y)]


def looped(*inputs: Tensor, chunks: tuple[int, int] = (3, 3)) -> fx.GraphModule:
    """The graph of :func:`pairs`, both of its values in loops of so many trips."""
    module = make_fx(lambda *given: pairs(*given), tracing_mode="fake")(*inputs)
    for name, count in zip(("exp", "exp_1"), chunks, strict=True):
        step = Step(module, 2)
        seed = next(n for n in step.nodes if n.name == name)
        found = region.find(step, seed, 0)
        assert found is not None
        module = Looped(step, found, count, FIXED).write()
    return module


def functions(module: fx.GraphModule) -> list[tuple[str, str]]:
    """What each loop calls: whether to go on, and what to do."""
    loops = [node for node in module.graph.nodes if is_loop(node)]
    return [(str(loop.args[0].target), str(loop.args[1].target)) for loop in loops]


def shared(module: fx.GraphModule) -> list[tuple[str, str]]:
    share_functions(module)
    module.graph.lint()
    return functions(module)


def test_loops_that_do_the_same_share_both_functions() -> None:
    x, y = torch.rand(12, 5, dtype=torch.float64), torch.rand(12, 5, dtype=torch.float64)
    module = looped(x, y)
    one, other = functions(module)
    assert one != other
    assert shared(module) == [one, one]
    assert not hasattr(module, other[0])
    assert not hasattr(module, other[1])
    for got, wanted in zip(module(x, y), pairs(x, y), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)


def test_a_last_chunk_that_is_shorter_has_a_function_of_its_own() -> None:
    x, y = torch.rand(13, 5, dtype=torch.float64), torch.rand(13, 5, dtype=torch.float64)
    module = looped(x, y)
    assert len(functions(module)) == 4
    assert len({body for _, body in shared(module)}) == 2
    for got, wanted in zip(module(x, y), pairs(x, y), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("x", "y", "chunks"),
    [
        (torch.rand(12, 5), torch.rand(12, 5), (3, 4)),
        (torch.rand(12, 5), torch.rand(12, 6), (3, 3)),
        (torch.rand(12, 5), torch.rand(12, 5).double(), (3, 3)),
        (torch.rand(12, 5), torch.rand(5, 12).t(), (3, 3)),
        (torch.rand(12, 5), torch.rand(13, 5)[1:], (3, 3)),
    ],
    ids=["other chunks", "another shape", "another dtype", "other strides", "another start"],
)
def test_loops_that_differ_share_no_body(x: Tensor, y: Tensor, chunks: tuple[int, int]) -> None:
    (_, one), (_, other) = shared(looped(x, y, chunks=chunks))
    assert one != other


def test_a_function_that_holds_a_tensor_is_not_shared() -> None:
    module = looped(torch.rand(12, 5), torch.rand(12, 5))
    for _, name in functions(module):
        body = getattr(module, name)
        body.register_buffer("held", torch.rand(()))
        with body.graph.inserting_before(next(iter(body.graph.nodes))):
            body.graph.get_attr("held")
    (_, one), (_, other) = shared(module)
    assert one != other


def test_what_no_loop_holds_keeps_its_name() -> None:
    """Plans are carried over by name, and ``getitem`` is a name of the user's nodes, too."""

    def step(x: Tensor) -> list[Tensor]:
        loud = (x[:, None] - x).exp().sum(1)
        return [loud, *x[:2, :2].sort(), *x[:3, :3].sort()]

    x = torch.rand(12, 5)
    module = make_fx(step, tracing_mode="fake")(x)
    whole = Step(module, 5)
    seed = next(n for n in whole.nodes if n.name == "exp")
    found = region.find(whole, seed, 0)
    assert found is not None
    written = Looped(whole, found, 3, FIXED).write()
    items = {n.name: n for n in written.graph.nodes if n.target is operator.getitem}
    for node in whole.nodes:
        if node.target is operator.getitem:
            assert items[node.name].args[0].target is torch.ops.aten.sort.default
            assert items[node.name].meta["val"] is node.meta["val"]


class Blocks(nn.Module):
    """The same layer, with other parameters, again and again."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Triangle(8) for _ in range(number)).double()

    def forward(self, z: Tensor) -> Tensor:
        for layer in self.layers:
            z = layer(z)
        return z


@pytest.mark.slow
def test_blocks_that_are_alike_are_lowered_to_as_many_functions_as_one() -> None:
    torch.manual_seed(5)
    model, z = Blocks(3), torch.randn(24, 24, 8, dtype=torch.float64, requires_grad=True)
    wanted = expected(model, [z])
    got, (report,) = planned(model, [z], "min", "inductor", passes=PASSES, strict=True)
    assert_same(got, wanted, **FUSED_CLOSE)
    assert len(report.loops) >= 3
    alike = {(row.source, row.dim, row.nodes) for row in report.loops}
    assert len(alike) < len(report.loops)
    assert len({(row.source, row.dim, row.nodes, row.chunks) for row in report.loops}) == len(alike)


@pytest.mark.slow
def test_a_shared_function_is_counted_wherever_it_runs() -> None:
    """Of two loops the second runs while more is alive; the peak is the same, shared or not."""
    model, z = Blocks(2), torch.randn(24, 24, 8, dtype=torch.float64, requires_grad=True)
    _, (report,) = planned(model, [z], "min", "inductor", passes=PASSES, strict=True)
    with mock.patch.object(split, "share_functions", lambda module: None):
        _, (apart,) = planned(model, [z], "min", "inductor", passes=PASSES, strict=True)
    assert report.loops
    assert (report.lowered, len(report.loops)) == (apart.lowered, len(apart.loops))


def test_a_fingerprint_tells_what_is_computed_not_what_it_is_called() -> None:
    one = make_fx(lambda x: x.sin() + 1)(torch.rand(3))
    other = make_fx(lambda y: y.sin() + 1)(torch.rand(3))
    another = make_fx(lambda y: y.sin() + 2)(torch.rand(3))
    assert fingerprint(one.graph)[1:] == fingerprint(other.graph)[1:]
    assert fingerprint(one.graph) != fingerprint(another.graph)
