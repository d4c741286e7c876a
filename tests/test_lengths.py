"""Loops over dimensions of symbolic length: one plan for many lengths, each as eager has it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from chunk_subjects import Apart, Attention, OuterProductMean, Triangle, Words, double, words
from helpers import assert_same, expected, memopt, observe, planned, short_planning, tensor
from torch import nn
from torch.nn import functional as F

import memcompile
from memcompile import measure_peak
from memcompile.lengths import FROM, ratio, with_numbers
from memcompile.step import tensors

#: A model, and its input of one length.
SUBJECTS: dict[str, tuple[Callable[[], nn.Module], Callable[[int], torch.Tensor]]] = {
    "attention": (lambda: double(Attention), lambda n: tensor(2, n, 8)),
    "triangle": (lambda: double(Triangle), lambda n: tensor(n, n, 4)),
    "rows apart": (lambda: double(Apart), lambda n: tensor(n, n, 4)),
    "outer product": (lambda: double(OuterProductMean), lambda n: tensor(3, n, 6)),
    "tied words": (lambda: double(Words, True), words),
}


@pytest.fixture(autouse=True)
def _cold() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled(model: nn.Module, budget: Any = "min", lower: str = "eager", **more: Any) -> Any:
    options = {"passes": "default,chunk", "strict": True, "dynamic": True, **more}
    return memopt(model, budget, lower, **options)


@pytest.mark.parametrize("name", SUBJECTS)
def test_one_plan_with_loops_is_the_step_at_every_length(name: str) -> None:
    make, of_length = SUBJECTS[name]
    model = make()
    call = compiled(model)
    since = len(memcompile.reports())
    for length in (37, 36, 41, 64, 29, 38):
        model.zero_grad()
        wanted = expected(model, [of_length(length)])
        with short_planning():
            assert_same(observe(model, call, [of_length(length)]), wanted)
    (report,) = memcompile.reports()[since:]  # none is planned anew, whatever is left over
    assert report.loops and report.symbols
    assert report.lowered < 0.85 * report.inductor


def test_a_length_without_a_whole_chunk_is_right_too() -> None:
    """Torch may plan anew there."""
    model = double(Attention)
    call = compiled(model)
    for length in (37, 2, 3, 5):
        model.zero_grad()
        wanted = expected(model, [tensor(1, length, 8)])
        with short_planning():
            assert_same(observe(model, call, [tensor(1, length, 8)]), wanted)


def test_no_length_that_shares_a_plan_exceeds_the_budget() -> None:
    """Lengths that fit share the plan with its loops; a longer one is planned anew."""
    torch.manual_seed(0)
    model = Words(True, 499, 8)
    budget = 300_000
    call = compiled(model, budget, "inductor")

    def step(length: int) -> None:
        model.zero_grad(set_to_none=True)
        call(words(length)).backward()

    plans = []
    for length in (203, 180, 211, 3000):
        since = len(memcompile.reports())
        step(length)
        assert measure_peak(step, length).bytes <= budget
        plans.append(len(memcompile.reports()) - since)
    assert memcompile.reports()[-1].loops and memcompile.reports()[-1].symbols
    assert plans[1:3] == [0, 0] and plans[0] == plans[3] == 1


def test_dropout_in_loops_of_any_length_is_that_of_the_whole() -> None:
    """Every chunk draws its part of the mask that Inductor draws for that length."""

    class Dropped(nn.Module):
        def forward(self, x: torch.Tensor) -> Any:
            weights = F.dropout((x @ x.T).softmax(0), 0.25)
            return weights @ x, weights == 0

    model, since = Dropped(), len(memcompile.reports())
    call = compiled(model, lower="inductor")
    plain = torch.compile(copy.deepcopy(model), dynamic=True)
    for length in (37, 58):
        x = torch.randn(length, 4, requires_grad=True)
        torch.manual_seed(0)
        got = observe(None, call, [x])
        torch.manual_seed(0)
        wanted = observe(None, plain, [x])
        assert torch.equal(got.outputs[1], wanted.outputs[1])
        assert_same(got, wanted, atol=1e-5, rtol=1e-4)
    reports = memcompile.reports()[since:]
    assert len(reports) == 1 and reports[0].loops


def test_an_inference_graph_of_any_length_is_looped() -> None:
    model = double(Attention)
    call = compiled(model, lower="inductor")
    since = len(memcompile.reports())
    for length in (97, 64, 113):
        x = tensor(1, length, 8, grad=False)
        with torch.no_grad():
            torch.testing.assert_close(call(x), model(x))
    reports = memcompile.reports()[since:]
    assert len(reports) == 1 and reports[0].loops


def test_a_length_that_depends_on_data_is_left_whole() -> None:
    def chosen(x: torch.Tensor) -> torch.Tensor:
        rows = x[x[:, 0] > 0]
        return (rows @ x.T).tanh() @ x

    x = tensor(37, 4)
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        got, (report,) = planned(chosen, [x], "min", passes="chunk", strict=True, fullgraph=True)
    assert_same(got, expected(chosen, [x]))
    assert not report.loops


# ---------------------------------------------------------------- lengths as numbers


def test_a_length_divides_another_only_where_it_does_at_all_lengths() -> None:
    sizes: list[Any] = []

    def backend(module: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        sizes.extend(i for i in inputs if isinstance(i, torch.SymInt))
        (n,) = sizes
        assert ratio(n, n) == 1 and ratio(3 * n, n) == 3
        assert str(ratio(n * n, n)) == str(n)
        assert ratio(n + 1, n) is None and ratio(64, n) is None and ratio(n, 2 * n) is None
        assert ratio(n // 2, n) is None
        return module

    torch.compile(lambda x: x + 1, backend=backend, dynamic=True)(torch.zeros(64))
    assert sizes
    assert ratio(64, 32) == 2 and ratio(64, 48) is None


def test_no_size_of_a_model_stands_for_a_symbol() -> None:
    """Equal by chance, a length and a width would be sliced together."""
    shapes: list[tuple[int, ...]] = []

    def backend(module: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        nodes = list(module.graph.nodes)
        for node in nodes:
            node.meta["val"] = node.meta.get("example_value")
        shapes.extend(tuple(t.shape) for n in with_numbers(nodes).values() for t in tensors(n))
        return module

    x = torch.zeros(5, 2 * FROM)
    torch._dynamo.mark_dynamic(x, 0)
    torch.compile(lambda x: x @ x.T, backend=backend)(x)
    length = shapes[-1][0]
    assert set(shapes) == {(length, 2 * FROM), (2 * FROM, length), (length, length)}
    assert length > FROM and 2 * FROM % length


def test_what_depends_on_data_has_no_number() -> None:
    values: list[Any] = []

    def backend(module: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        nodes = list(module.graph.nodes)
        for node in nodes:
            node.meta["val"] = node.meta.get("example_value")
        values.extend(twin.meta["val"] for twin in with_numbers(nodes).values())
        return module

    x = torch.randn(5)
    torch._dynamo.mark_dynamic(x, 0)
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        torch.compile(lambda x: x[x > 0] * 2, backend=backend)(x)
    shapes = [value.shape for value in values if isinstance(value, torch.Tensor)]
    assert shapes and len(set(shapes)) == 1  # the input and what is compared
    assert values[-1] is None
