"""What is kept from the forward to the backward, in 16 bits.

A value that the backward reads and that can not be had again from 16-bit values is rounded once,
and its late readers read that: of a layer norm the normalised rows, of a softmax the
probabilities that the next product reads anyway. Early readers keep fp32, so the forward is
that of the casts alone. What of it the backward needs (a norm's output, for a weight's gradient) is
made again from the rounded values, where their error only passes through. Casts of inputs and
other copies of them (a conjugate) are bound to be made again: no second copy of a parameter is kept
(pytorch #133637), nor an upcast beside what it is of (pytorch #188955).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from memcompile_passes.cast.casting import Casting, computed, inherited, is_float32
from memcompile_passes.cast.copies import merge_copies
from memcompile_passes.cast.islands import is_clear, tensor
from memcompile_passes.cast.rules import COPIES, GENTLE, GENTLE_POWERS, MOVED, SHARP
from torch import fx
from torch.utils.checkpoint import CheckpointPolicy

from memcompile.analysis.ops import classify, is_random, op_name
from memcompile.analysis.timeline import Kind
from memcompile.step import Step, hint

aten = torch.ops.aten
#: Values of fewer elements are kept as they are: statistics, scalars.
LEAST = 256
#: A reduction to a share of at most one in so many elements gives statistics.
SMALL = 8

Leaves = frozenset[fx.Node] | None


class Stored:
    """The early values of one step that late nodes read."""

    def __init__(
        self,
        casting: Casting,
        step: Step,
        kept: frozenset[str] = frozenset(),
    ) -> None:
        self.casting, self.step, self.kept = casting, step, kept
        self.late = late_nodes(step)
        self.written = step.overwritten  #: asked before any node is gone
        self.rounded: set[fx.Node] = set()  #: fp32 values that late nodes read in 16 bits
        self.soft: set[fx.Node] = set()  #: values that would be made of those
        self.leaves: dict[fx.Node, Leaves] = {}  #: 16-bit values that a value can be made of
        self.statistics: set[fx.Node] = set()
        self.settled = False  #: whether all that is rounded is known
        self.again: dict[fx.Node, fx.Node] = {}  #: what late nodes read instead

    def rewrite(self) -> None:
        """Round what is kept, and bind what is not to be."""
        self.late = merge_copies(self.step, self.late)
        self._read_moved()
        for node in list(self.step.graph.nodes):
            if node.op == "output" or node in self.late:
                continue
            self.leaves[node] = self._leaves(node)
            if self._is_kept_whole(node):
                continue
            if not self._follows(node):
                self.rounded.add(node)
                self.leaves[node] = frozenset([node])
        self.settled = True
        for node in list(self.step.graph.nodes):
            if node in self.late:
                node.args, node.kwargs = fx.node.map_arg(
                    (node.args, node.kwargs), lambda read, at=node: self._late(read, at)
                )
        self._bind()

    # -- which values ---------------------------------------------------------------------

    def _leaves(self, node: fx.Node) -> Leaves:
        """The 16-bit values that ``node`` follows from elementwise; ``None`` where it does not."""
        value, casting = tensor(node), self.casting
        nothing: Leaves = frozenset()
        if node.op != "call_function" or value is None or not value.is_floating_point():
            return nothing
        if self._is_statistic(node):
            self.statistics.add(node)
            return nothing
        if node in casting.natural:
            return self.leaves[node.args[0]]
        made = classify(node) in (Kind.EXTERN, Kind.PART) and not is_clear(node)
        if made and value.dtype == casting.dtype:
            return frozenset([node])
        if is_random(node) or not (is_clear(node) or classify(node) == Kind.POINTWISE):
            return None
        found: set[fx.Node] = set()
        items = op_name(node) == "getitem"
        for read in node.args[0].all_input_nodes if items else node.all_input_nodes:
            leaves = self.leaves.get(read)
            if leaves is None:
                return None
            found |= leaves
            if read in self.rounded or read in self.soft:
                if not _is_gentle(node):
                    return None
                self.soft.add(node)
        return frozenset(found)

    def _is_statistic(self, node: fx.Node) -> bool:
        """A reduction to less, or what is made of such."""
        kind, value = classify(node), tensor(node)
        read = [n for n in node.all_input_nodes if tensor(n) is not None]
        if op_name(node) == "getitem" or value is None:
            return kind == Kind.REDUCTION and value is not None and _is_small(node, node.args[0])
        if kind == Kind.REDUCTION:
            return _is_small(node, node)
        floating = [n for n in read if n.op == "call_function" and is_float32(n)]
        made = bool(floating) and all(n in self.statistics for n in floating)
        return made and (kind == Kind.POINTWISE or is_clear(node))

    def _is_kept_whole(self, node: fx.Node) -> bool:
        """Whether late readers go on reading the value as it is."""
        if not is_float32(node) or node.op != "call_function" or node in self.statistics:
            return True
        if node in self.casting.natural or hint(node.meta["val"].numel()) < LEAST:
            return True
        readers = [user for user in node.users if user in self.late]
        if not readers or node.name in self.kept or node.meta.get("recompute") is not None:
            return True
        if self.casting.dtype == torch.float16 and node not in self.casting.low:
            return True  # fp16 has not the range of a residual stream
        return any(_is_sharp(user, node) for user in readers)

    def _follows(self, node: fx.Node) -> bool:
        """Whether the value is had again, elementwise, from 16-bit values that are kept anyway."""
        leaves = self.leaves[node]
        if leaves is None:
            return False
        return all(self._is_kept_anyway(leaf) for leaf in leaves)

    def _is_kept_anyway(self, leaf: fx.Node) -> bool:
        if leaf in self.rounded:
            return True
        todo = [leaf]
        while todo:
            for user in todo.pop().users:
                if user in self.late:
                    return True
                alone = self.leaves.get(user) == frozenset([leaf]) and is_float32(user)
                moved = user in self.casting.natural or op_name(user) in MOVED
                if moved or (alone and self.settled):
                    todo.append(user)
        return False

    # -- what late nodes read ----------------------------------------------------------------

    def _late(self, node: fx.Node, reader: fx.Node) -> fx.Node:
        """What a late reader reads for ``node``, made before the first that does."""
        if node in self.late or node.op != "call_function":
            return node
        if node not in self.again:
            self.again[node] = self._made_late(node, reader)
        return self.again[node]

    def _made_late(self, node: fx.Node, reader: fx.Node) -> fx.Node:
        casting = self.casting
        if node in self.rounded:
            low = casting.down(node, reader)
            up = casting.up(low, before=reader)
            up.meta.update(partitioner_tag="is_backward")
            return up
        if node not in self.soft or not self._follows(node) or self._is_rounding(node):
            return node
        read = {n: self._late(n, reader) for n in node.all_input_nodes}
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), read.__getitem__)
        with self.step.graph.inserting_before(reader):
            new = self.step.graph.create_node(
                "call_function", node.target, args, kwargs, name=f"{node.name}_again"
            )
        new.meta = inherited(node) | {
            "val": computed(node.target, args, kwargs), "partitioner_tag": "is_backward"
        }  # fmt: skip
        return new

    def _is_rounding(self, node: fx.Node) -> bool:
        """Whether the node is what a rounded value is kept as."""
        source = node.all_input_nodes[0] if node.all_input_nodes else None
        return source in self.rounded and self.casting.low.get(source) is node

    def _bind(self) -> None:
        """Copies of inputs, upcasts, and casts of what follows from what is kept: made again."""
        for copy in self._copies():
            copy.meta["recompute"] = CheckpointPolicy.MUST_RECOMPUTE
        order = {node: place for place, node in enumerate(self.step.graph.nodes)}
        lows = [low for node, low in self.casting.low.items() if node not in self.casting.natural]
        made = sorted((low for low in lows if low in order), key=order.__getitem__, reverse=True)
        read: set[fx.Node] = set()
        for cast in made:
            if any(user in self.late or user in read for user in cast.users):
                read.add(cast)
                if cast in self.leaves and cast not in self.soft and self._follows(cast):
                    cast.meta["recompute"] = CheckpointPolicy.MUST_RECOMPUTE
        for up in self.casting.natural:
            if any(user in self.late for user in up.users) and up not in self.late:
                up.meta["recompute"] = CheckpointPolicy.MUST_RECOMPUTE

    def _copies(self) -> Iterator[fx.Node]:
        """What is made of inputs that are there anyway, and holds no more than they do."""
        apart = {*self.written, *self.step.tangents}
        known = {n for n in self.step.graph.find_nodes(op="placeholder") if n not in apart}
        for node in self.step.graph.nodes:
            read = [n for n in node.all_input_nodes if tensor(n) is not None]
            copies = node in self.casting.of_inputs or op_name(node) in COPIES
            if read and copies and known.issuperset(read):
                known.add(node)
                if not any(user.op == "output" for user in node.users):
                    yield node

    def _read_moved(self) -> None:
        """What late nodes alone read in fp32, and the forward has in 16 bits: read from there."""
        for node, low in list(self.casting.low.items()):
            only_late = node in self.late and low not in self.late
            if only_late and node.users and node not in self.casting.natural:
                up = self.casting.up(low, after=low)
                self.casting.natural[up] = low
                node.replace_all_uses_with(up)
                self.step.graph.erase_node(node)


def late_nodes(step: Step) -> frozenset[fx.Node]:
    """All that the forward does not need: what hangs on tangents, and what only that reads."""
    early = step.sides.early
    (output,) = step.graph.find_nodes(op="output")
    todo = [n for n in output.all_input_nodes if n in early]
    todo += [n for n in early if n.op == "call_function" and n.is_impure()]
    needed: set[fx.Node] = set()
    while todo:
        node = todo.pop()
        if node not in needed:
            needed.add(node)
            todo += node.all_input_nodes
    if not step.tangents:
        return frozenset()
    return frozenset(n for n in step.nodes if n.op == "call_function" and n not in needed)


def _is_small(node: fx.Node, reads: fx.Node) -> bool:
    """Whether a node has far fewer elements than what ``reads`` reads."""
    sizes = [hint(value.numel()) for n in reads.all_input_nodes if (value := tensor(n)) is not None]
    return SMALL * hint(node.meta["val"].numel()) <= max(sizes, default=0)


def _is_gentle(node: fx.Node) -> bool:
    name = op_name(node)
    if name == "pow":
        return node.args[1] in GENTLE_POWERS
    if name == "div":
        return not isinstance(node.args[1], fx.Node)
    return name in GENTLE or is_clear(node)


def _is_sharp(reader: fx.Node, node: fx.Node) -> bool:
    """Whether an error of ``node`` would grow in what reads it."""
    if op_name(reader) == "div":
        return node in reader.args[1:2]
    return op_name(reader) in SHARP and not _is_gentle(reader)
