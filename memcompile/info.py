"""What a draft needs of one node, read once."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Mapping
from typing import cast

from torch import fx

from memcompile import scratch
from memcompile.access import access
from memcompile.analysis import ops as op_kinds
from memcompile.analysis.cost import Rates, node_seconds
from memcompile.analysis.timeline import Kind, Op
from memcompile.step import GROUP, OVER, Step, hint, is_reshaped, tensor_size, tensors


@dataclasses.dataclass(slots=True)
class Info:
    """One node, as the timeline sees it."""

    inputs: tuple[fx.Node, ...]  #: roots it reads
    kind: Kind
    bytes: int
    seconds: float
    heavy: bool
    drawn: bool
    work: int = 0
    reshaped: frozenset[int] = frozenset()  #: places in ``inputs``
    moved: frozenset[int] = frozenset()  #: likewise
    breaks: frozenset[int] = frozenset()
    over: tuple[int, ...] = ()  #: places in ``inputs`` of what a loop writes over, if it dies there
    group: str = ""  #: of a loop and what it gives: whose buffers it fills
    plain: bool = dataclasses.field(init=False)  #: nothing is to be said of its inputs

    def __post_init__(self) -> None:
        self.plain = not (self.reshaped or self.moved or self.over or self.group)

    def op(self, node: fx.Node, inputs: tuple[int, ...], keep: bool = False) -> Op:
        """The node's op, reading what stands at the places ``inputs``."""
        if self.plain:
            return Op(
                node, self.kind, inputs, self.bytes, self.seconds, self.heavy, self.drawn, keep,
                True, self.work, 0, (), (), self.breaks,
            )  # fmt: skip
        return Op(
            node, self.kind, inputs, self.bytes, self.seconds, self.heavy, self.drawn, keep,
            work=self.work,
            reshaped=tuple([inputs[k] for k in self.reshaped]) if self.reshaped else (),
            moved=tuple([inputs[k] for k in self.moved]) if self.moved else (),
            breaks=self.breaks,
            over=tuple([inputs[k] for k in self.over]) if self.over else (),
            group=self.group,
        )  # fmt: skip


def read_step(
    step: Step, rates: Rates, fused: bool, like: Mapping[fx.Node, Info] | None = None
) -> dict[fx.Node, Info]:
    """What a step's nodes are to its draft, but for the output.

    Args:
        step: the step.
        rates: what the device can do.
        fused: whether the lowering fuses.
        like: of a step that this one was copied from, at the same rates: what was read there of
            a node whose inputs were copied, too, holds here.
    """
    nodes = [node for node in step.nodes if node.op != "output"]
    named = {node.name: node for node in like or ()}
    copies = {n: o for n in nodes if (o := named.get(n.name)) is not None and _is_copy(n, o)}
    copied = {old: node for node, old in copies.items()}
    found: dict[fx.Node, Info] = {}
    for node in nodes:
        old = copies.get(node)
        if like is not None and old is not None and node.meta.get("loop") is old.meta.get("loop"):
            inputs = _roots(step, _read(node))
            same = [copied.get(a) for a in old.all_input_nodes] == node.all_input_nodes
            if same and [copied.get(i) for i in like[old].inputs] == inputs:
                found[node] = dataclasses.replace(like[old], inputs=tuple(inputs))
                continue
        found[node] = read_node(step, node, rates, fused)
    return found


def _is_copy(node: fx.Node, old: fx.Node) -> bool:
    """Whether a node was copied from the other: their values are one object."""
    value = node.meta.get("val")
    return value is not None and value is old.meta.get("val") and node.target == old.target


def _read(node: fx.Node) -> list[fx.Node]:
    """The tensors a node reads; one of an op's outputs reads what the op reads."""
    read = [a for a in node.all_input_nodes if tensors(a)]
    if op_kinds.classify(node) == Kind.PART:
        base = node.args[0]
        assert isinstance(base, fx.Node)
        read += [a for a in base.all_input_nodes if tensors(a)]
    return read


def _roots(step: Step, read: list[fx.Node]) -> list[fx.Node]:
    """Where they live, each storage once."""
    return list(dict.fromkeys(step.roots[node] for node in read))


def read_node(step: Step, node: fx.Node, rates: Rates, fused: bool) -> Info:
    """What a step's node is to its draft; ``fused``: whether the lowering fuses."""
    roots = step.roots
    kind = op_kinds.classify(node)
    if not fused and kind in (Kind.POINTWISE, Kind.REDUCTION):
        kind = Kind.EXTERN
    read = _read(node)
    inputs = _roots(step, read)
    loop = node.meta.get("loop")
    over, group = _over(step, node, inputs)
    if loop is not None:
        return Info(
            tuple(inputs), kind, 0, loop.seconds, False, False, loop.bytes, over=over, group=group
        )
    if fused and op_kinds.op_name(node) in op_kinds.SCATTER:
        into = roots[cast(fx.Node, node.args[0])]
        over = (inputs.index(into),) if step.bytes(into) == step.bytes(node) else ()
    straight = {roots[a] for a in read if not is_reshaped(a)}
    walk = access(node)
    moved = {roots[a] for a in walk.moved}
    several = isinstance(node.meta.get("val"), (list, tuple))
    view = roots[node] is not node
    return Info(
        tuple(inputs),
        kind,
        0 if several or view else step.bytes(node),
        0.0 if kind == Kind.SOURCE or view else _seconds(node, rates),
        op_kinds.op_name(node) in op_kinds.HEAVY,
        _is_drawn(node, fused),
        _work(node, several) if fused and kind == Kind.EXTERN else 0,
        reshaped=frozenset(k for k, root in enumerate(inputs) if root not in straight),
        moved=frozenset(k for k, root in enumerate(inputs) if root in moved),
        breaks=walk.breaks,
        over=over,
        group=group,
    )


def _over(step: Step, node: fx.Node, inputs: list[fx.Node]) -> tuple[tuple[int, ...], str]:
    """Where in ``inputs`` stands what a loop, or one output of it, may be written over."""
    loop = node.args[0] if node.target is operator.getitem else node
    if not isinstance(loop, fx.Node) or "loop" not in loop.meta:
        return (), ""
    group, over, given = loop.meta[GROUP], loop.meta[OVER], loop.args[3]
    if loop is not node:
        number = node.args[1]
        over = {n: at for n, at in over.items() if n + 1 == number}
    values = [given[at] for at in over.values()]
    own = (v for v in values if step.roots[v] is v and v.op == "call_function")
    return tuple(inputs.index(v) for v in own), group


def read_fragment(step: Step, node: fx.Node, rates: Rates, fused: bool) -> Info:
    """Like :func:`read_node` for a node of a rebuild graph that is not a view."""
    return Info(
        (),
        op_kinds.classify(node),
        step.bytes(node),
        node_seconds(node, rates, materialised=False),
        op_kinds.op_name(node) in op_kinds.HEAVY,
        _is_drawn(node, fused),
    )


def _work(node: fx.Node, several: bool) -> int:
    """Bytes alive inside a library op beside what it reads and, where it is one, its result."""
    inside = scratch.of_node(node)
    return (
        inside + sum(hint(tensor_size(t)) for t in tensors(node)) if inside and several else inside
    )


def _seconds(node: fx.Node, rates: Rates) -> float:
    """Seconds of the node's arithmetic, noted on it: copies of a graph are drafted many times."""
    what = rates, node.target, [tuple(t.shape) for t in tensors(node)]
    noted = node.meta.get("seconds")
    if noted is None or noted[0] != what:  # what is made after another node may have its notes
        noted = node.meta["seconds"] = what, node_seconds(node, rates, materialised=False)
    return float(noted[1])


def _is_drawn(node: fx.Node, fused: bool) -> bool:
    return fused and op_kinds.op_name(node) in op_kinds.DRAWN
