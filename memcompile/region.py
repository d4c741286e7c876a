"""The part of a step that one loop runs chunk by chunk.

It grows from a large value: everything that makes or reads a value of that order, sliced
along the same dimension, on both sides of the step. What remains at its border is small,
or whole, or added up.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Collection
from typing import Any

import torch
from torch import fx

from memcompile.analysis.flow import Rules, rules_for
from memcompile.analysis.ops import is_random, runs_twice
from memcompile.analysis.rules import Flow, Merged, Place, dim_of, is_sliced, tensor_args
from memcompile.lengths import ratio
from memcompile.step import Step, hint, is_view, must_save, tensors, view_base

#: A value is of the seed's order from this share of its elements on: the first that gives a region.
LARGE = (0.5, 0.75)
#: Nodes a region may hold.
LARGEST = 400


@dataclasses.dataclass
class Part:
    """One side of a region, in the step's order."""

    nodes: list[fx.Node]
    inputs: dict[
        fx.Node, set[Place]
    ]  #: read from outside: sliced along a dimension, whole, or both
    outputs: list[fx.Node]  #: read outside, or returned


@dataclasses.dataclass
class Region:
    """What the loops of one seed hold."""

    seed: fx.Node
    dim: int
    size: Any  #: of the sliced dimension, an ``int`` or a ``SymInt``
    places: dict[fx.Node, Place]  #: of every node of the region
    reads: dict[fx.Node, tuple[Place, ...]]  #: how each one reads its tensor arguments
    early: Part
    late: Part | None  #: ``None`` where nothing late reads the interior
    again: frozenset[fx.Node] = frozenset()  #: nodes that run outside too, for others

    @property
    def length(self) -> int:
        """Of the sliced dimension, in this trace."""
        return hint(self.size)


def find(step: Step, seed: fx.Node, dim: int) -> Region | None:
    """The region around ``seed`` sliced along ``dim``; ``None`` where there is none."""
    values = tensors(step.numbered(seed))
    length = values[0].shape[dim] if values else None
    if not isinstance(length, int) or length < 2:
        return None
    for large in LARGE:
        growth = _Growth(step, seed, dim, rules_for(length), large)
        if growth.grow():
            return growth.region()
    return None


# -- what growing in any manner takes ----------------------------------------------------------


def note(
    node: fx.Node,
    flow: Flow,
    places: dict[fx.Node, Place],
    reads: dict[fx.Node, tuple[Place, ...]],
) -> list[fx.Node]:
    """Note how a node that is taken in runs; the node, and the items of what it gives."""
    reads[node], places[node] = flow.inputs, flow.outputs[0]
    taken = [node]
    if isinstance(node.meta["val"], (list, tuple)):
        for user in node.users:
            number = user.args[1]
            assert isinstance(number, int)
            places[user] = flow.outputs[number]
            reads[user] = tuple(places[node] for _ in tensor_args(user))
            taken.append(user)
    return taken


def fits_readers(node: fx.Node, flow: Flow, reads: dict[fx.Node, tuple[Place, ...]]) -> bool:
    """Whether what reads the node in the region reads it as the flow gives it."""
    if isinstance(node.meta["val"], (list, tuple)):
        given = [(user, flow.outputs[user.args[1]]) for user in node.users]
    else:
        given = [(node, flow.outputs[0])]
    for value, place in given:
        for user in value.users:
            read = zip(tensor_args(user), reads.get(user, ()), strict=False)
            if any(a is value and p != place for a, p in read):
                return False
    return True


def seen_from(step: Step, places: dict[fx.Node, Place], reader: fx.Node, node: fx.Node) -> Place:
    """Where a value is for its reader: a sum of the forward's loop is whole to the backward."""
    place, (early, late) = places.get(node), (step.sides.early, step.sides.late)
    return None if isinstance(place, str) and node in early and reader in late else place


def lying_between(step: Step, side: Collection[fx.Node], ends: set[fx.Node]) -> set[fx.Node]:
    """Nodes of a side that one of ``ends`` leads to and that lead to one, but for the ends."""
    after: set[fx.Node] = set()
    outside = [node for node in step.nodes if node in side and node not in ends]
    for node in outside:
        if any(a in ends or a in after for a in node.all_input_nodes):
            after.add(node)
    before: set[fx.Node] = set()
    for node in reversed(outside):
        if any(u in ends or u in before for u in node.users):
            before.add(node)
    return after & before


def may_run_again(step: Step, node: fx.Node) -> bool:
    """Whether a value may be made in a loop and outside it."""
    source = node.args[0] if node.target is operator.getitem else node
    assert isinstance(source, fx.Node)
    fixed = must_save(node) or is_random(source) or step.reads_overwritten(source)
    return runs_twice(source) and not fixed


def elements(node: fx.Node) -> int:
    """How many numbers a node's tensors hold, at hinted sizes."""
    return sum(hint(t.numel()) for t in tensors(node))


def _needed(nodes: list[fx.Node], outputs: list[fx.Node]) -> list[fx.Node]:
    """Those of ``nodes`` that the outputs are computed from."""
    inside, needed = set(nodes), set()
    stack = list(outputs)
    while stack:
        node = stack.pop()
        if node not in needed and node in inside:
            needed.add(node)
            stack.extend(node.all_input_nodes)
    return [n for n in nodes if n in needed]


class _Growth:
    def __init__(self, step: Step, seed: fx.Node, dim: int, rules: Rules, large: float) -> None:
        self.step, self.seed, self.dim, self.rules = step, seed, dim, rules
        self.least = large * elements(step.roots[seed])
        self.places: dict[fx.Node, Place] = {}
        self.reads: dict[fx.Node, tuple[Place, ...]] = {}

    # -- growing --------------------------------------------------------------------------

    def grow(self) -> bool:
        """Whether every value of the seed's order that hangs together can be sliced."""
        if not self._make(self.seed, self.dim):
            return False
        done: set[fx.Node] = set()
        while True:
            todo = [n for n in self.places if n not in done]
            if not todo:
                if not self._close():
                    return False
                if all(n in done for n in self.places):
                    return True
                continue
            for node in todo:
                done.add(node)
                if len(self.places) > LARGEST or not self._around(node):
                    return False

    def _around(self, node: fx.Node) -> bool:
        """What makes the node's large operands and what reads its large result belong too."""
        for argument, place in zip(tensor_args(node), self.reads[node], strict=True):
            if argument in self.places:
                if place != seen_from(self.step, self.places, node, argument):
                    return False
            elif self._belongs(argument) and is_sliced(place):
                if not self._make(argument, place):
                    return False
            elif self._is_large(argument) and argument.op == "call_function":
                return False  # large, and needed whole
        if not self._is_large(node):
            return True
        place = self.places[node]
        if not is_sliced(place):
            return False
        return all(u.op == "output" or u in self.places or self._read(u) for u in node.users)

    def _is_large(self, node: fx.Node) -> bool:
        root = self.step.roots[node]
        return root.op == "call_function" and elements(root) >= self.least

    def _belongs(self, node: fx.Node) -> bool:
        """Values of the seed's order, and views that only look like it."""
        if node.op != "call_function":
            return False
        root = self.step.roots[node]
        return self._is_large(node) or self.step.bytes(node) > self.step.bytes(root)

    def _make(self, node: fx.Node, place: Place) -> bool:
        """Take in a node by the slice of it that is wanted."""
        target, output = node, 0
        if node.target is operator.getitem:
            if is_view(node):
                return False
            target, output = node.args[0], node.args[1]
        flow = self.rules.giving(self.step.numbered(target), output, place)
        if flow is None:
            return not self._is_large(node) and is_view(node)
        note(target, flow, self.places, self.reads)
        return self.places.get(node) == place

    def _read(self, node: fx.Node) -> bool:
        """Take in a node by how its operands are sliced."""
        if node.target is operator.getitem:
            return node in self.places
        places = [seen_from(self.step, self.places, node, a) for a in tensor_args(node)]
        if any(isinstance(p, str) for p in places):
            return False
        flow = self.rules.given(self.step.numbered(node), places)
        if flow is None:
            return False
        note(node, flow, self.places, self.reads)
        return True

    def _close(self) -> bool:
        """Take in what lies between two nodes of the region, so that it can run as one."""
        for side in (self.step.sides.early, self.step.sides.late):
            inside = {n for n in self.places if n in side}
            between = lying_between(self.step, side, inside)
            if len(between) > LARGEST:
                return False
            for node in self.step.nodes:
                if node in between and node not in self.places and not self._read(node):
                    return False
        return True

    def region(self) -> Region | None:
        """What was grown, or ``None`` where it cannot run as loops."""
        return assemble(self.step, self.seed, self.dim, self.places, self.reads)


# -- what was found ---------------------------------------------------------------------------


def assemble(
    step: Step,
    seed: fx.Node,
    dim: int,
    places: dict[fx.Node, Place],
    reads: dict[fx.Node, tuple[Place, ...]],
    again: Collection[fx.Node] = (),
) -> Region | None:
    """The two sides of a region; ``None`` where it cannot run as loops.

    Args:
        step: the step.
        seed: the value it was grown from.
        dim: the dimension of it that is sliced.
        places: of every node of the region.
        reads: how each of them reads its tensor arguments.
        again: those of them that also run outside, for others.
    """
    size = _size(step, places, reads)
    if size is None:
        return None
    inside = sorted(places, key=step.order.__getitem__)
    early = [n for n in inside if n in step.sides.early]
    late = [n for n in inside if n in step.sides.late]
    if late and early:
        late = _repeated(step, places, early, late)
    if not early:
        early, late = late, []
    for node in (*early, *late):
        if any(isinstance(p, str) for p in reads[node]):
            return None
    region = Region(seed, dim, size, places, reads, Part([], {}, []), None, frozenset(again))
    one = _part(step, region, early, set(late))
    other = _part(step, region, late, set()) if late else None
    if one is None or (late and other is None):
        return None
    return dataclasses.replace(region, early=one, late=other)


def _size(step: Step, places: dict[fx.Node, Place], reads: dict[fx.Node, tuple[Place, ...]]) -> Any:
    """Of the shortest sliced dimension; a longer one must hold it a whole number of times."""
    sizes: dict[int, dict[str, Any]] = {}
    merged: dict[tuple[int, str], Any] = {}
    for node, given in reads.items():
        pairs = [*zip(tensor_args(node), given, strict=True), (node, places[node])]
        for value, place in pairs:
            dim = dim_of(place)
            if dim is None or not isinstance(value.meta["val"], torch.Tensor):
                continue
            number = step.numbered(value).meta["val"].shape[dim]
            size = value.meta["val"].shape[dim]
            if isinstance(place, Merged):
                merged[number // place.outer, str(size)] = size
            else:
                sizes.setdefault(number, {})[str(size)] = size
    least = min(sizes)
    (size, *_) = sizes[least].values()
    every = [each for same in sizes.values() for each in same.values()]
    if least < 2 or any(ratio(each, size) is None for each in (*every, *merged.values())):
        return None
    return (
        size if all(_turns(number, each, least) for (number, _), each in merged.items()) else None
    )


def _turns(number: int, size: Any, least: int) -> bool:
    """Whether what stands in a dimension behind others is cut evenly, and known how.

    How many others there are is a number at one length alone: of a symbolic dimension it is
    what is left where what is sliced stands there by itself.
    """
    return number % least == 0 if isinstance(size, int) else number == least


def given_once(step: Step, found: Region) -> Region:
    """The region with the views of what it gives taken outside: two of one value are not two."""
    viewed = _viewed_outside(step, found.places, found.again)
    if not viewed:
        return found
    again = found.again | viewed
    new = assemble(step, found.seed, found.dim, found.places, found.reads, again)
    return new if new is not None and (new.late is None) == (found.late is None) else found


def _viewed_outside(
    step: Step, places: dict[fx.Node, Place], again: frozenset[fx.Node]
) -> set[fx.Node]:
    """Views that others read: taken outside, of what the loop gives, which is given once."""
    found: set[fx.Node] = set()
    for node in sorted(places, key=step.order.__getitem__, reverse=True):
        if not is_view(node) or view_base(node) not in places or node in again:
            continue
        same_side = (node in step.sides.late) == (view_base(node) in step.sides.late)
        others = (u not in places or u in again or u in found for u in node.users)
        if same_side and not isinstance(places[node], str) and any(others):
            found.add(node)
    return found


def _repeated(
    step: Step, places: dict[fx.Node, Place], early: list[fx.Node], late: list[fx.Node]
) -> list[fx.Node]:
    """The late nodes and the early ones they need again: the interior is never kept."""
    inside = set(early)
    needed: set[fx.Node] = set()
    stack = [a for n in late for a in n.all_input_nodes if a in inside]
    while stack:
        node = stack.pop()
        if node in needed or places[node] in ("sum", "max", "min"):
            continue
        needed.add(node)
        stack.extend(a for a in node.all_input_nodes if a in inside)
    return sorted((*needed, *late), key=step.order.__getitem__)


def _part(step: Step, region: Region, nodes: list[fx.Node], later: set[fx.Node]) -> Part | None:
    """One side; ``later`` holds the nodes that compute what they need of it again."""
    inside = set(nodes)
    inputs: dict[fx.Node, set[Place]] = {}
    outputs: list[fx.Node] = []
    late = step.sides.late
    ends_late = any(n in late for n in nodes)
    for node in nodes:
        for argument, place in zip(tensor_args(node), region.reads[node], strict=True):
            if argument not in inside:
                inputs.setdefault(argument, set()).add(place)
            elif isinstance(region.places[argument], str):
                return None  # a sum is there only when the loop is over
        if node in region.again or (ends_late and node not in late):
            continue  # run again; the first run's result is there for others
        summed = isinstance(region.places[node], str)
        readers = [u for u in node.users if u not in inside or u in region.again]
        if any(summed or u not in later or u in region.again for u in readers):
            outputs.append(node)
    nodes = _needed(nodes, outputs)
    inside = set(nodes)
    inputs = {n: p for n, p in inputs.items() if not inside.isdisjoint(n.users)}
    for node in outputs:
        if region.places[node] is None or isinstance(node.meta["val"], (list, tuple)):
            return None
    return Part(nodes, inputs, outputs)
