"""Dimensions that are sliced behind others they are merged with.

A pair tensor (b, i, j, c) is viewed as (b*i*j, c) before a product of matrices. The rows of a
chunk of its columns are no slice of that; but they are the rows of the chunk's own view. So
what is sliced has a place there too, (outer, sliced) flattened, and which elements a trip has
follows from the shapes alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import fx

from memcompile.analysis.rules import Flow, Merged, Place, tensor_args
from memcompile.step import tensors

#: Ops that give the same elements in the same order in another shape.
VIEWS = frozenset({"view", "_unsafe_view", "reshape"})


def relocated(
    before: Sequence[int], place: Place, after: Sequence[int], parts: int
) -> int | Merged | None:
    """Where what is sliced in a tensor stands when it is viewed in another shape.

    Args:
        before: the shape of the tensor.
        place: of what is sliced there.
        after: the shape it is viewed in.
        parts: into how many what is sliced must fall.

    Returns:
        Its place there; ``None`` where no dimension holds it, or only with what is before it
        split.
    """
    dim, outer = (place.dim, place.outer) if isinstance(place, Merged) else (place, 1)
    if not isinstance(dim, int) or 0 in after or math.prod(before) != math.prod(after):
        return None
    ahead = math.prod(before[:dim]) * outer
    for at, size in enumerate(after):
        passed = math.prod(after[:at])
        if ahead % passed:
            return None
        own = ahead // passed
        if size % own == 0 and size > own:
            if size // own % parts:
                return None
            return at if own == 1 else Merged(at, own)
    return None


def lifted(node: fx.Node, flow: Flow, outer: int, size: int) -> Flow | None:
    """A flow for whole dimensions, for the part of each that is sliced behind others.

    Args:
        node: the op.
        flow: through it, of dimensions that are sliced alone.
        outer: how many whole turns of what is sliced each of them holds.
        size: of the dimension; all that the flow slices must be of it.
    """
    values = [tensors(argument)[0] for argument in tensor_args(node)]
    pairs = [
        *zip(values, flow.inputs, strict=True),
        *zip(tensors(node), flow.outputs, strict=True),
    ]
    if any(isinstance(p, int) and value.shape[p] != size for value, p in pairs):
        return None
    inputs = tuple(Merged(p, outer) if isinstance(p, int) else p for p in flow.inputs)
    outputs = tuple(Merged(p, outer) if isinstance(p, int) else p for p in flow.outputs)
    return Flow(inputs, outputs)
