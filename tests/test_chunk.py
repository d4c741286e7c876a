"""Regions of a step run as loops over chunks: the numbers, the peaks, and where there is none."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, ClassVar
from unittest import mock

import pytest
import torch
from chunk_subjects import SUBJECTS, Attention, OuterProductMean, Scores, Words, double, words
from helpers import FUSED_CLOSE, assert_same, expected, memopt, planned, tensor
from memcompile_passes.chunk import Chunk
from torch import nn
from torch._inductor import config as inductor_config
from torch._inductor.graph import GraphLowering
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint

import memcompile
from memcompile import Context, Step, measure_peak

PASSES = ["default", Chunk()]


def looped(
    model: nn.Module,
    *inputs: torch.Tensor,
    budget: Any = "min",
    passes: Any = PASSES,
    strict: bool = True,
    **more: Any,
) -> memcompile.Report:
    """The step in loops gives eager's outputs, gradients and buffers; its report."""
    wanted = expected(model, inputs)
    got, (report,) = planned(model, inputs, budget, passes=passes, strict=strict, **more)
    assert_same(got, wanted)
    return report


# ---------------------------------------------------------------- the order


@pytest.mark.parametrize("budget", ["min", None])
def test_kernels_keep_to_the_graphs_order_where_there_are_loops(budget: Any) -> None:
    """Inductor's own estimate of memory, by which it looks for another, knows no loop's body."""
    model, seen = Attention(), []
    run = GraphLowering.codegen

    def spied(self: GraphLowering) -> Any:
        seen.append(inductor_config.reorder_for_peak_memory)
        return run(self)

    with mock.patch.object(GraphLowering, "codegen", spied):
        memopt(model, budget, "inductor", passes=PASSES)(torch.randn(1, 61, 8)).sum().backward()
    assert seen[-2:] == [budget is None] * 2


# ---------------------------------------------------------------- the numbers


@pytest.mark.parametrize("name", SUBJECTS)
def test_a_step_in_loops_is_the_step(name: str) -> None:
    make, given_ = SUBJECTS[name]
    report = looped(make(), given_())
    assert report.loops
    assert report.lowered < 0.85 * report.inductor
    for row in report.loops:
        assert 2 <= row.chunks <= min(row.length, 64)
        assert row.value and row.dim >= 0 and row.source.startswith("chunk_subjects.py:")


def test_a_report_says_which_nodes_are_the_loops_of_a_region() -> None:
    make, given_ = SUBJECTS["attention, longer"]
    report = looped(make(), given_())
    points = {point.node: point for point in report.timeline_after}
    sides = [{points[node].side for node in row.at} for row in report.loops]
    assert {"forward", "backward"} in sides  # the scores'; others may be over gradients alone
    for row in report.loops:
        # What a trip makes is temporary: at least its part of the value.
        assert all(
            points[node].live["temporaries"] >= row.bytes // row.chunks for node in row.at[:1]
        )
    at = [node for row in report.loops for node in row.at]
    assert sorted(at) == sorted(node for node in points if node.startswith("while_loop"))


def both(weights: torch.Tensor, x: torch.Tensor) -> Any:
    return weights.softmax(-1), weights.softmax(-1) @ x


def turned(weights: torch.Tensor, x: torch.Tensor) -> Any:
    weights = weights.softmax(-1)
    return weights.T, (weights @ x).sin(), x.exp()


def again(weights: torch.Tensor, x: torch.Tensor) -> Any:
    return checkpoint(lambda w: w.softmax(-1) @ x, weights, use_reentrant=False)


def masked(weights: torch.Tensor, x: torch.Tensor) -> Any:
    future = torch.ones_like(weights, dtype=torch.bool).triu(1)
    return weights.masked_fill(future, float("-inf")).softmax(-1) @ x


def spectrum(weights: torch.Tensor, x: torch.Tensor) -> Any:
    return torch.fft.fft(weights.sin()).abs() @ x


def added(weights: torch.Tensor, x: torch.Tensor) -> Any:
    return weights.exp().sum(0)


def highest(weights: torch.Tensor, x: torch.Tensor) -> Any:
    return weights.exp().sum(0), weights.tanh().amax(0)


def tallied(weights: torch.Tensor, x: torch.Tensor) -> Any:
    steps = (10 * weights).long()
    return steps.sum(0), steps.amax(0), steps.amin(0), weights.sin() @ x


def ranked(weights: torch.Tensor, x: torch.Tensor) -> Any:
    values, order = weights.sort(-1)
    return values @ x, order[:, 0]


def scaled(weights: torch.Tensor, x: torch.Tensor) -> Any:
    return (weights.detach().softmax(-1) * x.sum()) @ x


USES = [both, turned, again, masked, spectrum, added, highest, tallied, ranked, scaled]


@pytest.mark.parametrize("use", USES, ids=lambda use: use.__name__)
def test_whatever_is_made_of_all_pairs(use: Callable[..., Any]) -> None:
    report = looped(double(Scores, use), tensor(37, 4))
    assert report.loops


# ---------------------------------------------------------------- lower precision


@dataclasses.dataclass(frozen=True)
class Many(Chunk):
    """Loops of as many chunks as are allowed, and of no fewer."""

    name: ClassVar[str] = "many"

    def propose(self, step: Step, context: memcompile.Context) -> Iterator[memcompile.Loop]:
        return (m for m in super().propose(step, context) if m.chunks == self.max_chunks)


def error(model: nn.Module, x: torch.Tensor, seen: Any) -> float:
    """How far a step's results are from float64's: the mean square of relative norms."""
    exact = expected(copy.deepcopy(model).double(), [x.detach().double().requires_grad_()])
    pairs = [(seen.outputs, exact.outputs), *zip(seen.gradients, exact.gradients, strict=True)]
    pairs += [(seen.parameters[name], exact.parameters[name]) for name in exact.parameters]
    pairs = [(got, want) for got, want in pairs if want.norm() > 1e-9]  # else it is zero
    off = [((got - want).norm() / want.norm()).square() for got, want in pairs]
    return float(sum(off) / len(off)) ** 0.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("name", "chunks"), [("attention, longer", 64), ("gelu", 64), ("outer product", 12)]
)
def test_loops_round_no_worse_than_whole_tensors_do(
    name: str, chunks: int, dtype: torch.dtype
) -> None:
    make, given_ = SUBJECTS[name]
    model, x = make().to(dtype), given_().detach().to(dtype).requires_grad_()
    whole, _ = planned(model, [x], None)
    parts, (report,) = planned(model, [x], "min", passes=["default", Many(chunks)], strict=True)
    assert {row.chunks for row in report.loops} == {chunks}
    assert error(model, x, parts) <= 1.5 * error(model, x, whole)


# ---------------------------------------------------------------- the same, by Inductor


class Loss(nn.Module):
    """A model and one number to go down."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.model(x).square().mean()


def floor(model: nn.Module, x: torch.Tensor, passes: Any) -> int:
    """The least lowered peak there is, in total bytes."""
    with pytest.raises(memcompile.BudgetError) as caught:
        planned(model, [x], "1KiB", "inductor", passes=passes, strict=True)
    return caught.value.floor


@pytest.mark.slow
def test_a_budget_that_only_loops_can_meet_is_met() -> None:
    torch.manual_seed(3)
    model, x = Loss(Attention(16)), torch.randn(1, 193, 16)
    whole, least = floor(model, x, ["default"]), floor(model, x, PASSES)
    assert least < 0.8 * whole
    budget = (least + whole) // 2
    with pytest.raises(memcompile.BudgetError):
        planned(model, [x], budget, "inductor", passes=["default"])

    torch._dynamo.reset()
    compiled = memopt(model, budget, "inductor", passes=PASSES, strict=True)

    def step() -> None:
        model.zero_grad(set_to_none=True)
        compiled(x).backward()

    measured = measure_peak(step).bytes
    report = memcompile.reports()[-1]
    assert report.loops
    assert measured + report.before <= budget == report.budget
    assert report.lowered - report.before == pytest.approx(measured, rel=0.02)
    wanted = expected(model, [x], loss=lambda out: out)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, wanted.parameters[name], rtol=1e-3, atol=1e-5)


@pytest.mark.slow
def test_loops_round_no_worse_than_inductor_does() -> None:
    make, given_ = SUBJECTS["gelu"]
    model, x = make().bfloat16(), given_().detach().bfloat16().requires_grad_()
    whole, _ = planned(model, [x], None, "inductor")
    parts, (report,) = planned(model, [x], "min", "inductor", passes=PASSES, strict=True)
    assert report.loops
    assert error(model, x, parts) <= 1.5 * error(model, x, whole)


@pytest.mark.slow
def test_loops_with_a_shorter_last_chunk_are_lowered() -> None:
    model, ids = double(Words, True), words(97)
    wanted = expected(model, [ids])
    got, (report,) = planned(model, [ids], "min", "inductor", passes=PASSES, strict=True)
    assert any(row.length % row.chunks for row in report.loops)
    assert_same(got, wanted, **FUSED_CLOSE)


# ---------------------------------------------------------------- step by step


def gradients(model: nn.Module) -> list[torch.Tensor]:
    return [p.grad.clone() for p in model.parameters()]


def test_a_backward_run_twice_gives_the_same_gradients() -> None:
    model, x = double(Attention), tensor(1, 37, 8)
    out = memopt(model, "min", passes=PASSES, strict=True)(x).square().sum()
    out.backward(retain_graph=True)
    once, own = gradients(model), x.grad.clone()
    out.backward()
    assert memcompile.reports()[-1].loops
    torch.testing.assert_close(gradients(model), [2 * g for g in once])
    torch.testing.assert_close(x.grad, 2 * own)


def test_the_second_step_is_the_first_again() -> None:
    model, x = double(OuterProductMean), tensor(3, 37, 6)
    compiled, seen = memopt(model, "min", passes=PASSES, strict=True), []
    for _ in range(2):
        model.zero_grad(set_to_none=True)
        out = compiled(x)
        out.square().sum().backward()
        seen.append([out.detach(), *gradients(model)])
    assert memcompile.reports()[-1].loops
    torch.testing.assert_close(seen[0], seen[1], rtol=0, atol=0)


def test_a_buffer_that_a_step_writes_to_is_written_once() -> None:
    model = double(Scores, lambda weights, x: None)
    model.register_buffer("seen", torch.zeros(37, 37, dtype=torch.float64))

    def remember(weights: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        model.seen.mul_(0.5).add_(weights.detach())
        return weights.softmax(-1) @ x

    model.use = remember
    wanted = model.a(tensor(37, 4)) @ model.b(tensor(37, 4)).T
    memopt(model, "min", passes=PASSES, strict=True)(tensor(37, 4)).sum().backward()
    torch.testing.assert_close(model.seen, wanted.detach())


# ---------------------------------------------------------------- forced and forbidden


class Coder(nn.Module):
    """All pairs of rows, twice; in the backward of ``sin`` is a ``cos``, of ``exp`` neither."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.ModuleList([Scores(lambda w, x: w.sin().softmax(-1) @ x)])
        self.decoder = Scores(lambda w, x: (-w.square()).exp() @ x)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.decoder(self.encoder[0](x))


def in_loops(report: memcompile.Report) -> str:
    """The code of all loops of a report."""
    texts = [report.forward, report.backward]
    parts = [part for text in texts for part in text.split("class ")]
    return "".join(part for part in parts if part.startswith("loop_body"))


def coded(options: str, strict: bool = True) -> str:
    passes = f"default,chunk{{{options}}}"
    return in_loops(looped(double(Coder), tensor(37, 4), passes=passes, strict=strict))


def test_without_options_every_module_may_be_looped() -> None:
    code = coded("")
    assert "aten.sin" in code and "aten.pow" in code


@pytest.mark.parametrize("options", ["skip=decoder", "skip='dec*'", "skip=('decoder','*.1')"])
def test_nothing_of_a_skipped_module_is_looped(options: str) -> None:
    code = coded(options, strict="*.1" not in options)
    assert "aten.sin" in code and "aten.pow" not in code


@pytest.mark.parametrize("options", ["only=encoder", "only=encoder.0", "only='*.0'"])
def test_loops_grow_only_from_values_of_the_modules_named(options: str) -> None:
    code = coded(options)
    assert "aten.sin" in code and "aten.pow" not in code


def test_a_class_stands_for_all_modules_of_it() -> None:
    report = looped(double(Coder), tensor(37, 4), passes="default,chunk{skip=Scores}")
    assert not report.loops


def test_what_is_skipped_wins_over_what_is_named() -> None:
    code = coded("only=Scores,skip=decoder")
    assert "aten.sin" in code and "aten.pow" not in code


def test_a_skipped_module_stays_whole_where_loops_are_all_there_is() -> None:
    report = looped(double(Coder), tensor(37, 4), passes="chunk{skip=decoder}")
    assert report.loops and "aten.pow" not in in_loops(report)


class Pairs(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ x.T


class Mix(nn.Module):
    def forward(self, weights: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return weights.softmax(-1) @ x


class Split(nn.Module):
    """What one module makes whole, another reads."""

    def __init__(self) -> None:
        super().__init__()
        self.pairs, self.mix = Pairs(), Mix()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.mix(self.pairs(x), x)


@pytest.mark.parametrize("name", ["pairs", "mix"])
def test_no_loop_of_another_module_reaches_into_a_skipped_one(name: str) -> None:
    assert looped(Split(), tensor(37, 4)).loops
    assert not looped(Split(), tensor(37, 4), passes=f"default,chunk{{skip={name}}}").loops


def test_a_name_of_no_module_is_noted_or_under_strict_an_error() -> None:
    model, x = double(Coder), tensor(37, 4)
    passes = "default,chunk{skip=decodr}"
    _, (report,) = planned(model, [x], "min", passes=passes)
    (note,) = [ran.note for ran in report.passes if ran.by.startswith("chunk")]
    assert "skip='decodr' is no module of this graph; there are encoder, Scores" in note
    assert note.startswith("offered ") and report.loops
    with pytest.raises(memcompile.PassError, match="skip='decodr' is no module of this graph"):
        planned(model, [x], "min", passes=passes, strict=True)


@pytest.mark.parametrize("given", ["skip=0", "only=''", "skip=('a', 3)", "only={'a': 1}"])
def test_what_names_no_module_is_refused(given: str) -> None:
    option = given.partition("=")[0]
    with pytest.raises(memcompile.PassError, match=f"{option}=.* names no modules; write a module"):
        planned(double(Coder), [tensor(37, 4)], "min", passes=f"default,chunk{{{given}}}")


# ---------------------------------------------------------------- where there are no loops


def test_no_loop_has_more_chunks_than_the_pass_allows() -> None:
    report = looped(double(Attention), tensor(1, 97, 8), passes=["default", Chunk(max_chunks=4)])
    assert {row.chunks for row in report.loops} == {4}


@pytest.mark.parametrize(("length", "most"), [(4096, 64), (32768, 512)])
def test_only_what_is_large_in_64_parts_is_offered_in_more(length: int, most: int) -> None:
    with FakeTensorMode():
        graph = make_fx(lambda x: (x @ x.mT).relu())(torch.empty(length, 8))
    offered = Chunk().propose(Step(graph, 1), Context(strict=True))
    assert max(loop.chunks for loop in offered) == most


def test_a_budget_that_is_met_without_loops_gets_none() -> None:
    model, x = double(Attention), tensor(1, 37, 8)
    _, (own,) = planned(model, [x], None)
    assert not looped(model, x, budget=own.lowered).loops
