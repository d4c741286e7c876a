"""Random draws in loops: the bits of the whole draw, in every trip, forward and backward."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import pytest
import torch
from chunk_subjects import Attention, Scores, double
from helpers import FUSED_CLOSE, Seen, assert_same, memopt, observe, planned, tensor
from memcompile_passes.chunk import Chunk
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import memcompile
from memcompile import Step
from memcompile._torch import draws
from memcompile.loop import trips

PASSES = ["default", Chunk()]

# ---------------------------------------------------------------- a part of a draw

WHOLE = [5, 7, 37]
SEED = torch.tensor(1234567890123)
KINDS = {
    "rand": ("inductor_random", (WHOLE, SEED, "rand")),
    "randn": ("inductor_random", (WHOLE, SEED, "randn")),
    "randint": ("inductor_randint", (-3, 2**40, WHOLE, SEED)),
}


def pieces(name: str, args: Any, starts: list[int], sizes: list[int]) -> list[torch.Tensor]:
    """The part at each dimension's own start, of its own length."""
    return [draws.draw_part(name, args, d, starts[d], sizes[d]) for d in range(len(WHOLE))]


@pytest.mark.parametrize("kind", KINDS)
def test_a_compiled_part_is_bit_equal_to_the_compiled_whole(kind: str) -> None:
    """Along every dimension, for chunks that do not come out even, at starts not known ahead."""
    name, args = KINDS[kind]
    size = [-(-length // 3) for length in WHOLE]
    rest = [length - 2 * step for length, step in zip(WHOLE, size, strict=True)]

    def parts(seed: torch.Tensor, at: torch.Tensor) -> Any:
        given = [seed if value is SEED else value for value in args]
        starts = [at.item() * step for step in size]
        last = [2 * step for step in size]
        return pieces(name, given, starts, size), pieces(name, given, last, rest)

    def whole(seed: torch.Tensor) -> torch.Tensor:
        given = [seed if value is SEED else value for value in args]
        return getattr(torch.ops.prims, name).default(*given)

    torch._dynamo.reset()
    wanted = torch.compile(whole, fullgraph=True)(SEED)
    assert wanted.unique().numel() > 0.6 * wanted.numel()
    with torch._dynamo.config.patch(capture_scalar_outputs=True):
        compiled = torch.compile(parts, fullgraph=True)
        (first, last), (second, _) = (compiled(SEED, torch.tensor(at)) for at in (0, 1))
    for dim in range(len(WHOLE)):
        got = torch.cat([first[dim], second[dim], last[dim]], dim)
        assert got.dtype == wanted.dtype and torch.equal(got, wanted), dim


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("chunks", [2, 3, 5])
def test_parts_run_op_by_op_are_of_one_draw(kind: str, chunks: int) -> None:
    name, args = KINDS[kind]
    whole = draws.draw_part(name, args, 0, 0, WHOLE[0])
    for dim, length in enumerate(WHOLE):
        parts = [
            draws.draw_part(name, args, dim, run.start + trip * run.size, run.size)
            for run in trips(length, chunks)
            for trip in range(run.count)
        ]
        assert torch.equal(torch.cat(parts, dim), whole)
    assert whole.unique().numel() > 0.6 * whole.numel()


# ---------------------------------------------------------------- loops


@dataclasses.dataclass(frozen=True)
class Along(Chunk):
    """Loops over the values of one rank, along one dimension."""

    name: ClassVar[str] = "along"
    rank: int = 2
    dim: int = 0

    def propose(self, step: Step, context: memcompile.Context) -> Iterator[memcompile.Loop]:
        for loop in super().propose(step, context):
            if loop.value.meta["val"].dim() == self.rank and loop.dim == self.dim:
                yield loop


class Mixed(nn.Module):
    """Dropout between a softmax over ``over`` and a product; the mask is an output."""

    def __init__(self, over: int = -1, width: int = 4) -> None:
        super().__init__()
        self.over, self.key = over, nn.Linear(width, width)
        self.value = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> Any:
        weights = F.dropout(self.weights(x), 0.25)
        return weights @ self.value(x), weights == 0

    def weights(self, x: torch.Tensor) -> torch.Tensor:
        return (x @ self.key(x).transpose(-1, -2)).softmax(self.over)

    def known(self, x: torch.Tensor, mask: torch.Tensor) -> Any:
        """The same without a draw, where the mask is known."""
        return self.weights(x).masked_fill(mask, 0) / 0.75 @ self.value(x), mask


class Checkpointed(Mixed):
    """The same in a checkpoint region, which stock torch draws anew (pytorch #190758)."""

    def forward(self, x: torch.Tensor) -> Any:
        return checkpoint(super().forward, x, use_reentrant=False)


def plain(model: nn.Module, x: torch.Tensor) -> Seen:
    """The step as plain Inductor compiles it, drawn from the seed that ``planned`` draws from."""
    torch._dynamo.reset()
    module = copy.deepcopy(model)
    torch.manual_seed(0)
    return observe(module, torch.compile(module, backend="inductor"), [x])


def looped(
    model: nn.Module, x: torch.Tensor, passes: Any = PASSES
) -> tuple[Seen, memcompile.Report]:
    """The step at its least peak, which has loops."""
    got, (report,) = planned(model, [x], "min", "inductor", passes=passes, strict=True)
    assert report.loops
    return got, report


#: A shape of the input, the dimension softmax is over, and the one that is sliced.
WAYS = [
    ((37, 4), -1, 0),
    ((37, 4), 0, 1),
    pytest.param(((5, 23, 4), -1, 1), marks=pytest.mark.long),
]
Way = tuple[tuple[int, ...], int, int]


def with_known_mask(model: nn.Module, x: torch.Tensor, mask: torch.Tensor) -> Seen:
    module = copy.deepcopy(model)
    return observe(module, lambda given: module.known(given, mask), [x])


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS, ids=str)
def test_a_mask_drawn_in_a_loop_is_plain_inductors_and_the_backward_draws_it_again(
    way: Way,
) -> None:
    shape, over, dim = way
    model, x = double(Mixed, over), tensor(*shape)
    got, report = looped(model, x, ["default", Along(rank=len(shape), dim=dim)])
    assert {row.dim for row in report.loops} == {dim}
    wanted, mask = plain(model, x), got.outputs[1]
    assert 0.15 < mask.double().mean() < 0.35
    assert torch.equal(mask, wanted.outputs[1])
    assert_same(got, wanted, **FUSED_CLOSE)
    assert_same(got, with_known_mask(model, x, mask), **FUSED_CLOSE)


@pytest.mark.slow
def test_with_no_budget_the_mask_is_the_same() -> None:
    model, x = double(Mixed), tensor(37, 4)
    unplanned, _ = planned(model, [x], None, "inductor", passes=PASSES)
    assert torch.equal(unplanned.outputs[1], plain(model, x).outputs[1])


@pytest.mark.slow
def test_a_checkpoint_region_in_loops_draws_once() -> None:
    model, x = double(Checkpointed), tensor(37, 4)
    got, _ = looped(model, x)
    assert torch.equal(got.outputs[1], plain(model, x).outputs[1])
    assert_same(got, with_known_mask(model, x, got.outputs[1]), **FUSED_CLOSE)


@pytest.mark.slow
def test_steps_of_one_compilation_draw_masks_of_their_own() -> None:
    model, x = double(Mixed), tensor(37, 4)
    module = copy.deepcopy(model)
    torch._dynamo.reset()
    compiled = memopt(module, "min", "inductor", passes=PASSES, strict=True)
    masks = []
    for _ in range(2):
        module.zero_grad(set_to_none=True)
        got = observe(module, compiled, [x])
        assert_same(got, with_known_mask(model, x, got.outputs[1]), **FUSED_CLOSE)
        masks.append(got.outputs[1])
    assert memcompile.reports()[-1].loops
    assert 0.2 < (masks[0] != masks[1]).double().mean() < 0.55


# ---------------------------------------------------------------- other draws


def two_masks(weights: torch.Tensor, x: torch.Tensor) -> Any:
    one, two = F.dropout(weights.softmax(-1), 0.5), F.dropout(weights.exp(), 0.5)
    return one @ x + two @ x.sin(), one == 0, two == 0


def normal(weights: torch.Tensor, x: torch.Tensor) -> Any:
    return (weights + torch.randn_like(weights)).softmax(-1) @ x


def integers(weights: torch.Tensor, x: torch.Tensor) -> Any:
    return (weights.softmax(-1) * torch.randint(-3, 4, weights.shape)) @ x


def bernoulli(weights: torch.Tensor, x: torch.Tensor) -> Any:
    weights = weights.softmax(-1)
    return (weights * torch.bernoulli(weights.detach().sqrt())) @ x


DRAWS = [two_masks, normal, integers, bernoulli]


@pytest.mark.slow
@pytest.mark.parametrize("use", DRAWS, ids=lambda use: use.__name__)
def test_whatever_is_drawn_is_what_plain_inductor_draws(use: Callable[..., Any]) -> None:
    model, x = double(Scores, use), tensor(37, 4)
    got, _ = looped(model, x)
    assert_same(got, plain(model, x), **FUSED_CLOSE)
    if use is two_masks:
        _, one, two = got.outputs
        assert 0.35 < (one != two).double().mean() < 0.65, "two draws, one mask"


@pytest.mark.slow
def test_attention_with_dropout_is_looped_and_plain_inductors() -> None:
    model, x = double(Attention, 8, 2, 0.25), tensor(1, 67, 8)
    got, report = looped(model, x)
    assert report.lowered < 0.75 * report.inductor
    assert_same(got, plain(model, x), **FUSED_CLOSE)


@pytest.mark.slow
def test_inference_with_dropout_is_looped_and_plain_inductors() -> None:
    model, x = double(Mixed), tensor(37, 4, grad=False)
    with torch.no_grad():
        wanted, (got, report) = plain(model, x), looped(model, x)
    assert report.kind == "inference"
    assert_same(got, wanted, **FUSED_CLOSE)


# ---------------------------------------------------------------- draws without a seed


def notes_of(model: nn.Module, x: torch.Tensor, lower: str, **more: Any) -> str:
    """The step is the one without loops, and has none; what its report notes."""
    whole, _ = planned(model, [x], None, lower, **more)
    parts, (report,) = planned(model, [x], "min", lower, passes=PASSES, strict=True, **more)
    assert_same(parts, whole, **FUSED_CLOSE)
    assert not report.loops
    return "\n".join(report.notes)


def test_op_by_op_draws_are_not_looped_and_the_report_says_so() -> None:
    notes = notes_of(double(Mixed), tensor(37, 4), "eager")
    assert "draws without a seed" in notes and "test_draws.py:" in notes


@pytest.mark.slow
def test_draws_of_eagers_numbers_are_not_looped_and_the_report_says_so() -> None:
    notes = notes_of(double(Mixed), tensor(37, 4), "inductor", inductor={"fallback_random": True})
    assert "draws without a seed" in notes and "test_draws.py:" in notes


def in_place(weights: torch.Tensor, x: torch.Tensor) -> Any:
    return (weights * torch.empty_like(weights).uniform_(1, 2)).softmax(-1) @ x


@pytest.mark.slow
def test_a_draw_that_inductor_gives_no_seed_is_not_looped_and_the_report_says_so() -> None:
    notes = notes_of(double(Scores, in_place), tensor(37, 4), "inductor")
    assert "node uniform" in notes and "draws without a seed" in notes


def test_without_draws_nothing_is_noted() -> None:
    _, (report,) = planned(double(Attention), [tensor(1, 37, 8)], "min", passes=PASSES)
    assert report.loops and not any("seed" in note for note in report.notes)


# ---------------------------------------------------------------- on a GPU


def test_triton_kernels_draw_by_place_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four at a time, numbers repeat where places do not follow one another (pytorch #198333)."""
    if not hasattr(draws.TritonOverrides, "_can_use_4x_random"):
        pytest.skip("this torch has no such path")
    always = staticmethod(lambda: True)
    monkeypatch.setattr(draws.TritonOverrides, "_can_use_4x_random", always)
    with draws.exact_draws():
        for op in ("rand", "randn"):
            assert getattr(draws.TritonOverrides, op)("seed", "at").startswith(f"tl.{op}(")
    assert draws.TritonOverrides._can_use_4x_random()


def test_every_graph_is_compiled_to_draw_so(monkeypatch: pytest.MonkeyPatch) -> None:
    if not hasattr(draws.TritonOverrides, "_can_use_4x_random"):
        pytest.skip("this torch has no such path")
    always = staticmethod(lambda: True)
    monkeypatch.setattr(draws.TritonOverrides, "_can_use_4x_random", always)
    seen, compile_inner = [], memcompile._torch.compile_fx_inner

    def spy(*args: Any, **kwargs: Any) -> Any:
        seen.append(draws.TritonOverrides._can_use_4x_random())
        return compile_inner(*args, **kwargs)

    monkeypatch.setattr(memcompile._torch, "compile_fx_inner", spy)
    memopt(lambda x: F.dropout(x, 0.5), None, "inductor")(tensor(4, 5)).sum().backward()
    assert seen == [False, False], "the forward, the backward"
