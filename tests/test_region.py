"""Which part of a step a loop can hold, and that its trips cover it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, strategies as st
from torch.fx.experimental.proxy_tensor import make_fx

from memcompile import Step, region
from memcompile._torch import select_decomp_table
from memcompile.analysis.cost import FIXED
from memcompile.analysis.rules import Merged
from memcompile.body import trips
from memcompile.loop import Looped


def joint(forward: Callable[..., torch.Tensor], *shapes: tuple[int, ...]) -> Step:
    """The joint graph of a function of parameters, softmax and the like taken apart."""

    def both_sides(primals: list[torch.Tensor], tangents: list[torch.Tensor]) -> list[Any]:
        out = forward(*primals)
        return [out, *torch.autograd.grad([out], primals, tangents)]

    primals = [torch.randn(shape, requires_grad=True) for shape in shapes]
    trace = make_fx(both_sides, select_decomp_table(), tracing_mode="fake")
    module = trace(primals, [forward(*primals).detach()])
    module.graph.eliminate_dead_code()
    for node in module.graph.find_nodes(op="placeholder"):
        node.target = str(node.target)
    return Step(module, 1)


def named(step: Step, name: str) -> torch.fx.Node:
    return next(node for node in step.nodes if node.name == name)


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return (q @ k.T).softmax(-1) @ v


ATTEND = ((12, 3), (10, 3), (10, 3))


def test_a_region_holds_both_sides_and_gives_nothing_large_away() -> None:
    step = joint(attend, *ATTEND)
    found = region.find(step, named(step, "div"), 0)
    assert found is not None and found.late is not None and found.length == 12
    assert step.sides.early.issuperset(found.early.nodes)
    assert found.seed in found.late.nodes, "what the backward needs of the forward runs again"
    large = step.bytes(found.seed)
    for part in (found.early, found.late):
        assert all(step.bytes(node) < large for node in (*part.inputs, *part.outputs))


@pytest.mark.parametrize("name", ["div", "exp", "sub"])
def test_what_softmax_normalises_over_cannot_be_sliced(name: str) -> None:
    step = joint(attend, *ATTEND)
    assert region.find(step, named(step, name), 1) is None
    assert region.find(step, named(step, name), 0) is not None


def test_what_is_summed_and_then_used_needs_the_whole() -> None:
    def forward(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        y = (x @ w).exp()
        return (y / y.sum(1, keepdim=True)).sin()

    step = joint(forward, (12, 3), (3, 10))
    assert region.find(step, named(step, "exp"), 1) is None
    assert region.find(step, named(step, "exp"), 0) is not None


def test_a_dimension_of_one_is_no_loop() -> None:
    step = joint(lambda q, k, v: attend(q, k, v).sin(), (1, 3), (10, 3), (10, 3))
    assert region.find(step, named(step, "div"), 0) is None


def test_what_a_draw_without_a_seed_goes_into_is_no_region() -> None:
    def drawn(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        weights = (q @ k.T).softmax(-1)
        return (weights * torch.rand_like(weights)) @ v

    step = joint(drawn, *ATTEND)
    assert region.find(step, named(step, "div"), 0) is None


def test_a_draw_from_a_seed_runs_in_both_loops_and_its_seed_outside() -> None:
    prims = torch.ops.prims

    def drawn(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        weights = (q @ k.T).softmax(-1)
        seed = prims.inductor_lookup_seed(prims.inductor_seeds(1, torch.device("cpu")), 0)
        return (weights * prims.inductor_random(list(weights.shape), seed, "rand")) @ v

    step = joint(drawn, *ATTEND)
    found = region.find(step, named(step, "div"), 0)
    assert found is not None and found.late is not None
    draw = named(step, "inductor_random")
    assert found.places[draw] == 0 and found.reads[draw] == (None,)
    for part in (found.early, found.late):
        assert draw in part.nodes
        assert all(part.inputs[a] == {None} for a in draw.all_input_nodes)


@pytest.mark.parametrize("chunks", [2, 3, 10])
def test_rows_that_stand_apart_are_read_and_written_where_they_stand(chunks: int) -> None:
    """Of a pair tensor in one row after the other a loop over columns has some of each row."""

    def forward(x: torch.Tensor, up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
        wide = (x.sin() @ up).view(12, 10, 24).softmax(0)
        return wide.view(120, 24) @ down

    torch.set_default_dtype(torch.float64)
    try:
        step = joint(forward, (120, 3), (3, 24), (24, 3))
        primals, tangents = (
            [torch.randn(n.meta["val"].shape) for n in nodes]
            for nodes in (step.primals, step.tangents)
        )
        found = region.find(step, named(step, "div"), 1)
        assert found is not None and found.late is not None
        columns = Merged(0, 12)
        for part in (found.early, found.late):
            assert any(columns in places for places in part.inputs.values())
            assert any(found.places[node] == columns for node in part.outputs)
        got = Looped(step, found, chunks, FIXED).write()(*primals, *tangents)
    finally:
        torch.set_default_dtype(torch.float32)
    for one, other in zip(got, step.module(primals, tangents), strict=True):
        assert other.abs().max() > 0
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


# ---------------------------------------------------------------- trips


@given(st.integers(2, 500), st.integers(2, 500))
def test_trips_cover_a_length_once(length: int, chunks: int) -> None:
    chunks = min(length, chunks)
    runs = trips(length, chunks)
    covered = [
        run.start + trip * run.size + place
        for run in runs
        for trip in range(run.count)
        for place in range(run.size)
    ]
    assert covered == list(range(length))
    assert 1 <= len(runs) <= 2 and sum(run.count for run in runs) <= chunks
    assert len(runs) == 1 or (runs[1].count == 1 and runs[1].size < runs[0].size)
