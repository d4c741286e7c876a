"""Planted faults: passes of strangers that lose digits, and models that mind."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any, ClassVar

import torch
from memcompile_passes.compress import Compress
from torch import fx, nn

import memcompile
from memcompile import Codec, Coding, Context, Proposal, Rewrite, Step

aten = torch.ops.aten


def put(graph: fx.Graph, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
    """A node with its fake value."""
    node = graph.call_function(target, args, kwargs)
    given = fx.node.map_arg((args, kwargs), lambda arg: arg.meta["val"])
    node.meta["val"] = target(*given[0], **given[1])
    return node


def to(graph: fx.Graph, value: fx.Node, dtype: torch.dtype) -> fx.Node:
    return put(graph, torch.ops.prims.convert_element_type.default, value, dtype)


@dataclasses.dataclass(frozen=True)
class NaiveVariance(Rewrite):
    """Variances as E[x²] − E[x]², in bf16."""

    name: ClassVar[str] = "naive_variance"
    exactness: ClassVar[Any] = "no"

    def rewrite(self, module: fx.GraphModule, context: Context) -> bool:
        graph, changed = module.graph, False
        for node in list(graph.find_nodes(op="call_function", target=aten.var.correction)):
            if node.name in context.exact:
                continue
            x, dims = node.args
            with graph.inserting_before(node):
                low = to(graph, x, torch.bfloat16)
                mean = put(graph, aten.mean.dim, low, dims, True)
                square = put(graph, aten.mul.Tensor, low, low)
                squares = put(graph, aten.mean.dim, square, dims, True)
                difference = put(
                    graph, aten.sub.Tensor, squares, put(graph, aten.mul.Tensor, mean, mean)
                )
                difference.meta["stack_trace"] = node.meta["stack_trace"]
                wide = to(graph, put(graph, aten.relu.default, difference), torch.float32)
            node.replace_all_uses_with(wide)
            graph.erase_node(node)
            changed = True
        return changed


@dataclasses.dataclass(frozen=True)
class Low(Rewrite):
    """Runs some ops in bf16, each on its own."""

    name: ClassVar[str] = "low"
    exactness: ClassVar[Any] = "no"
    ops: tuple[str, ...] = ("mm", "addmm", "bmm")
    heeds: bool = True  #: what is to stay exact

    def rewrite(self, module: fx.GraphModule, context: Context) -> bool:
        graph, changed = module.graph, False
        for node in list(graph.nodes):
            schema = getattr(node.target, "_schema", None)
            if schema is None or schema.name.split("::")[1] not in self.ops:
                continue
            if node.meta["val"].dtype != torch.float32:
                continue
            if self.heeds and node.name in context.exact:
                continue
            with graph.inserting_before(node):
                node.args = fx.node.map_arg(node.args, lambda arg: self._low(graph, arg))
            node.meta["val"] = node.meta["val"].to(torch.bfloat16)
            with graph.inserting_after(node):
                wide = to(graph, node, torch.float32)
            node.replace_all_uses_with(wide, delete_user_cb=lambda user, own=wide: user is not own)
            changed = True
        return changed

    def _low(self, graph: fx.Graph, value: fx.Node) -> fx.Node:
        if value.meta["val"].dtype != torch.float32:
            return value
        return to(graph, value, torch.bfloat16)


class Unscaled(Codec):
    """Floats in eight bits, as they are: what is small is lost."""

    name: ClassVar[str] = "unscaled"
    exactness: ClassVar[Any] = "no"
    error: ClassVar[float] = 2.0**-3

    def coding(self, value: fx.Node, step: Step) -> Coding | None:
        if value.meta["val"].dtype != torch.float32:
            return None
        return Coding(lambda x: x.to(torch.float8_e5m2), lambda s: s.float(), lambda x: x.numel())


@dataclasses.dataclass(frozen=True)
class Lossy(Compress):
    """The codecs of ``compress``, for what need not stay exact."""

    name: ClassVar[str] = "lossy"

    def propose(self, step: Step, context: Context) -> Iterable[Proposal]:
        moves = super().propose(step, context)
        return [m for m in moves if m.rebuild is None or m.value.name not in context.exact]


class Norm(nn.Module):
    """A layer norm of one's own."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        variance = x.var(-1, keepdim=True, correction=0)  # the variance's line
        return (x - x.mean(-1, keepdim=True)) * torch.rsqrt(variance + 0.01)


def normed() -> nn.Module:
    """Values far from zero, normalised."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(16, 32), Norm(), nn.Dropout(0.2), nn.Linear(32, 8))
    with torch.no_grad():
        model[0].bias.add_(20)
    return model


class Distances(nn.Module):
    """Distances between points near 10³."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gap = x[:, None] - x[None]  # the coordinates' line
        gap = gap * self.weight
        return (gap.square().sum(-1) + 1e-3).sqrt().mean()


def points() -> torch.Tensor:
    return torch.randn(12, 3, generator=torch.Generator().manual_seed(0)) + 1000


def layers(number: int = 4, width: int = 16) -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(
        *(m for _ in range(number) for m in (nn.Linear(width, width), nn.Tanh(), nn.Dropout(0.1)))
    )


class Odd(nn.Module):
    """Several outputs, tied weights, an unused parameter, a part without gradients, buffers."""

    def __init__(self, broken: bool = False) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(8, 8), nn.Linear(8, 8)
        self.two.weight = self.one.weight
        self.unused = nn.Parameter(torch.ones(3))
        self.norm = nn.BatchNorm1d(8)
        self.broken, self.calls = broken, 0

    def forward(self, x: torch.Tensor, more: dict[str, torch.Tensor]) -> Any:
        self.calls += 1
        with torch.no_grad():
            scale = self.one(x).abs().amax()
        y = self.norm(self.one(x) / scale)
        if self.broken:
            torch._dynamo.graph_break()
        z = self.two(y.tanh()) + more["bias"]
        return z, {"mean": z.square().mean(), "best": z.argmax(-1)}


def line(text: str) -> str:
    """``file:line`` of a line of this file."""
    with open(__file__, encoding="utf-8") as file:
        (number,) = [at for at, each in enumerate(file, 1) if f"# {text}" in each]
    return f"fidelity_subjects.py:{number} "


__all__ = [
    "Distances", "Lossy", "Low", "NaiveVariance", "Odd", "Unscaled",
    "layers", "line", "memcompile", "normed", "points",
]  # fmt: skip
