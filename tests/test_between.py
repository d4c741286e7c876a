"""Layers in which everything is of one size run as loops between two saved values."""

from __future__ import annotations

import functools

import pytest
import torch
from chunk_subjects import Trunk, double
from helpers import FUSED_CLOSE, assert_same, expected, planned, tensor
from test_chunk import looped
from test_region import joint
from torch import Tensor, fx
from torch.nn import functional as F

from memcompile import Step, between
from memcompile.analysis.cost import FIXED
from memcompile.analysis.rules import Merged
from memcompile.loop import Looped
from memcompile.region import Region

aten = torch.ops.aten

#: Of a pair layer: the sums over the third node of algorithms 11 and 12 of AlphaFold 2.
SUMS = {"outgoing": "ikc,jkc->ijc", "incoming": "kic,kjc->ijc"}


def layer(sum_: str, z: Tensor, wa: Tensor, wb: Tensor, wg: Tensor, wo: Tensor) -> Tensor:
    """A triangle multiplication on a residual stream; the stream goes on behind it."""
    stream = z.tanh()
    x = F.layer_norm(stream, stream.shape[-1:])
    a, b = (x @ wa).sigmoid() * x, (x @ wb).sigmoid() * x
    product = torch.einsum(sum_, a, b)
    return (stream + (product @ wo) * (x @ wg).sigmoid()).sin()


def stream_of(step: Step) -> list[fx.Node]:
    """The stream before and after the layer: what a plan would save."""
    (before,) = (n for n in step.nodes if n.target is aten.tanh.default)
    (end,) = (n for n in step.nodes if n.target is aten.sin.default)
    return [before, end.args[0]]


def product_of(step: Step) -> fx.Node:
    """The product of two values of the layer."""
    return next(n for n in step.nodes if n.target is aten.bmm.default and len(n.users) > 0)


#: The dimensions of the product: rows of its first factor, and of its second.
DIMS = (1, 2)


@functools.cache
def found(kind: str, length: int, dim: int = 1) -> tuple[Step, Step, Region]:
    """The step, the one with its sums regrouped, and the region of its layer."""
    width = 4
    shapes = ((length, length, width), *((width, width),) * 4)
    step = joint(functools.partial(layer, SUMS[kind]), *shapes)
    seed = product_of(step)
    other = between.find(step, seed, dim, stream_of(step))
    assert other is not None
    return step, *other


@pytest.mark.parametrize("length", [12, 13])
@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("kind", SUMS)
def test_loops_between_saved_values_compute_the_step(kind: str, dim: int, length: int) -> None:
    torch.set_default_dtype(torch.float64)
    try:
        step, other, region = found(kind, length, dim)
        primals, tangents = (
            [torch.randn(n.meta["val"].shape) for n in nodes]
            for nodes in (step.primals, step.tangents)
        )
        wanted = step.module(primals, tangents)
        for chunks in (3, 5):
            got = Looped(other, region, chunks, FIXED).write()(*primals, *tangents)
            for one, whole in zip(got, wanted, strict=True):
                assert whole.abs().max() > 0
                torch.testing.assert_close(one, whole, rtol=1e-10, atol=1e-12)
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize(("kind", "dim"), [("outgoing", 1), ("incoming", 2)])
def test_one_factor_is_read_whole_and_its_gradient_added_up(kind: str, dim: int) -> None:
    """Of incoming edges a trip has some columns of the stream, and of all that is made of it."""
    _, step, region = found(kind, 12, dim)
    assert region.late is not None
    pair = step.bytes(region.seed)
    whole = [n for n, p in region.early.inputs.items() if None in p and step.bytes(n) == pair]
    assert len(whole) == 1
    outputs = [region.places[n] for n in region.late.outputs if step.bytes(n) == pair]
    assert outputs.count("sum") == 1
    stream, _ = stream_of(step)
    assert region.early.inputs[stream] == {dim - 1}


def test_a_linear_layer_of_columns_reads_them_behind_the_rows() -> None:
    """Nothing of the layer is left outside for being viewed as one row after the other."""
    _, _, region = found("incoming", 12, 2)
    products = [n for n in region.early.nodes if n.target is aten.mm.default]
    assert len(products) >= 3
    assert {region.places[n] for n in products} == {Merged(0, 12)}


def test_no_layer_is_grown_past_what_is_saved() -> None:
    _, _, region = found("outgoing", 12)
    names = {n.name for n in region.places}
    assert "tanh" not in names and "sin" not in names


@pytest.mark.parametrize("length", [12, 13])
def test_a_trunk_of_one_size_gets_loops(length: int) -> None:
    report = looped(double(Trunk), tensor(length, length, 4), drafts=400)
    assert any(row.nodes > 50 for row in report.loops)


@pytest.mark.long
def test_a_trunk_in_loops_is_eagers_under_inductor() -> None:
    model, x = double(Trunk), tensor(13, 13, 4)
    got, (report,) = planned(model, [x], "min", "inductor", passes="default,chunk", strict=True)
    assert_same(got, expected(model, [x]), **FUSED_CLOSE)
    assert any(row.nodes > 50 for row in report.loops)
    assert report.lowered < 0.5 * report.inductor
