"""What the tests of the engine share: a step seen from outside, eager beside ``memopt``."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

import torch
from torch import Tensor, fx, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_leaves, tree_map_only

import memcompile
import memcompile.planner
from memcompile import region
from memcompile.analysis.cost import FIXED
from memcompile.loop import Looped
from memcompile.step import Step, is_loop

#: Looser than equality only because decompositions add in another order than eager's kernels.
CLOSE = {"rtol": 1e-9, "atol": 1e-11}
FUSED_CLOSE = {"rtol": 1e-7, "atol": 1e-9}

#: "middle" is half-way between the floor and Inductor's peak, in bytes.
BUDGETS = (None, "min", "middle")


@dataclasses.dataclass
class Seen:
    """All that a user can look at after one step."""

    outputs: Any
    inputs: Any  #: after the step: mutations show here
    gradients: Any  #: of the inputs
    parameters: dict[str, Any]  #: gradients of the parameters
    buffers: dict[str, Any]


def total(outputs: Any) -> torch.Tensor | None:
    """A loss of every differentiable output, each weighted differently."""
    loss = None
    for place, leaf in enumerate(tree_leaves(outputs)):
        if isinstance(leaf, torch.Tensor) and leaf.requires_grad:
            term = (place + 1) * leaf.abs().square().sum()
            loss = term if loss is None else loss + term
    return loss


def observe(
    model: nn.Module | None,
    call: Callable[..., Any],
    inputs: Sequence[Any],
    loss: Callable[[Any], torch.Tensor | None] = total,
) -> Seen:
    """Run one step on copies of ``inputs``, backward included where there is one."""
    given = tree_map_only(torch.Tensor, fresh_copy, list(inputs))
    outputs = call(*given)
    scalar = loss(outputs)
    if scalar is not None:
        scalar.backward()
    tensors = [leaf for leaf in tree_leaves(given) if isinstance(leaf, torch.Tensor)]
    return Seen(
        tree_map_only(torch.Tensor, torch.Tensor.detach, outputs),
        [tensor.detach() for tensor in tensors],
        [tensor.grad for tensor in tensors],
        {name: p.grad for name, p in model.named_parameters()} if model else {},
        {name: b.clone() for name, b in model.named_buffers()} if model else {},
    )


def fresh_copy(tensor: torch.Tensor) -> torch.Tensor:
    """A leaf with the same values, strides and ``requires_grad``."""
    if tensor.layout != torch.strided:
        return tensor.detach().clone().requires_grad_(tensor.requires_grad)
    copied = torch.empty_strided(
        tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device
    )
    return copied.copy_(tensor.detach()).requires_grad_(tensor.requires_grad)


def memopt(call: Any, budget: Any = None, lower: str = "eager", **more: Any) -> Any:
    """``torch.compile`` with this backend; ``dynamic`` and ``fullgraph`` go to torch."""
    torchs = {key: more.pop(key) for key in ("dynamic", "fullgraph") if key in more}
    options = {"budget": budget, "lower": lower, **more}
    return torch.compile(call, backend="memopt", options=options, **torchs)


def new_reports(since: int) -> list[memcompile.Report]:
    """Reports of the graphs compiled after there were ``since`` of them."""
    return memcompile.reports()[since:]


@contextlib.contextmanager
def short_planning(drafts: int = 100) -> Iterator[None]:
    """A hundred drafts a graph: whichever plan is found, the numbers must be right."""
    with mock.patch.object(memcompile.planner, "draft_limit", lambda nodes: drafts):
        yield


def planned(
    model: Any,
    inputs: Sequence[Any],
    budget: Any,
    lower: str = "eager",
    loss: Callable[[Any], torch.Tensor | None] = total,
    drafts: int = 100,
    **more: Any,
) -> tuple[Seen, list[memcompile.Report]]:
    """One compiled step from a cold start, and the reports of its graphs."""
    torch._dynamo.reset()
    module = copy.deepcopy(model) if isinstance(model, nn.Module) else None
    since = len(memcompile.reports())
    torch.manual_seed(0)
    compiled = memopt(module or model, budget, lower, **more)
    with short_planning(drafts):
        seen = observe(module, compiled, inputs, loss)
    return seen, new_reports(since)


def expected(
    model: Any, inputs: Sequence[Any], loss: Callable[[Any], torch.Tensor | None] = total
) -> Seen:
    """The same step in eager."""
    module = copy.deepcopy(model) if isinstance(model, nn.Module) else None
    torch.manual_seed(0)
    return observe(module, module or model, inputs, loss)


def assert_same(got: Seen, wanted: Seen, **close: float) -> None:
    """Outputs, gradients, mutated inputs and buffers are equal up to rounding."""
    for field in dataclasses.fields(Seen):
        torch.testing.assert_close(
            getattr(got, field.name),
            getattr(wanted, field.name),
            equal_nan=True,
            msg=lambda text, name=field.name: f"{name}: {text}",
            **(close or CLOSE),
        )


def middle(reports: Sequence[memcompile.Report]) -> int | None:
    """Bytes half-way between the floor and Inductor's peak, for a step of one graph."""
    if len(reports) != 1 or reports[0].lowered is None or reports[0].inductor is None:
        return None
    return (reports[0].lowered + reports[0].inductor) // 2 or None


def check(
    model: Any,
    *inputs: Any,
    lower: str = "eager",
    loss: Callable[[Any], torch.Tensor | None] = total,
    close: dict[str, float] | None = None,
    **more: Any,
) -> list[memcompile.Report]:
    """The step is eager's at no budget, at the least peak and half-way; budgets are kept.

    Returns the reports of the step at its least peak.
    """
    close = close or (CLOSE if lower == "eager" else FUSED_CLOSE)
    wanted = expected(model, inputs, loss)
    free, whole = planned(model, inputs, None, lower, loss, **more)
    assert_same(free, wanted, **close)
    least, reports = planned(model, inputs, "min", lower, loss, **more)
    assert_same(least, wanted, **close)
    assert len(reports) == len(whole)
    for before, after in zip(whole, reports, strict=True):
        own = before.lowered - before.held_before  # a graph break: what it adds itself
        assert after.lowered - after.held_before <= own, "the least peak is above the unplanned one"
    budget = middle(reports)
    if budget is not None and reports[0].kind == "training":
        half, (report,) = planned(model, inputs, budget, lower, loss, **more)
        assert_same(half, wanted, **close)
        assert report.lowered <= budget
    return reports


def tensor(*shape: int, grad: bool = True, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """Random values, the same in every run."""
    generator = torch.Generator().manual_seed(len(shape) + sum(shape))
    values = torch.randn(shape, generator=generator, dtype=dtype)
    return values.requires_grad_(grad)


class Block(nn.Module):
    """A small residual block with enough to save for a plan to have a choice."""

    def __init__(self, width: int = 8, dropout: float = 0.0) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = torch.nn.functional.gelu(self.up(self.norm(x)))
        return x + self.dropout(self.down(hidden))


def stack(blocks: int = 2, width: int = 8, dropout: float = 0.0) -> nn.Sequential:
    """``blocks`` of :class:`Block` in float64."""
    torch.manual_seed(1)
    return nn.Sequential(*(Block(width, dropout) for _ in range(blocks))).double()


def with_loop(
    forward: Callable[..., list[Tensor]], inputs: list[Tensor], value: str
) -> fx.GraphModule:
    """The step's graph with a loop of three trips, or four with a shorter one, over a value."""
    module = make_fx(lambda *given: forward(*given), tracing_mode="fake")(*inputs)
    step = Step(module, len(forward(*inputs)))
    seed = next(n for n in step.nodes if n.name == value)
    found = region.find(step, seed, 0)
    assert found is not None
    return Looped(step, found, 3, FIXED).write()


def loops(module: fx.GraphModule) -> list[fx.Node]:
    """The loops of a graph."""
    return [node for node in module.graph.nodes if is_loop(node)]


def first_body(module: fx.GraphModule) -> fx.GraphModule:
    """That of the graph's first loop."""
    return getattr(module, loops(module)[0].args[1].target)


def assert_noted(module: fx.GraphModule, inputs: Sequence[torch.Tensor]) -> int:
    """Tensors lie as graph and bodies note it, which kernels are made by; how many were seen."""
    seen = 0

    class Noted(fx.Interpreter):
        def run_node(self, node: fx.Node) -> object:
            nonlocal seen
            found = super().run_node(node)
            if isinstance(found, torch.Tensor) and not is_loop(node):
                assert found.stride() == node.meta["val"].stride(), node
                seen += 1
            return found

    Noted(module).run(*inputs)
    for loop in loops(module):
        body = getattr(module, loop.args[1].target)
        read = [n.meta["val"] for n in (*loop.args[2], *loop.args[3])]
        noted = [n.meta["val"] for n in body.graph.find_nodes(op="placeholder")]
        assert [v.stride() for v in read] == [v.stride() for v in noted]
    return seen
