"""Loss heads: the gradient taken in the forward's loop, and sums added up in place."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from chunk_subjects import Words, double, words
from helpers import FUSED_CLOSE, assert_same, expected, planned, tensor
from memcompile_passes.chunk import Chunk
from test_region import joint, named
from torch import fx, nn
from torch.nn import functional as F

import memcompile
from memcompile import head, rounds
from memcompile.loop import Looped

PASSES = ["default", Chunk()]


class Head(nn.Module):
    """Words, a map of them, and what ``loss`` makes of the logits and the words before."""

    def __init__(self, loss: Callable[..., Any], words: int = 211, width: int = 8) -> None:
        super().__init__()
        self.loss, self.embed = loss, nn.Embedding(words, width)
        self.mix, self.head = nn.Linear(width, width), nn.Linear(width, words)

    def forward(self, ids: torch.Tensor) -> Any:
        return self.loss(self.head(self.mix(self.embed(ids)).relu()), ids.roll(1))


def mean(logits: torch.Tensor, ids: torch.Tensor) -> Any:
    return F.cross_entropy(logits, ids)


def summed(logits: torch.Tensor, ids: torch.Tensor) -> Any:
    return F.cross_entropy(logits, ids, reduction="sum")


def ignoring(logits: torch.Tensor, ids: torch.Tensor) -> Any:
    return F.cross_entropy(logits, ids.where(ids % 3 > 0, -100))


def ignoring_all(logits: torch.Tensor, ids: torch.Tensor) -> Any:
    return F.cross_entropy(logits, torch.full_like(ids, -100))


def smoothed(logits: torch.Tensor, ids: torch.Tensor) -> Any:
    return F.cross_entropy(logits, ids, label_smoothing=0.1)


def weighted(logits: torch.Tensor, ids: torch.Tensor) -> Any:
    weight = torch.linspace(0.5, 2, logits.shape[-1], dtype=logits.dtype)
    return F.cross_entropy(logits, ids, weight)


def masked(logits: torch.Tensor, ids: torch.Tensor) -> Any:
    mask = (ids % 3 > 0).to(logits.dtype)
    return (F.cross_entropy(logits, ids, reduction="none") * mask).sum() / mask.sum()


def tripled(logits: torch.Tensor, ids: torch.Tensor) -> Any:
    return 3 * F.cross_entropy(logits, ids) - 1


def squared(logits: torch.Tensor, ids: torch.Tensor) -> Any:
    return F.cross_entropy(logits, ids) ** 2


def regularised(logits: torch.Tensor, ids: torch.Tensor) -> Any:
    return F.cross_entropy(logits, ids) + 0.1 * logits.logsumexp(-1).square().mean()


def two(logits: torch.Tensor, ids: torch.Tensor) -> Any:
    return F.cross_entropy(logits, ids) + 0.3 * F.cross_entropy(logits, ids.flip(0))


def returned(logits: torch.Tensor, ids: torch.Tensor) -> Any:
    loss = F.cross_entropy(logits, ids)
    return 2 * loss, loss.detach(), logits.detach().amax(-1)


def both_ways(logits: torch.Tensor, ids: torch.Tensor) -> Any:
    return F.cross_entropy(logits, ids), logits.square().mean()


def each(logits: torch.Tensor, ids: torch.Tensor) -> Any:
    return F.cross_entropy(logits, ids, reduction="none")


class _Clipped(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return gradient.clamp(-1e-3, 1e-3)


def clipped(logits: torch.Tensor, ids: torch.Tensor) -> Any:
    return F.cross_entropy(_Clipped.apply(logits), ids)


#: Whose gradient can be taken in the forward, and whose cannot.
EARLY = [
    mean, summed, ignoring, smoothed, weighted, masked, tripled, squared, regularised, two,
    returned,
]  # fmt: skip
LATE = [both_ways, each, clipped]


class Seen:
    """The forms that were found, and the loops that were written."""

    def __init__(self, only: bool | None) -> None:
        self.only, self.early, self.bodies = only, False, []

    def forms(self, step: memcompile.Step, *args: Any) -> Iterator[head.Form]:
        for form in head.forms(step, *args):
            early = form.step is not step
            self.early |= early
            if self.only is None or self.only == early:
                yield form

    def fill(self, looped: Looped, module: fx.GraphModule) -> None:
        FILL(looped, module)
        self.bodies += looped.traced.values()


FILL = Looped.fill


def run(
    model: nn.Module, *inputs: torch.Tensor, early: bool | None = None, **more: Any
) -> tuple[Seen, Any, memcompile.Report]:
    """The step in loops: with gradients taken in the forward, in the backward, or as chosen."""
    seen = Seen(early)
    with (
        mock.patch.object(rounds, "forms", seen.forms),
        mock.patch.object(Looped, "fill", lambda looped, module: seen.fill(looped, module)),
    ):
        more = {"budget": "min", "passes": PASSES, "strict": True, **more}
        got, (report,) = planned(model, inputs, **more)
    return seen, got, report


# ---------------------------------------------------------------- the numbers


@pytest.mark.parametrize("loss", EARLY, ids=lambda loss: loss.__name__)
def test_a_gradient_taken_in_the_forward_is_the_gradient(loss: Callable[..., Any]) -> None:
    model, ids = double(Head, loss), words(97)
    _, got, report = run(model, ids, early=True)
    assert report.loops
    assert_same(got, expected(model, [ids]))


@pytest.mark.parametrize("loss", LATE, ids=lambda loss: loss.__name__)
def test_what_is_not_linear_in_one_number_is_left_to_the_backward(loss: Callable[..., Any]) -> None:
    model, ids = double(Head, loss), words(97)
    seen, got, _ = run(model, ids)
    assert not seen.early
    assert_same(got, expected(model, [ids]))


def test_one_weight_for_words_and_head_gets_both_gradients() -> None:
    model, ids = double(Words, True), words(64)
    _, got, report = run(model, ids, early=True)
    assert report.loops
    assert_same(got, expected(model, [ids]))


def test_where_every_word_is_ignored_gradients_are_zero_as_in_eager() -> None:
    model, ids = double(Head, ignoring_all), words(97)
    _, got, report = run(model, ids, early=True, loss=lambda out: out)
    wanted = expected(model, [ids], loss=lambda out: out)
    assert report.loops and not wanted.parameters["head.weight"].any()
    assert_same(got, wanted)


@pytest.mark.parametrize("scale", [0.0, -1.0, 1e-30, 1e30])
def test_the_loss_is_scaled_outside_of_the_graph(scale: float) -> None:
    model, ids = double(Head, mean), words(97)
    _, got, report = run(model, ids, early=True, loss=lambda out: scale * out)
    wanted = expected(model, [ids], loss=lambda out: scale * out)
    assert report.loops
    for name, gradient in wanted.parameters.items():
        torch.testing.assert_close(got.parameters[name], gradient, rtol=1e-9, atol=0)


def test_a_backward_of_a_kept_graph_runs_twice() -> None:
    model, ids = double(Head, mean), words(97)
    with mock.patch.object(rounds, "forms", Seen(True).forms):
        options = {"budget": "min", "lower": "eager", "passes": PASSES, "strict": True}
        out = torch.compile(model, backend="memopt", options=options)(ids)
    out.backward(retain_graph=True)
    once = [p.grad.clone() for p in model.parameters()]
    out.backward()
    assert memcompile.reports()[-1].loops
    torch.testing.assert_close([p.grad for p in model.parameters()], [2 * g for g in once])


def test_two_heads_each_get_their_gradients() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.other = Head(mean), Head(smoothed)

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.one(ids) + 0.5 * self.other(ids.flip(0))

    model, ids = double(Two), words(97)
    _, got, report = run(model, ids, early=True)
    assert report.loops
    assert_same(got, expected(model, [ids]))


class Sides(nn.Module):
    """Two products of one shape added up to logits: two sums of one shape in the loop."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 211, bias=False), nn.Linear(4, 211, bias=False)

    def forward(self, x: torch.Tensor, y: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(self.a(x) + self.b(y).sin(), ids)


@pytest.mark.slow
def test_sums_of_one_shape_are_not_taken_for_each_other() -> None:
    model, inputs = double(Sides), [tensor(97, 4), tensor(97, 4) + 1, words(97)]
    _, got, report = run(model, *inputs, early=True, lower="inductor")
    assert report.loops
    assert_same(got, expected(model, inputs), **FUSED_CLOSE)


# ---------------------------------------------------------------- what is taken to be linear


def steep(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return (x @ w).exp().sum()


def test_a_region_under_one_number_has_two_forms_and_one_without_a_backward() -> None:
    step = joint(steep, (12, 3), (3, 10))
    pair, *_, single = head.forms(step, named(step, "exp"), 0)
    assert pair.region.late is not None and single.region.late is None
    assert {n.name for n in single.region.early.nodes} > {n.name for n in pair.region.early.nodes}
    assert single.step.sides.late.isdisjoint(single.region.early.nodes)


def test_half_precision_has_not_the_range() -> None:
    step = joint(lambda x, w: (x.half() @ w.half()).exp().float().sum(), (12, 3), (3, 10))
    found = list(head.forms(step, named(step, "exp"), 0))
    assert found and all(form.step is step for form in found)


@pytest.mark.parametrize("name", ["sin", "mul", "clamp", "view"])
def test_an_op_not_known_to_be_linear_ends_it(name: str) -> None:
    def bent(gradient: torch.Tensor) -> torch.Tensor:
        if name == "mul":
            return gradient * gradient
        if name == "view":
            return gradient.view(torch.int32).view(torch.float32) + 0.0
        return gradient.sin() if name == "sin" else gradient.clamp(max=0.5)

    class Bent(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
            return bent(gradient)

    step = joint(lambda x, w: Bent.apply((x @ w).exp()).sum(), (12, 3), (3, 10))
    found = list(head.forms(step, named(step, "exp"), 0))
    assert found and all(form.step is step for form in found)


# ---------------------------------------------------------------- sums in place


def targets(seen: Seen) -> set[Any]:
    return {node.target for body in seen.bodies for node in body.graph.nodes}


def test_sums_of_products_are_added_in_place() -> None:
    seen, _, report = run(double(Head, mean), words(97), early=True)
    assert report.loops
    assert torch.ops.aten.addmm_.default in targets(seen)


def test_sums_in_low_precision_are_added_up_in_float32() -> None:
    seen, _, report = run(double(Head, mean).bfloat16(), words(97), early=True)
    assert report.loops
    assert torch.ops.aten.addmm_.default not in targets(seen)
    assert torch.ops.aten.add.Tensor in targets(seen)


# ---------------------------------------------------------------- what it is for


@pytest.mark.slow
def test_a_head_in_a_loop_holds_its_weights_gradient_and_little_more() -> None:
    torch.manual_seed(3)
    model, ids = Head(mean, words=4096, width=64), torch.randint(4096, (1024,))
    seen, got, report = run(model, ids, lower="inductor")
    assert seen.early and report.loops
    whole = report.inductor - report.before
    assert report.lowered - report.before < 0.3 * whole
    assert report.predicted == pytest.approx(report.lowered, rel=0.02)
    assert_same(got, expected(model, [ids]), rtol=1e-3, atol=1e-6)
