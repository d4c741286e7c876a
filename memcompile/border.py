"""Where a region's border is: moved to where the values that cross it are small.

A region grows from what is large, so that, of attention, it reads three projections and
gives one product. The projections can be made of a slice of what they are projected from,
and the products of gradients with weights added up: then one value crosses, not three.
What is taken in and has other readers is run again inside; only what follows is moved.

What is saved for the backward anyway crosses for nothing, and of two borders that about
as much crosses the one with more readers inside is taken: what a loop has written is never written
over, so a residual that is added outside costs its size once more.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Collection, Iterator

import torch
from torch import fx

from memcompile.analysis.flow import Rules, rules_for
from memcompile.analysis.ops import is_random
from memcompile.analysis.rules import Flow, Place, is_sliced, tensor_args
from memcompile.region import Part, Region, assemble, fits_readers, may_run_again, note
from memcompile.step import Step

#: Nodes that may be taken in.
MOST = 150
#: Borders that differ by less are as good as each other.
ABOUT = 1.01


def widened(step: Step, found: Region, kept: Collection[fx.Node] = ()) -> Region | None:
    """The region with the border at which least bytes cross; ``None`` where it is there already.

    Args:
        step: the step.
        found: a region of it.
        kept: roots that are saved for the backward, whoever reads them.
    """
    return Border(step, found, kept).best()


@dataclasses.dataclass(frozen=True)
class _Take:
    """A node that may be taken in, by the slices it is made of."""

    node: fx.Node
    flow: Flow
    runs_again: bool  #: made in the region for the region's sake, not moved there
    bytes: int  #: that cross the border then and did not before, less those that do no more


class Border:
    """A region whose border is being moved, node by node.

    Args:
        step: the step.
        found: the region to start from.
        kept: roots that are saved for the backward, whoever reads them.
    """

    def __init__(self, step: Step, found: Region, kept: Collection[fx.Node] = ()) -> None:
        self.step, self.now, self.kept = step, found, frozenset(kept)
        self.rules: Rules = rules_for(step.numbered(found.seed).meta["val"].shape[found.dim])
        self.places, self.reads = dict(found.places), dict(found.reads)
        self.made: set[fx.Node] = set(found.again)  #: taken in for the region's sake
        self.refused: set[fx.Node] = set()

    def best(self) -> Region | None:
        """Take in what brings most, one by one, and stop where least bytes crossed."""
        least = self.crossing(self.now)
        best: Region | None = None
        slack = max((self._bytes(r) for p in self._parts() for r in self._roots(p)), default=0)
        most = len(self.places) + MOST
        while len(self.places) < most:
            take = min(self._takes(), key=lambda t: (t.bytes, self._place(t.node)), default=None)
            if take is None or take.bytes > slack:
                break
            new = self._taken(take)
            if new is None:
                self.refused.add(take.node)
                continue
            self.now = new
            crossing = self.crossing(new)
            if crossing < least or (crossing <= ABOUT * least and not take.runs_again):
                least, best = min(least, crossing), new
            elif crossing > least + 2 * slack:  # a norm has two readers of what it reads
                break
        return best

    def crossing(self, found: Region) -> int:
        """Bytes that cross the border, in either direction, on both sides."""
        parts = [part for part in (found.early, found.late) if part is not None]
        total = 0
        for part in parts:
            crossed = {*self._roots(part), *part.outputs}
            total += sum(self._bytes(node) for node in crossed)
        return total

    def _bytes(self, node: fx.Node) -> int:
        """What a value adds where it crosses."""
        return 0 if self.step.roots[node] in self.kept else self.step.bytes(node)

    # -- what can be taken in -------------------------------------------------------------

    def _parts(self) -> list[Part]:
        return [part for part in (self.now.early, self.now.late) if part is not None]

    def _roots(self, part: Part) -> set[fx.Node]:
        """Computed values that a part reads from outside."""
        roots = {self.step.roots[node] for node in part.inputs}
        return {root for root in roots if root.op == "call_function"}

    def _place(self, node: fx.Node) -> int:
        return self.step.order[node]

    def _takes(self) -> Iterator[_Take]:
        for part in self._parts():
            for node, places in part.inputs.items():
                (place, *more) = places
                if not more and is_sliced(place) and self._may_run_again(node):
                    yield from self._before(part, node, place)
            given, above = self.step.bits(part.outputs), self._above(part)
            for value in part.outputs:
                for reader in value.users if self.step.roots[value] not in self.kept else ():
                    if not above >> self._place(reader) & 1:
                        yield from self._behind(part, reader, given)

    def _may_run_again(self, node: fx.Node) -> bool:
        step = self.step
        if node.op != "call_function" or node in self.places or node in self.refused:
            return False
        if step.roots[node] in self.kept:
            return False
        return may_run_again(step, node)

    def _before(self, part: Part, node: fx.Node, place: Place) -> Iterator[_Take]:
        """A value that the part reads a slice of, made inside it."""
        target, output = node, 0
        if node.target is operator.getitem:
            (target, output) = node.args
        flow = self.rules.giving(self.step.numbered(target), output, place)
        if flow is None or not self._agrees(target, flow):
            return
        roots = self._roots(part)
        brings = self._new_roots(target, roots)
        root = self.step.roots[node]
        others = [n for n in part.inputs if n is not node and self.step.roots[n] is root]
        freed = 0 if others or root.op != "call_function" else self._bytes(root)
        yield _Take(target, flow, True, brings - freed)

    def _behind(self, part: Part, node: fx.Node, given: int) -> Iterator[_Take]:
        """A reader of what the part gives (bits of ``given``), run inside it."""
        late = self.step.sides.late
        if node.op != "call_function" or node in self.places or node in self.refused:
            return
        if (node in late) != (part.outputs[0] in late) or not isinstance(
            node.meta.get("val"), torch.Tensor
        ):
            return
        arguments = tensor_args(node)
        places = [self.places.get(a) for a in arguments]
        outside = (a for a in arguments if a not in self.places)
        if any(isinstance(p, str) for p in places) or self.step.bits_above(outside) & given:
            return  # what it reads waits for the part
        if node.is_impure() or is_random(node):
            return
        flow = self.rules.given(self.step.numbered(node), places)
        if flow is None or flow.outputs[0] is None or not self._agrees(node, flow):
            return
        freed = 0
        for value in {a for a in arguments if a in part.outputs}:
            if all(u is node or u in self.places for u in value.users):
                freed += self._bytes(value)
        brings = self._new_roots(node, self._roots(part)) + self._bytes(self.step.roots[node])
        yield _Take(node, flow, False, brings - freed)

    def _agrees(self, node: fx.Node, flow: Flow) -> bool:
        """Whether the node reads and is read as the region has what is in it."""
        for argument, place in zip(tensor_args(node), flow.inputs, strict=True):
            if argument in self.places and self.places[argument] != place:
                return False
            if is_sliced(place) and not isinstance(argument.meta["val"], torch.Tensor):
                return False
        return fits_readers(node, flow, self.reads)

    def _new_roots(self, node: fx.Node, known: set[fx.Node]) -> int:
        roots = {self.step.roots[a] for a in tensor_args(node) if a not in self.places}
        new = {root for root in roots - known if root.op == "call_function"}
        return sum(self._bytes(root) for root in new)

    def _above(self, part: Part) -> int:
        """Bits of what the part's inputs are made of, where some of it is inside as well."""
        return self.step.bits_above(part.inputs) if self.made else 0

    # -- taking it in ---------------------------------------------------------------------

    def _taken(self, take: _Take) -> Region | None:
        places, reads = dict(self.places), dict(self.reads)
        node, flow = take.node, take.flow
        taken = note(node, flow, places, reads)
        made = self.made | set(taken) if take.runs_again else self.made
        again = self._still_outside(places, made)
        new = assemble(self.step, self.now.seed, self.now.dim, places, reads, again)
        if new is None or (new.late is None) != (self.now.late is None):
            return None
        self.places, self.reads, self.made = places, reads, made
        return new

    def _still_outside(self, places: dict[fx.Node, Place], made: set[fx.Node]) -> set[fx.Node]:
        """Of what was made for the region's sake: what others read too, and so is made twice."""
        outside: set[fx.Node] = set()
        for node in sorted(made, key=self._place, reverse=True):
            if any(user not in places or user in outside for user in node.users):
                outside.add(node)
        return outside
