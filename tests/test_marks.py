"""What a user marks in a model stays in full precision: ``memcompile.full_precision``."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import memopt, observe
from memcompile_passes.cast.stored import late_nodes
from memcompile_passes.compress import Compress
from test_cast import BF16, FP32, casted, contractions
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import memcompile
from memcompile import Context, backend
from memcompile.testing import capture


class Part(nn.Module):
    """Two contractions: a layer and a product."""

    def __init__(self, wrap: Callable[[Any], Any] = lambda function: function) -> None:
        super().__init__()
        self.layer = nn.Linear(48, 40)
        self.work = wrap(self.plain)

    def plain(self, x: Tensor) -> Tensor:
        y = self.layer(x).tanh()
        return (y @ y.mT).sigmoid() @ x

    def forward(self, x: Tensor) -> Tensor:
        return self.work(x)


class Blocked(Part):
    def forward(self, x: Tensor) -> Tensor:
        with memcompile.full_precision():
            return self.plain(x)


class Double(torch.autograd.Function):
    """A product with a backward of the user's own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x @ x.mT @ x

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        (g,) = grads
        return g @ (x.mT @ x) + x @ (g.mT @ x) + (x @ x.mT) @ g


FORMS: dict[str, Callable[[], nn.Module]] = {
    "a block": Blocked,
    "a decorator": lambda: Part(memcompile.full_precision),
    "a decorator with brackets": lambda: Part(memcompile.full_precision()),
    "one in another": lambda: Part(
        lambda f: memcompile.full_precision(memcompile.full_precision()(f))
    ),
    "checkpointed inside": lambda: Part(
        lambda f: memcompile.full_precision(lambda x: checkpoint(f, x, use_reentrant=False))
    ),
    "checkpointed outside": lambda: Part(
        lambda f: lambda x: checkpoint(memcompile.full_precision(f), x, use_reentrant=False)
    ),
    "a function of autograd": lambda: Part(lambda f: memcompile.full_precision(Double.apply)),
}


def model_of(part: Callable[[], nn.Module]) -> nn.Sequential:
    """The part between two layers."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 48), part(), nn.Linear(48, 24))


@pytest.mark.parametrize("form", FORMS)
def test_what_is_marked_stays_in_fp32_forward_and_backward(form: str) -> None:
    marked = memcompile.is_full_precision
    x = torch.randn(300, 32, requires_grad=True)
    graph, module, changed = casted(model_of(FORMS[form]), x)
    kept = [n for n in contractions(module) if marked(n)]
    rest = [n for n in contractions(module) if not marked(n)]
    assert changed and len(rest) == 6, "of two layers, forward and backward"
    late = {n.name for n in late_nodes(graph.step)} & {n.name for n in kept}
    assert len(late) >= 4 and len(kept) - len(late) >= 2
    for nodes, dtype in ((kept, FP32), (rest, BF16)):
        for node in nodes:
            assert {n.meta["val"].dtype for n in node.all_input_nodes} == {dtype}, node


@pytest.mark.parametrize("dynamic", [False, True])
def test_numbers_are_those_of_keeping_the_module(dynamic: bool) -> None:
    x = torch.randn(50, 32, requires_grad=True)
    one, two = model_of(Blocked), model_of(Blocked.__mro__[1])
    options = {"strict": True, "fullgraph": True, "dynamic": dynamic}
    marked = observe(one, memopt(one, precision="bf16", **options), [x])
    torch._dynamo.reset()
    named = observe(two, memopt(two, passes="cast{keep='1'},default", **options), [x])
    torch._dynamo.reset()
    neither = observe(two, memopt(two, precision="bf16", **options), [x])
    assert torch.equal(marked.outputs, named.outputs)
    assert torch.equal(marked.gradients[0], named.gradients[0])
    two.zero_grad()
    assert not torch.equal(marked.outputs, neither.outputs)


@pytest.mark.filterwarnings("error:a graph break")
def test_it_does_nothing_in_eager_and_without_the_pass() -> None:
    x = torch.randn(9, 32, requires_grad=True)
    one, two = model_of(Blocked), model_of(Part)
    assert torch.equal(one(x), two(x))
    assert torch.equal(memopt(one, fullgraph=True, strict=True)(x), one(x))
    low = memopt(two, precision="bf16", strict=True)
    with memcompile.full_precision():  # not compiled itself: a compiled function is not marked
        assert not torch.fx.traceback.current_meta
        cast = low(x)
    assert torch.equal(cast, low(x)) and not torch.equal(cast, two(x))


def test_inference_is_marked_too() -> None:
    model, x = model_of(Blocked), torch.randn(50, 32)
    with torch.no_grad():
        _, module, _ = casted(model, x)
    marked = [n for n in contractions(module) if memcompile.is_full_precision(n)]
    assert len(marked) == 3 and {n.meta["val"].dtype for n in marked} == {FP32}


def test_a_graph_break_inside_of_a_block_is_said() -> None:
    def inner(x: Tensor) -> Tensor:
        y = x @ x
        torch._dynamo.graph_break()
        return y @ x

    x = torch.randn(8, 8)
    compiled = memopt(memcompile.full_precision(inner), precision="bf16")
    with torch.no_grad(), pytest.warns(UserWarning, match="graph break inside"):
        compiled(x)


def test_a_wrapped_function_keeps_its_name_and_a_class_is_refused() -> None:
    @memcompile.full_precision
    def product(x: Tensor, *, by: float) -> Tensor:
        """It has a text."""
        return x @ x * by

    assert product.__name__ == "product" and product.__doc__ == "It has a text."
    assert torch.equal(product(torch.eye(3), by=2.0), 2 * torch.eye(3))
    with pytest.raises(TypeError, match=r"mark Part\.forward"):
        memcompile.full_precision(Part)
    with pytest.raises(KeyError), memcompile.full_precision():
        raise KeyError("is the user's")


def test_no_lossy_codec_touches_what_is_marked() -> None:
    """A chain of tanh, whose values would be kept in 8 bits."""

    def step(x: Tensor, mark: bool) -> Tensor:
        with memcompile.full_precision() if mark else contextlib.nullcontext():
            y = (x * 2).tanh()
        return y.tanh() * y

    x = torch.randn(64, 64, requires_grad=True)
    offered = []
    for mark in (False, True):
        torch._dynamo.reset()
        found = capture(lambda x, mark=mark: step(x, mark), x)[0].step
        moves = Compress(least=0, lossy="int8", factors=False).propose(found, Context())
        offered.append({m.value.name for m in moves if m.how == "int8"})
    assert "tanh" in offered[0] and "tanh" not in offered[1] and "tanh_1" in offered[1]


def step_of(mark: bool) -> Callable[[Tensor, Tensor], Tensor]:
    def step(x: Tensor, w: Tensor) -> Tensor:
        with memcompile.full_precision() if mark else contextlib.nullcontext():
            x = x @ w
        return x.square().mean()

    return step


def test_marks_are_part_of_what_caches_go_by(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[str, ...]] = []

    def compile_(job: Any) -> Any:
        seen.append((job.key, job.graph_key, job.decision_key, job.gm.code))
        return job.gm

    monkeypatch.setattr(backend._Job, "compile", compile_)
    x, w = torch.randn(64, 32), torch.randn(32, 32, requires_grad=True)
    for mark in (True, False, True):
        torch._dynamo.reset()
        memopt(step_of(mark), precision="bf16")(x, w)
    marked, plain, again = seen
    assert marked == again and marked[3] == plain[3], "the code that Dynamo captures is the same"
    assert all(one != two for one, two in zip(marked[:3], plain[:3], strict=True))


@pytest.mark.parametrize(
    ("passes", "differ"),
    [("cast{keep=first}", True), ("chunk{skip=first}", True), ("cast", False), ("chunk", False)],
)
def test_names_of_modules_are_part_of_it_where_a_pass_goes_by_them(
    passes: str, differ: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Pair(nn.Module):
        def __init__(self, *names: str) -> None:
            super().__init__()
            self.names = names
            for name in names:
                setattr(self, name, nn.Linear(4, 4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for name in self.names:
                x = getattr(self, name)(x).tanh()
            return x

    keys: list[str] = []

    def compile_(job: Any) -> Any:
        keys.append(job.key)
        return job.gm

    monkeypatch.setattr(backend._Job, "compile", compile_)
    for names in (("first", "second"), ("other", "first")):
        torch._dynamo.reset()
        memopt(Pair(*names), passes=passes)(torch.randn(3, 4))
    assert (keys[0] != keys[1]) == differ
