"""The order of the backward: what frees memory runs first."""

import torch
from test_region import joint
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from memcompile import Step
from memcompile.analysis.cost import FIXED
from memcompile.draft import Draft
from memcompile.order import NEAR, late_order


def products(step: Step) -> list[fx.Node]:
    """The matrix products of the backward as they will run."""
    draft = Draft(step, FIXED)
    order = late_order(step, draft.info, draft.gradients)
    return [node for node in order if "mm" in node.name]


def shapes(nodes: list[fx.Node]) -> list[tuple[int, ...]]:
    return [tuple(node.meta["val"].shape) for node in nodes]


def two_layers(rows: int) -> Step:
    """Two products with a tanh between; the backward as autograd most often orders it."""

    def both_sides(primals: list[Tensor], tangents: list[Tensor]) -> list[Tensor]:
        (x, one, two), (out,) = primals, tangents
        h = (x @ one).tanh()
        hidden = out @ two.T
        last = h.T @ out
        inner = hidden * (1 - h * h)
        return [h @ two, inner @ one.T, x.T @ inner, last]

    given = [torch.randn(rows, 8), torch.randn(8, 32), torch.randn(32, 4)]
    module = make_fx(both_sides, tracing_mode="fake")(given, [torch.randn(rows, 4)])
    for node in module.graph.find_nodes(op="placeholder"):
        node.target = str(node.target)
    return Step(module, 1)


def test_a_weights_gradient_runs_before_that_of_what_it_is_multiplied_with() -> None:
    """So the activation it reads is gone before a gradient of the same size is made."""
    assert shapes(products(two_layers(64)))[:2] == [(32, 4), (64, 32)]


def test_a_weights_gradient_larger_than_what_it_frees_waits_its_turn() -> None:
    assert shapes(products(two_layers(2)))[:2] == [(2, 32), (32, 4)]


def test_what_autograd_runs_far_below_stays_there() -> None:
    """Its gradient is there from the start, but what it reads may have to be recomputed."""

    def skipped(x: Tensor, first: Tensor, *weights: Tensor) -> Tensor:
        beside = x.sin() @ first
        for weight in weights:
            x = (x @ weight).tanh()
        return x + beside

    many = NEAR + 2
    step = joint(skipped, (64, 8), (8, 8), *[(8, 8)] * many)
    order = products(step)
    (gradient,) = (g for g, primal in zip(step.gradients, step.primals, strict=True)
                   if primal is step.primals[1])  # fmt: skip
    assert gradient is not None
    assert order.index(step.roots[gradient]) >= 2 * many


def test_every_late_node_comes_after_what_it_reads() -> None:
    step = two_layers(64)
    draft = Draft(step, FIXED)
    seen: set[fx.Node] = set()
    late = late_order(step, draft.info, draft.gradients)
    for node in late:
        assert {i for i in draft.info[node].inputs if i in set(late)} <= seen
        seen.add(node)
