"""What of a layer can run as loops, where everything in it is of one size.

Unlike ``region.find`` it gives nothing up for what cannot be sliced: that is left outside.
"""

from __future__ import annotations

import operator

from torch import fx

from memcompile.analysis.flow import Rules
from memcompile.analysis.ops import classify, is_random
from memcompile.analysis.rules import Flow, Place, is_sliced, tensor_args
from memcompile.analysis.timeline import Kind
from memcompile.region import (
    LARGEST,
    Region,
    assemble,
    elements,
    fits_readers,
    lying_between,
    may_run_again,
    note,
    seen_from,
)
from memcompile.step import Step, is_view

#: A value is of the seed's order from this share of its elements on.
LARGE = 0.5


class Layer:
    """Takes in what can be sliced, and leaves the rest outside.

    Args:
        step: the step.
        seed: where it starts.
        rules: for the length of the sliced dimension.
        stops: roots that no region goes past.
    """

    def __init__(self, step: Step, seed: fx.Node, rules: Rules, stops: frozenset[fx.Node]) -> None:
        self.step, self.seed, self.rules, self.stops = step, seed, rules, stops
        self.early, self.late_side = step.sides.early, step.sides.late
        self.least = LARGE * elements(step.roots[seed])
        self.places: dict[fx.Node, Place] = {}
        self.reads: dict[fx.Node, tuple[Place, ...]] = {}
        self.whole: set[fx.Node] = set()  #: early ones that what is read whole is made of
        self.waiting: set[fx.Node] = set()  #: late ones outside that wait for the region
        self.made: set[fx.Node] = set()  #: taken in for a reader's sake
        self.again: set[fx.Node] = set()
        self.given: set[fx.Node] = set()  #: roots of what is read
        self.made_of_stops: dict[tuple[fx.Node, Place], bool] = {}

    def grow(self, dim: int) -> bool:
        """Whether there is a region with the seed sliced along ``dim``."""
        self.inner = self._interior()
        if not self.inner:
            return False
        self.hull = self._hull()
        self.made_of_stops[self.seed, dim] = True
        if not self._make(self.seed, dim):
            return False
        done: set[fx.Node] = set()
        while True:
            todo = [n for n in self.places if n not in done]
            if not todo:
                known = len(self.places)
                self._close()
                if len(self.places) == known:
                    break
            for node in todo:
                done.add(node)
                self._around(node)
            if len(self.places) > LARGEST:
                return False
        return self._leave_out() and self.seed in self.places

    def late(self) -> list[fx.Node]:
        """The late nodes taken in."""
        return [n for n in self.step.nodes if n in self.places and n in self.late_side]

    def region(self) -> Region | None:
        """What was grown, or ``None`` where it cannot run as loops."""
        step, again = self.step, self.again
        (dim,) = {self.places[self.seed]}
        assert isinstance(dim, int)
        return assemble(step, self.seed, dim, self.places, self.reads, again)

    # -- the layer ------------------------------------------------------------------------

    def _is_large(self, node: fx.Node) -> bool:
        root = self.step.roots[node]
        return root.op == "call_function" and elements(root) >= self.least

    def _stops(self, node: fx.Node) -> bool:
        return node.op != "call_function" or self.step.roots[node] in self.stops

    def _interior(self) -> set[fx.Node]:
        """Large early values that hang together with the seed without passing a stop."""
        found, stack = {self.seed}, [self.seed]
        while stack:
            node = stack.pop()
            near = [a for a in node.all_input_nodes if not self._stops(a)]
            if not self._stops(node):
                near += list(node.users)
            for other in near:
                if other in self.early and other not in found and self._is_large(other):
                    found.add(other)
                    stack.append(other)
            if len(found) > LARGEST:
                return set()
        return found

    def _hull(self) -> set[fx.Node]:
        """Late nodes between two that read the interior."""
        ends = {u for n in self.inner if not self._stops(n) for u in n.users if u in self.late_side}
        return ends | lying_between(self.step, self.late_side, ends)

    def _is_near(self, node: fx.Node) -> bool:
        """Whether a node belongs to the layer, if it can be sliced."""
        if not self._is_large(node):
            return True
        return node in self.inner or node in self.hull

    # -- growing --------------------------------------------------------------------------

    def _around(self, node: fx.Node) -> None:
        for argument, place in zip(tensor_args(node), self.reads[node], strict=True):
            if argument in self.places or not is_sliced(place) or self._stops(argument):
                continue
            if self._is_large(argument) and self._is_near(argument):
                self._make(argument, place)
        if self._is_large(node) and is_sliced(self.places[node]) and not self._stops(node):
            for user in node.users:
                if user.op == "call_function" and self._is_near(user):
                    self._read(user)

    def _make(self, node: fx.Node, place: Place) -> bool:
        """Take in a node by the slice of it that is wanted."""
        target, output = node, 0
        if node.target is operator.getitem:
            if is_view(node):
                return False
            target, output = node.args[0], node.args[1]
        if target in self.places or not self._is_made_of_stops(node, place):
            return False
        flow = self.rules.giving(self.step.numbered(target), output, place)
        if flow is None or not self._agrees(target, flow):
            return False
        self._take(target, flow)
        self.made.add(target)
        return self.places.get(node) == place

    def _is_made_of_stops(self, node: fx.Node, place: Place) -> bool:
        """Whether an early value's slice can be made of slices of what is saved or small.

        Else more would be read for its sake than it is itself.
        """
        if node not in self.early or self._stops(node) or not self._is_large(node):
            return True
        if node in self.places:
            return self.places[node] == place
        key = node, place
        if key not in self.made_of_stops:
            self.made_of_stops[key] = False
            target, output = node, 0
            if node.target is operator.getitem:
                target, output = node.args[0], node.args[1]
            flow = (
                None
                if is_view(node) and target is not node
                else self.rules.giving(self.step.numbered(target), output, place)
            )
            if flow is not None:
                self.made_of_stops[key] = all(
                    self._is_made_of_stops(a, p) if is_sliced(p) else not self._is_large(a)
                    for a, p in zip(tensor_args(target), flow.inputs, strict=True)
                )
        return self.made_of_stops[key]

    def _read(self, node: fx.Node) -> None:
        """Take in a node by how its operands are sliced."""
        if node in self.places or node in self.whole or node.target is operator.getitem:
            return
        if is_random(node) or node.is_impure():
            return
        places = [seen_from(self.step, self.places, node, a) for a in tensor_args(node)]
        if any(isinstance(p, str) for p in places):
            return
        flow = self.rules.given(self.step.numbered(node), places)
        if flow is None or all(p is None for p in flow.outputs):
            return
        pairs = zip(tensor_args(node), flow.inputs, strict=True)
        for argument, place in pairs:
            new = argument not in self.places and self.step.roots[argument] not in self.given
            if new and is_sliced(place) and not self._is_made_of_stops(argument, place):
                return
        if self._agrees(node, flow):
            self._take(node, flow)

    def _agrees(self, node: fx.Node, flow: Flow) -> bool:
        """Whether what is taken in is read as it is there, by the node and of it."""
        for argument, place in zip(tensor_args(node), flow.inputs, strict=True):
            seen = seen_from(self.step, self.places, node, argument)
            if argument in self.places and seen != place:
                return False
        return fits_readers(node, flow, self.reads)

    def _take(self, node: fx.Node, flow: Flow) -> None:
        note(node, flow, self.places, self.reads)
        for argument, place in zip(tensor_args(node), flow.inputs, strict=True):
            self.given.add(self.step.roots[argument])
            if place is None and argument in self.early and self._is_large(argument):
                self._need_whole(argument)

    def _need_whole(self, node: fx.Node) -> None:
        stack = [node]
        while stack:
            node = stack.pop()
            if node not in self.whole and not self._stops(node):
                self.whole.add(node)
                stack.extend(node.all_input_nodes)

    def _close(self) -> None:
        """Take in what lies between two nodes of the region, where it can be."""
        for side in (self.early, self.late_side):
            inside = {n for n in self.places if n in side}
            between = lying_between(self.step, side, inside)
            for node in self.step.nodes:
                if node in between and self._is_near(node):
                    self._read(node)

    # -- what cannot be inside --------------------------------------------------------------

    def _leave_out(self) -> bool:
        """Leave out what waits for the region's sums; make again what its inputs are made of."""
        for node in self.step.nodes:
            if node not in self.late_side:
                continue
            late = [a for a in node.all_input_nodes if a in self.late_side]
            if node in self.places and not self._waits(node, late):
                continue
            self._drop(node)
            if any(a in self.waiting or a in self.places for a in late):
                self.waiting.add(node)
        for node in reversed(self.step.nodes):
            unread = not any(u in self.places for u in node.users)
            if unread and node in self.made and node is not self.seed:
                self._drop(node)
        above = [
            a
            for n in self.places
            if n in self.early
            for a in n.all_input_nodes
            if a not in self.places
        ]
        seen: set[fx.Node] = set()
        while above:
            node = above.pop()
            if node not in seen:
                seen.add(node)
                above.extend(node.all_input_nodes)
        self.again = {n for n in seen if n in self.places}
        self._repeat_cheap()
        return all(may_run_again(self.step, n) for n in self.again)

    def _drop(self, node: fx.Node) -> None:
        self.places.pop(node, None)
        self.reads.pop(node, None)

    def _repeat_cheap(self) -> None:
        """What others read and no product is needed for is made for them outside."""
        able: set[fx.Node] = set(self.again)
        early = [n for n in self.step.nodes if n in self.places and n in self.early]
        for node in early:
            cheap = classify(node) < Kind.EXTERN and may_run_again(self.step, node)
            if cheap and all(a in able for a in node.all_input_nodes if a in self.places):
                able.add(node)
        for node in reversed(early):
            if node not in able or self._stops(node) or not self._is_large(node):
                continue
            if any(u not in self.places or u in self.again for u in node.users):
                self._again_with_inputs(node, able)

    def _again_with_inputs(self, node: fx.Node, able: set[fx.Node]) -> None:
        stack = [node]
        while stack:
            node = stack.pop()
            self.again.add(node)
            stack += [a for a in node.all_input_nodes if a in able and a not in self.again]

    def _waits(self, node: fx.Node, late: list[fx.Node]) -> bool:
        """Whether a late node reads what is there only when the loop is over."""
        if node.target is operator.getitem and node.args[0] not in self.places:
            return True
        return any(a in self.waiting or isinstance(self.places.get(a), str) for a in late)
