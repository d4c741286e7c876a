"""Loops that write in the place of what they read.

Where each trip gives the slice of a value of which it reads the same slice and no other, the
loop can carry what it reads as its buffer: a residual stream is then held once while a layer
runs over it, not twice. It must be the last that reads it. That is known when a plan is
finished: drafts count on it where nothing is drafted to read the value later, and the finished
graph is changed where every other reader comes before the loop in any order that there is.
"""

from __future__ import annotations

import dataclasses
import operator
from typing import Any

import torch
from torch import fx

from memcompile import _torch
from memcompile.analysis.rules import is_sliced
from memcompile.region import Part, Region
from memcompile.step import GROUP, OVER, Step, is_loop, is_view

# -- what may be written over -----------------------------------------------------------------


def overwritable(step: Step, region: Region, part: Part, inputs: list[fx.Node]) -> dict[int, int]:
    """For outputs of a loop, by number, an input that it reads as it writes the output.

    Args:
        step: the step.
        region: the region.
        part: the side of it that is looped.
        inputs: what the loop is given.
    """
    found: dict[int, int] = {}
    if step.dynamic:
        return found
    place = {node: at for at, node in enumerate(part.nodes)}
    for number, output in enumerate(part.outputs):
        if not is_sliced(region.places[output]):
            continue
        for at, read in enumerate(inputs):
            if at in found.values() or part.inputs[read] != {region.places[output]}:
                continue
            if not (_owns(step, read) and _alike(read, output)):
                continue
            same = [n for n in inputs if step.roots[n] is read]
            last = max(
                place[n]
                for n in part.nodes
                if any(step.roots[a] is read for a in n.all_input_nodes)
            )
            if same == [read] and last <= place[output]:
                found[number] = at
                break
    return found


def _owns(step: Step, node: fx.Node) -> bool:
    """Whether a node is a computed value with memory of its own."""
    return node.op == "call_function" and step.roots[node] is node


def _alike(one: fx.Node, other: fx.Node) -> bool:
    """Whether two values lie in memory in the same way."""
    a, b = one.meta["val"], other.meta["val"]
    if a.dtype != b.dtype or a.device != b.device:
        return False
    return bool(a.shape == b.shape and a.stride() == b.stride())


# -- writing it -----------------------------------------------------------------------------


def write_over(module: fx.GraphModule) -> None:
    """Let the loops of a finished graph write over what only they still read.

    Args:
        module: the graph, changed in place; bodies that change are copied.
    """
    changed = False
    for loop in module.graph.find_nodes(
        op="call_function", target=torch.ops.higher_order.while_loop
    ):
        for number in loop.meta.get(OVER, {}):
            changed |= _Overwriting(module, loop, number).write()
    if changed:
        module.graph.eliminate_dead_code()
        module.recompile()


@dataclasses.dataclass
class _Overwriting:
    """One output of a loop, to be written over an input of it."""

    module: fx.GraphModule
    loop: fx.Node
    number: int

    def write(self) -> bool:
        """Whether the loop carries now what it read."""
        value = self._value(self.loop)
        buffer = self.loop.args[2][self.number + 1]
        if value is None or not buffer.meta.get("buffer") or is_loop_output(buffer):
            return False
        loops = self._loops(value)
        if not self._is_last(value, loops):
            return False
        for loop in loops:
            self._carry(loop, value, first=loop is self.loop)
        return True

    def _value(self, loop: fx.Node) -> fx.Node | None:
        """What the loop reads there, where that is a computed value with memory of its own."""
        at = loop.meta[OVER].get(self.number)
        given = [] if at is None else loop.args[3]
        value = given[at] if at is not None else None
        if not isinstance(value, fx.Node) or given.count(value) > 1 or value in loop.args[2]:
            return None
        own = is_loop_output(value) or isinstance(value.target, _torch.OpOverload)
        if value.op != "call_function" or is_view(value) or not own or value.meta.get("buffer"):
            return None
        return value if _alike(value, loop.args[2][self.number + 1]) else None

    def _loops(self, value: fx.Node) -> list[fx.Node]:
        """The loop, and the one of a shorter last chunk, which goes on with its buffers."""
        loops = [self.loop]
        for output in self.loop.users:
            if output.args[1] != self.number + 1:
                continue
            loops += [
                user
                for user in output.users
                if is_loop(user)
                and user.meta.get(GROUP) == self.loop.meta[GROUP]
                and user.args[2][self.number + 1] is output
                and self._value(user) is value
            ]
        return loops

    def _is_last(self, value: fx.Node, loops: list[fx.Node]) -> bool:
        """Whether all else that reads the value comes before the loop in every order."""
        before: set[fx.Node] = set()
        stack = [self.loop]
        while stack:
            for argument in stack.pop().all_input_nodes:
                if argument not in before:
                    before.add(argument)
                    stack.append(argument)
        family = [value]
        for each in family:  # grows
            for user in each.users:
                if user in loops and each is value:
                    continue
                if user.op == "output" or user not in before or _takes(user, each):
                    return False
                if is_view(user):
                    family.append(user)
        return True

    def _carry(self, loop: fx.Node, value: fx.Node, first: bool) -> None:
        """The loop without the input: its trips read the buffer, which is the value."""
        cond, body, carried, given = loop.args
        at = given.index(value)
        spare = len(carried) + at
        targets = [
            self._without(each, spare, self.number + 1, f"over_{self.number}")
            for each in (cond, body)
        ]
        with self.module.graph.inserting_before(loop):
            new = [self.module.graph.get_attr(name) for name in targets]
        if first:
            carried = tuple(value if n == self.number + 1 else c for n, c in enumerate(carried))
        loop.args = (*new, carried, tuple(g for n, g in enumerate(given) if n != at))
        over = loop.meta[OVER]
        loop.meta[OVER] = {n: a - (a > at) for n, a in over.items() if n != self.number}

    def _without(self, attribute: fx.Node, spare: int, instead: int, suffix: str) -> str:
        """A copy of a loop's function with one input read from another; its name."""
        function = getattr(self.module, attribute.target)
        graph = fx.Graph()
        output = graph.graph_copy(function.graph, {}, return_output_node=True)
        assert isinstance(output, tuple)
        values, old = output
        graph.output(values).meta.update(old.meta)
        inputs = graph.find_nodes(op="placeholder")
        inputs[spare].replace_all_uses_with(inputs[instead])
        graph.erase_node(inputs[spare])
        name = f"{attribute.target}_{suffix}"
        setattr(self.module, name, fx.GraphModule(function, graph))
        return name


def is_loop_output(node: Any) -> bool:
    """Whether a value is one that a loop gives."""
    return node.target is operator.getitem and is_loop(node.args[0])


def _takes(user: fx.Node, value: fx.Node) -> bool:
    """Whether a reader changes the value, or is not known to leave no other name of it."""
    if is_loop(user):
        return value in user.args[2]
    return not isinstance(user.target, _torch.OpOverload) or user.target._schema.is_mutable
