"""An op run whole, and run in parts as a dimension rule says: what tests of the rules share."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map_only

from memcompile.analysis.flow import rules_for
from memcompile.analysis.merged import VIEWS
from memcompile.analysis.ops import op_name
from memcompile.analysis.rules import Flow, Merged, Place, dim_of, is_sliced, tensor_args
from memcompile.body import SHAPE_AT, trips

#: How far parts put together may be from the whole: another order of adding up.
CLOSE = {
    torch.float64: {"rtol": 1e-9, "atol": 1e-10},
    torch.complex128: {"rtol": 1e-9, "atol": 1e-10},
    torch.float32: {"rtol": 1e-4, "atol": 1e-5},
    torch.bfloat16: {"rtol": 3e-2, "atol": 3e-2},
}


@dataclasses.dataclass
class Call:
    """One call of an op: its node in a graph of its own, and real arguments."""

    node: fx.Node
    real: dict[fx.Node, torch.Tensor]

    @property
    def arguments(self) -> list[torch.Tensor]:
        return [self.real[n] for n in tensor_args(self.node)]

    def run(
        self, arguments: Sequence[torch.Tensor], shape: Sequence[int] | None, place: Place = None
    ) -> list[Any]:
        """The op on other tensors; ``shape`` stands for the one among its arguments."""
        given = iter(arguments)
        args, kwargs = fx.node.map_arg((self.node.args, self.node.kwargs), lambda n: next(given))
        at = SHAPE_AT.get(op_name(self.node))
        if at is not None and shape is not None:
            args = (*args[:at], list(shape), *args[at + 1 :])
        if op_name(self.node) in VIEWS and isinstance(place, Merged):
            return [torch.ops.aten.reshape.default(*args)]  # as a loop's body does
        return as_list(self.node.target(*args, **kwargs))


def as_list(result: Any) -> list[Any]:
    return list(result) if isinstance(result, (list, tuple)) else [result]


def call(op: Any, *args: Any, **kwargs: Any) -> Call:
    """The op as a node, its tensors as placeholders with fake values."""
    mode, graph = FakeTensorMode(), fx.Graph()
    real: dict[fx.Node, torch.Tensor] = {}

    def placeholder(tensor: torch.Tensor) -> fx.Node:
        node = graph.placeholder(f"x{len(real)}")
        node.meta["val"] = mode.from_tensor(tensor)
        real[node] = tensor
        return node

    node = graph.call_function(op, *tree_map_only(torch.Tensor, placeholder, (args, kwargs)))
    fake_args, fake_kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
    with mode:
        node.meta["val"] = op(*fake_args, **fake_kwargs)
    return Call(node, real)


def sizes(made: Call, flow: Flow) -> list[int]:
    """Lengths of all that the flow slices."""
    values = as_list(made.node.meta["val"])
    assert len(flow.inputs) == len(made.arguments) and len(flow.outputs) == len(values)
    pairs = [
        *zip(made.arguments, flow.inputs, strict=True),
        *zip(values, flow.outputs, strict=True),
    ]
    return [length_of(value, place) for value, place in pairs if is_sliced(place)]


def length_of(value: torch.Tensor, place: Place) -> int:
    """Of what is sliced: of a dimension, or of what stands there behind others."""
    outer = place.outer if isinstance(place, Merged) else 1
    return value.shape[dim_of(place)] // outer


def in_parts(made: Call, flow: Flow, length: int, chunks: int) -> list[list[Any]]:
    """What each trip of a loop over ``length`` in so many chunks returns."""
    results = []
    for run in trips(length, chunks):
        for trip in range(run.count):
            start = run.start + trip * run.size
            sliced = [
                part(value, place, length, start, run.size)
                for value, place in zip(made.arguments, flow.inputs, strict=True)
            ]
            shape, place = None, flow.outputs[0]
            if isinstance(made.node.meta["val"], torch.Tensor):
                shape = list(made.node.meta["val"].shape)
                if (dim := dim_of(place)) is not None:
                    shape[dim] = shape[dim] // length * run.size
            results.append(made.run(sliced, shape, place))
    return results


def part(value: torch.Tensor, place: Place, length: int, start: int, size: int) -> torch.Tensor:
    """A trip's part; of what stands behind others in a dimension, a part of every turn."""
    if isinstance(place, Merged):
        apart = value.unflatten(place.dim, (place.outer, -1))
        return part(apart, place.dim + 1, length, start, size).flatten(place.dim, place.dim + 1)
    if not isinstance(place, int):
        return value
    unit = value.shape[place] // length
    return value.narrow(place, start * unit, size * unit)


def together(parts: list[torch.Tensor], place: Place) -> torch.Tensor:
    """The parts of one output, put together as the flow says."""
    if isinstance(place, Merged):
        apart = [p.unflatten(place.dim, (place.outer, -1)) for p in parts]
        return torch.cat(apart, place.dim + 1).flatten(place.dim, place.dim + 1)
    if isinstance(place, int):
        return torch.cat(parts, place)
    if place is None:
        for other in parts[1:]:
            torch.testing.assert_close(other, parts[0], rtol=0, atol=0, equal_nan=True)
        return parts[0]
    combine = {"sum": torch.add, "max": torch.maximum, "min": torch.minimum}[place]
    dtype = parts[0].dtype
    wide = torch.float32 if dtype == torch.bfloat16 else dtype
    total = parts[0].to(wide)
    for other in parts[1:]:
        total = combine(total, other.to(wide))
    return total.to(dtype)


def hold(made: Call, flow: Flow, whole: list[Any]) -> None:
    """The op in parts is the op: for every length the region might have, in 2, 3 and all chunks."""
    common = math.gcd(*sizes(made, flow))
    assert common > 1, f"{flow}: no loop slices all of {sizes(made, flow)} at once"
    for length in [d for d in range(2, common + 1) if common % d == 0]:
        for chunks in sorted({2, min(3, length), length}):
            results = in_parts(made, flow, length, chunks)
            for number, place in enumerate(flow.outputs):
                if not isinstance(whole[number], torch.Tensor):
                    continue
                got = together([result[number] for result in results], place)
                said = f"{flow}, output {number}, {chunks} chunks of {length}: "
                torch.testing.assert_close(
                    got,
                    whole[number],
                    equal_nan=True,
                    msg=said.__add__,
                    **CLOSE.get(got.dtype, {}),
                )


def places(made: Call, most: int = 130) -> Iterator[tuple[Place, ...]]:
    """Every way to slice the arguments, or where those are many one argument at a time."""
    options = [[None, *range(value.dim())] for value in made.arguments]
    if math.prod(map(len, options)) <= most:
        yield from itertools.product(*options)
        return
    for at, dims in enumerate(options):
        for dim in dims[1:]:
            yield tuple(dim if at == other else None for other in range(len(options)))


def flows(made: Call, most: int = 130) -> Iterator[tuple[tuple[Place, ...], Flow]]:
    """The flow for every way to slice that has one, asked as a region of each length would."""
    for given in places(made, most):
        pairs = zip(made.arguments, given, strict=True)
        lengths = {v.shape[p] for v, p in pairs if p is not None}
        if not lengths or min(lengths) < 2:
            continue
        seeds = [2 * max(lengths), *(d for n in lengths for d in range(2, n + 1) if n % d == 0)]
        for length in sorted(set(seeds)):
            flow = rules_for(length).given(made.node, given)
            if flow is not None:
                yield given, flow


def audit(made: Call, most: int = 130) -> dict[str, str]:
    """Check every flow there is; which outputs the slice of one argument alone leads to.

    ``{"a1": "sum"}``: the first argument sliced along dimension 1 leaves a sum.
    """
    whole = made.run(made.arguments, None)
    found: dict[str, str] = {}
    for given, flow in flows(made, most):
        assert all(p in (None, q) for p, q in zip(given, flow.inputs, strict=True)), (given, flow)
        hold(made, flow, whole)
        (*at,) = [n for n, p in enumerate(given) if p is not None]
        if len(at) == 1:
            name = f"{'abcdefgh'[at[0]]}{named(given[at[0]])}"
            found[name] = ",".join(map(named, flow.outputs))
    return found


def audit_merged(made: Call) -> dict[str, str]:
    """Check every flow of what stands behind others in a dimension of one argument.

    ``{"a2*0": "2*1"}``: the first argument sliced along dimension 0, where that is two of what
    is sliced, leaves its output sliced along dimension 1 in the same way.
    """
    whole = made.run(made.arguments, None)
    found: dict[str, str] = {}
    for at, value in enumerate(made.arguments):
        for dim, size in enumerate(value.shape):
            for outer in (n for n in range(2, size // 2 + 1) if size % n == 0):
                given = tuple(
                    Merged(dim, outer) if k == at else None for k in range(len(made.arguments))
                )
                flow = rules_for(size // outer).given(made.node, given)
                if flow is not None:
                    hold(made, flow, whole)
                    name = f"{'abcdefgh'[at]}{named(given[at])}"
                    found[name] = ",".join(map(named, flow.outputs))
    return found


def named(place: Place) -> str:
    """A place in words: ``2*1`` is dimension 1, sliced behind one of length two."""
    if isinstance(place, Merged):
        return f"{place.outer}*{place.dim}"
    return "-" if place is None else str(place)
