"""Heads of a loss: their gradient taken in the forward.

A backward is linear in its tangents. Where the late side of a region hangs on one 0-dim
number alone, as under a mean loss, all it gives is that number times what it gives for one.
That can be computed early, in the loop that makes the loss, and multiplied late: what is
large is neither kept nor made twice.

Linearity is read off the graph, op by op; an op that is not known to be linear ends it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterator
from typing import Any

import torch
from torch import fx

from memcompile import _torch, between, region
from memcompile.analysis.ops import op_name
from memcompile.analysis.rules import tensor_args
from memcompile.border import Border, widened
from memcompile.region import Region
from memcompile.step import Step, tensors

aten = torch.ops.aten

#: Nodes that may stand between the number and the region: further up is no head.
BETWEEN = 50
#: What has the range that gradients of a loss without its scale need; float16 has not.
WIDE = frozenset({torch.float32, torch.float64, torch.bfloat16})


@dataclasses.dataclass(frozen=True)
class Form:
    """One way to run a region as loops: the step it is taken from, and the region in it."""

    step: Step
    region: Region

    def settled(self) -> Form:
        """The same, every value given once."""
        return Form(self.step, region.given_once(self.step, self.region))


def forms(step: Step, seed: fx.Node, dim: int, kept: Collection[fx.Node] = ()) -> Iterator[Form]:
    """The region around ``seed``: as a loop a side, and as one with its gradients early.

    Args:
        step: the step.
        seed: a large value.
        dim: the dimension to slice it along.
        kept: roots that are saved for the backward, whoever reads them.
    """
    found = region.find(step, seed, dim)
    layer = between.find(step, seed, dim, kept) if kept else None
    if found is None:
        if layer is not None:
            yield Form(*layer).settled()
        return
    yield Form(step, found).settled()
    wide = widened(step, found, () if step.sides.late else kept)
    if wide is not None or layer is not None:
        others = [Form(step, wide)] if wide else []
        others += [Form(*layer)] if layer else []
        yield min(others, key=lambda form: _crossing(form, kept)).settled()
    for module in early_gradients(step, found):
        other = step.anew(module)
        (same,) = (n for n in other.nodes if n.name == seed.name)
        whole = region.find(other, same, dim)
        if whole is not None and whole.late is None:
            yield Form(other, whole).settled()
            return


def _crossing(form: Form, kept: Collection[fx.Node]) -> int:
    """Bytes that cross the region's border and are not kept anyway."""
    names = {node.name for node in kept}
    border = Border(form.step, form.region, [n for n in form.step.nodes if n.name in names])
    return border.crossing(form.region)


def early_gradients(step: Step, found: Region) -> Iterator[fx.GraphModule]:
    """Copies of the joint graph in which the region's late nodes are early.

    One for each number that they can be taken without, the one nearest the tangents first.
    """
    if found.late is None:
        return
    late = [n for n in found.late.nodes if n in step.sides.late]
    for number in _numbers(step, late):
        linear = _linear_between(step, number, late)
        if linear is not None:
            yield _Writer(step, number, linear, frozenset(late)).write()


# -- what may be done -----------------------------------------------------------------------


def _numbers(step: Step, late: list[fx.Node]) -> list[fx.Node]:
    """0-dim late values that all the way from the tangents to ``late`` goes through, in order."""
    inside = set(late)
    above = [n for n in _above(step, late, None) if n not in inside]
    found = []
    for node in above:
        value = node.meta.get("val")
        if not isinstance(value, torch.Tensor) or value.dim() or value.dtype not in WIDE:
            continue
        others = _above(step, late, node)
        if not any(_starts(step, n) for n in others):
            found.append(node)
    return found


def _starts(step: Step, node: fx.Node) -> bool:
    """Whether a late node is late by itself: a tangent, or bound to the backward."""
    return not any(a in step.sides.late for a in node.all_input_nodes)


def _above(step: Step, late: list[fx.Node], without: fx.Node | None) -> list[fx.Node]:
    """``late`` and the late nodes it is computed from, but for ``without`` and what is above."""
    seen: set[fx.Node] = set()
    stack = list(late)
    while stack:
        node = stack.pop()
        if node in seen or node is without or node not in step.sides.late:
            continue
        seen.add(node)
        stack.extend(node.all_input_nodes)
    return sorted(seen, key=step.order.__getitem__)


def _linear_between(step: Step, number: fx.Node, late: list[fx.Node]) -> frozenset[fx.Node] | None:
    """The nodes from ``number`` to ``late``; ``None`` unless each is linear in it."""
    linear, nodes = {number}, _above(step, late, number)
    if len(nodes) > len(late) + BETWEEN:
        return None
    for node in nodes:
        if not _is_linear(node, linear):
            return None
        linear.add(node)
    return frozenset(linear - {number})


def _is_linear(node: fx.Node, linear: set[fx.Node]) -> bool:
    """Whether a node is linear in the number that all of ``linear`` are linear in."""
    target, value = node.target, node.meta.get("val")
    if not isinstance(target, _torch.OpOverload) or target.namespace not in ("aten", "prims"):
        return False
    if not isinstance(value, torch.Tensor) or value.dtype not in WIDE:
        return False
    if any(isinstance(a, torch.dtype) for a in node.args) and op_name(node) == "view":
        return False  # the same bits as another type
    rule = LINEAR.get(op_name(node))
    return rule is not None and rule(node, linear)


def _one(node: fx.Node, linear: set[fx.Node]) -> bool:
    """One tensor argument, the first."""
    return tensor_args(node) == [node.args[0]] and node.args[0] in linear


def _first(node: fx.Node, linear: set[fx.Node]) -> bool:
    """Linear in the first argument, whatever the others are."""
    return [a in linear for a in tensor_args(node)].count(True) == 1 and node.args[0] in linear


def _quotient(node: fx.Node, linear: set[fx.Node]) -> bool:
    return _first(node, linear) and node.kwargs.get("rounding_mode") is None


def _product(node: fx.Node, linear: set[fx.Node]) -> bool:
    """Linear in each of two factors: exactly one may be."""
    return [a in linear for a in node.args[:2]].count(True) == 1


def _sum(node: fx.Node, linear: set[fx.Node]) -> bool:
    """Both terms are, or are nothing."""
    return all(_is_term(a, linear) for a in node.args[:2])


def _choice(node: fx.Node, linear: set[fx.Node]) -> bool:
    """``where``: both branches are, or are nothing."""
    condition, *branches = node.args
    return condition not in linear and all(_is_term(b, linear) for b in branches)


def _filled(node: fx.Node, linear: set[fx.Node]) -> bool:
    return _first(node, linear) and _is_nothing(node.args[2])


def _padded(node: fx.Node, linear: set[fx.Node]) -> bool:
    return _one(node, linear) and (len(node.args) < 3 or _is_nothing(node.args[2]))


def _written_into(node: fx.Node, linear: set[fx.Node]) -> bool:
    """``slice_scatter`` and ``select_scatter``."""
    return all(_is_term(a, linear) for a in node.args[:2])


def _scattered(node: fx.Node, linear: set[fx.Node]) -> bool:
    """``scatter_add(self, dim, index, source)``."""
    base, _, index, source = node.args
    return index not in linear and _is_term(base, linear) and source in linear


def _is_term(value: Any, linear: set[fx.Node]) -> bool:
    return _is_nothing(value) or value in linear


def _is_nothing(value: Any) -> bool:
    """Zero, or a tensor of zeros that the graph makes of a number."""
    if not isinstance(value, fx.Node):
        return isinstance(value, (int, float)) and value == 0
    name = op_name(value)
    if name in ("full", "scalar_tensor"):
        fill = value.args[1 if name == "full" else 0]
        return isinstance(fill, (int, float)) and fill == 0
    through = ("view", "expand", "permute", "unsqueeze", "convert_element_type", "alias")
    return name in through and _is_nothing(value.args[0])


_UNARY = frozenset(
    """
    neg sum mean clone alias convert_element_type view _unsafe_view reshape expand permute t
    transpose squeeze unsqueeze slice select flip roll
    """.split()  # noqa: SIM905
)

Rule = Callable[[fx.Node, set[fx.Node]], bool]

#: Ops by name, and in what they are linear. Nothing else is taken to be.
LINEAR: dict[str, Rule] = {
    **dict.fromkeys(_UNARY, _one),
    "mul": _product,
    "mm": _product,
    "bmm": _product,
    "div": _quotient,
    "gather": _first,
    "embedding_dense_backward": _first,
    "add": _sum,
    "sub": _sum,
    "where": _choice,
    "masked_fill": _filled,
    "constant_pad_nd": _padded,
    "slice_scatter": _written_into,
    "select_scatter": _written_into,
    "scatter_add": _scattered,
}


# -- writing it -----------------------------------------------------------------------------


class _Writer:
    """Writes the joint graph with some late nodes early.

    Args:
        step: the step.
        number: what is taken to be one.
        linear: the nodes from it to the region, those of the region included.
        late: the region's late nodes, of which there is no other copy.
    """

    def __init__(
        self, step: Step, number: fx.Node, linear: frozenset[fx.Node], late: frozenset[fx.Node]
    ) -> None:
        self.step, self.number, self.linear, self.late = step, number, linear, late
        self.graph = fx.Graph()
        self.env: dict[fx.Node, fx.Node] = {}  #: as they are in the step
        self.early: dict[fx.Node, fx.Node] = {}  #: for a number of one

    def write(self) -> fx.GraphModule:
        """The new joint graph; what is not late any more keeps its name."""
        for node in self.step.nodes:
            if node not in self.late:
                self.env[node] = self.graph.node_copy(node, self._read)
            if node is self.number:
                one = self._call(
                    aten.full.default, ([], 1.0), node, f"{node.name}_one", **_options(node)
                )
                one.meta.pop("partitioner_tag", None)
                self.early[node] = one
            elif node in self.linear:
                self.early[node] = self._copy_early(node)
        module = _torch.LazyGraphModule(self.step.module, self.graph)
        module.meta.update(self.step.module.meta)
        module.graph.eliminate_dead_code()
        module.recompile()
        return module

    def _copy_early(self, node: fx.Node) -> fx.Node:
        args, kwargs = fx.node.map_arg(
            (node.args, node.kwargs), lambda a: self.early.get(a) or self.env[a]
        )
        # The name of what there is another copy of is that one's; a number more is another node's.
        name = node.name if node in self.late else f"{node.name}_early"
        new = self.graph.create_node(node.op, node.target, args, kwargs, name)
        new.meta = {k: v for k, v in node.meta.items() if k not in ("partitioner_tag", "recompute")}
        return new

    def _read(self, node: fx.Node) -> fx.Node:
        """What a reader outside the region reads; of its late nodes, the scaled value."""
        if node not in self.env:
            early = self.early[node]
            early.meta["recompute"] = _torch.CheckpointPolicy.MUST_SAVE
            name = f"{node.name}_scaled"
            scaled = self._call(aten.mul.Tensor, (early, self.env[self.number]), node, name)
            dtype = node.meta["val"].dtype
            if scaled.meta["val"].dtype != dtype:
                convert = torch.ops.prims.convert_element_type.default
                scaled = self._call(convert, (scaled, dtype), node, f"{name}_back")
            self.env[node] = scaled
        return self.env[node]

    def _call(
        self, target: Any, args: tuple[Any, ...], like: fx.Node, name: str, **kwargs: Any
    ) -> fx.Node:
        new = self.graph.create_node("call_function", target, args, kwargs, name)
        new.meta = {k: v for k, v in like.meta.items() if k != "recompute"}
        values = fx.node.map_arg(args, lambda n: n.meta["val"])
        with _torch.detect_fake_mode(tensors(like)):
            new.meta["val"] = target(*values, **kwargs)
        return new


def _options(node: fx.Node) -> dict[str, Any]:
    (value,) = tensors(node)
    return {
        "dtype": value.dtype,
        "layout": torch.strided,
        "device": value.device,
        "pin_memory": False,
    }
