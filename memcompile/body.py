"""What one trip of a loop computes.

The body views its slice of every sliced input, computes, and writes in place: slices of
outputs into their buffers, parts of sums onto theirs.
"""

from __future__ import annotations

import dataclasses
import operator
from typing import Any

import torch
from torch import fx

from memcompile._torch.draws import draw_part
from memcompile._torch.symbols import size_of
from memcompile.analysis import ops as op_kinds
from memcompile.analysis.merged import VIEWS
from memcompile.analysis.rules import DRAWS, Merged, Place, dim_of, is_sliced
from memcompile.lengths import ratio
from memcompile.region import Part, Region
from memcompile.step import hint, tensors

aten = torch.ops.aten

#: Which argument of an op is the shape of what it returns.
SHAPE_AT = {"view": 1, "_unsafe_view": 1, "reshape": 1, "expand": 1, "full": 0}

#: Products that can be added to a buffer in place, by their name.
ADDED_IN_PLACE = {"mm": aten.addmm_.default, "bmm": aten.baddbmm_.default}

#: What a sum, maximum or minimum starts from.
START = {"sum": 0.0, "max": float("-inf"), "min": float("inf")}


@dataclasses.dataclass(frozen=True)
class Trips:
    """So many chunks of one size, from ``start`` on; in elements of the sliced dimension.

    All are ``int`` or ``SymInt``.
    """

    start: Any
    count: Any
    size: Any
    whole: bool  #: whether they are all there is
    most: int  #: what the size is at most, at any length


def trips(length: Any, chunks: int) -> list[Trips]:
    """Chunks of equal size, and one shorter one where they do not come out even.

    Of a symbolic length the size stays a number, and a longer one has more chunks. At least
    two are left over then, whatever the length: 0 and 1 are sizes that torch would guard on.
    """
    size = -(-hint(length) // chunks)
    if not isinstance(length, int):
        count, rest = (length - 2) // size, (length - 2) % size + 2
        return [
            Trips(0, count, size, whole=False, most=size),
            Trips(count * size, 1, rest, whole=False, most=size + 1),
        ]
    count, rest = divmod(length, size)
    found = [Trips(0, count, size, whole=not rest, most=size)]
    if rest:
        found.append(Trips(count * size, 1, rest, whole=False, most=rest))
    return found


class Body:
    """What one trip computes, called under tracing.

    Args:
        region: the region.
        part: the side of it that is looped.
        run: how its dimension is cut.
        inputs: what the loop is given; constants are made in the body.
    """

    def __init__(self, region: Region, part: Part, run: Trips, inputs: list[fx.Node]) -> None:
        self.region, self.part, self.whole_run, self.inputs = region, part, run, inputs
        self.given = frozenset(inputs)

    def run(self, counter: torch.Tensor, *rest: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """One trip: the counter and the buffers, then the inputs; the carried values are returned.

        Outputs are stored as soon as they are there, so that what they are made of can go.
        """
        number = len(self.part.outputs)
        buffers, given = rest[:number], rest[number:]
        self.at = counter.item()
        self.sizes = given[len(self.inputs) :]
        run = self.whole_run
        self.run_ = dataclasses.replace(
            run, start=self._size(run.start), count=self._size(run.count), size=self._size(run.size)
        )
        self.whole = dict(zip(self.inputs, given, strict=False))
        self.slices: dict[tuple[fx.Node, Place], torch.Tensor] = {}
        env: dict[fx.Node, Any] = {}
        whole_of = dict(zip(self.part.outputs, buffers, strict=True))
        for node in self.part.nodes:
            buffer, place = whole_of.get(node), self.region.places[node]
            if buffer is not None and adds_in_place(node, place):
                self._compute(node, env, into=buffer)
                continue
            env[node] = self._compute(node, env)
            if buffer is not None:
                self._store(buffer, place, env[node])
        return (aten.add.Tensor(counter, 1), *buffers)

    def _read(self, node: fx.Node, place: Place) -> torch.Tensor:
        """This trip's part of what the loop is given, once."""
        if (node, place) not in self.slices:
            part = self._slice(self.whole[node], place)
            if isinstance(place, Merged):  # no view, where others stand before it
                part = aten.reshape.default(part, self._local(self.whole[node], place))
            self.slices[node, place] = part
        return self.slices[node, place]

    def _slice(self, value: torch.Tensor, place: Place) -> torch.Tensor:
        """This trip's part of a tensor, as a view; what stands before it a dimension of its own."""
        if isinstance(place, Merged):
            value, place = self._turns_apart(value, place)
        if not isinstance(place, int):
            return value
        run = self.run_
        unit = self._unit(value, place)
        size, count = run.size * unit, run.count
        shape = [self._size(each) for each in value.shape]
        if not run.whole:
            start = run.start * unit
            value = aten.slice.Tensor(value, place, start, start + count * size)
        if isinstance(count, int) and count == 1:
            return value
        parts = [*shape[:place], count, size, *shape[place + 1 :]]
        return aten.select.int(aten.view.default(value, parts), place, self.at)

    def _turns_apart(self, value: torch.Tensor, place: Merged) -> tuple[torch.Tensor, int]:
        """What is sliced, made a dimension of its own; and which."""
        shape, dim = [self._size(each) for each in value.shape], place.dim
        if isinstance(value.shape[dim], int):
            outer, rest = place.outer, value.shape[dim] // place.outer
        else:  # sliced by itself there
            outer, rest = self._unit(value, dim), self._size(self.region.size)
        return aten.view.default(value, [*shape[:dim], outer, rest, *shape[dim + 1 :]]), dim + 1

    def _size(self, size: Any) -> Any:
        return size_of(self.sizes, size)

    def _unit(self, value: torch.Tensor, place: int) -> Any:
        """How much longer the value is than what is counted in trips."""
        return self._size(ratio(value.shape[place], self.region.size))

    def _compute(
        self,
        node: fx.Node,
        env: dict[fx.Node, Any],
        into: torch.Tensor | None = None,
    ) -> Any:
        """The node's value for this trip; a product added to ``into`` where that is given."""
        if node.target is operator.getitem:
            return env[node.args[0]][node.args[1]]
        places = iter(self.region.reads[node])

        def read(argument: fx.Node) -> Any:
            if not tensors(argument):
                return self._size(argument.meta["val"])  # of what is whole
            place = next(places)
            if argument in env:
                return env[argument]
            return self._read(argument, place) if argument in self.given else _made(argument)

        args, kwargs = fx.node.map_arg((node.args, node.kwargs), read)
        name = op_kinds.op_name(node)
        if name in DRAWS and isinstance(dim := self.region.places[node], int):
            unit = self._unit(node.meta["val"], dim)
            start = (self.run_.start + self.at * self.run_.size) * unit
            return draw_part(name, args, dim, start, self.run_.size * unit)
        at = SHAPE_AT.get(name)
        if at is not None:
            args = (*args[:at], self._local_shape(node), *args[at + 1 :])
        if into is not None:
            return ADDED_IN_PLACE[name](into, *args)
        if name in VIEWS and isinstance(self.region.places[node], Merged):
            return aten.reshape.default(*args)  # a part's rows are not one after the other
        return node.target(*args, **kwargs)

    def _local_shape(self, node: fx.Node) -> list[Any]:
        return self._local(node.meta["val"], self.region.places[node])

    def _local(self, value: torch.Tensor, place: Place) -> list[Any]:
        """The shape of a trip's part."""
        shape = [self._size(size) for size in value.shape]
        dim = dim_of(place)
        if dim is not None:
            shape[dim] = self._unit(value, dim) * self.run_.size
        return shape

    def _store(self, buffer: torch.Tensor, place: Place, value: torch.Tensor) -> None:
        if is_sliced(place):
            part = self._slice(buffer, place)
            if isinstance(place, Merged):
                value = aten.view.default(value, part.shape)
            aten.copy_.default(part, value)
        elif place == "sum":
            aten.copy_.default(buffer, aten.add.Tensor(buffer, value))
        elif place == "max":
            aten.copy_.default(buffer, aten.maximum.default(buffer, value))
        else:
            aten.copy_.default(buffer, aten.minimum.default(buffer, value))


def adds_in_place(node: fx.Node, place: Place) -> bool:
    """Whether a library call can add a trip's part to the sum, which is then never copied."""
    if place != "sum" or node.target not in (aten.mm.default, aten.bmm.default):
        return False
    dtype = node.meta["val"].dtype
    return dtype.is_floating_point and accumulator(dtype) == dtype


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The type in which parts of a sum are added up."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def given(part: Part) -> list[fx.Node]:
    """What a loop must be given: its inputs, but for constants that are read whole."""
    return [n for n, places in part.inputs.items() if places != {None} or not _is_constant(n)]


#: Ops that make a tensor of numbers alone, and such as pass a constant on.
MADE = frozenset({"full", "scalar_tensor", "iota", "arange"})
PASSED_ON = frozenset({"view", "expand", "unsqueeze", "permute", "convert_element_type"})


def _is_constant(node: fx.Node) -> bool:
    """Whether a value is made of numbers alone: the body's kernels then compute it.

    Given as a tensor, each would count as one more that a kernel reads, and what reads
    many is not computed in place.
    """
    name = op_kinds.op_name(node)
    if node.op != "call_function" or not (name in MADE or name in PASSED_ON):
        return False
    return all(_is_constant(a) for a in node.all_input_nodes)


def _made(node: fx.Node) -> torch.Tensor:
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), _made)
    value: torch.Tensor = node.target(*args, **kwargs)
    return value
