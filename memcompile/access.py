"""How a kernel walks over memory: what it reads in the order it writes, and in which loops.

Inductor merges neighbouring dimensions of a kernel into one loop where everything it reads
and writes lies in memory so that it can. What it reads is written over only where both walk
the same loops in the same order.
"""

from __future__ import annotations

import dataclasses
import itertools

import torch
from torch import fx

from memcompile.analysis.ops import classify
from memcompile.analysis.rules import reduced_dims
from memcompile.analysis.timeline import Kind
from memcompile.step import hint


@dataclasses.dataclass(frozen=True, slots=True)
class Access:
    """One op's walk.

    ``breaks`` are the places, counted from the last dimension, between which loops are not
    merged; ``moved`` are the arguments read in another order than the result is written in.
    """

    breaks: frozenset[int] = frozenset()
    moved: frozenset[fx.Node] = frozenset()


NONE = Access()


def access(node: fx.Node) -> Access:
    """The walk of a pointwise op or a reduction; nothing is known of others."""
    kind, value = classify(node), node.meta.get("val")
    read = [a for a in node.all_input_nodes if isinstance(a.meta.get("val"), torch.Tensor)]
    if kind not in (Kind.POINTWISE, Kind.REDUCTION) or not read:
        return NONE
    if kind == Kind.REDUCTION:
        shape = _shape(max(read, key=lambda a: a.meta["val"].dim()).meta["val"])
        return Access(_breaks(shape, read, None) | _meeting(node, len(shape)))
    if not isinstance(value, torch.Tensor) or value.layout != torch.strided:
        return NONE
    shape, written = _shape(value), _strides(value)
    moved = frozenset(
        a for a in read if _shape(a.meta["val"]) == shape and _strides(a.meta["val"]) != written
    )
    return Access(_breaks(shape, read, value), moved)


def _shape(value: torch.Tensor) -> list[int]:
    return [hint(size) for size in value.shape]


def _strides(value: torch.Tensor) -> list[int]:
    """Of a strided tensor; those of dimensions of one element are of no matter."""
    if value.layout != torch.strided:
        return []
    sizes = zip(value.shape, value.stride(), strict=True)
    return [0 if hint(size) == 1 else hint(stride) for size, stride in sizes]


def _breaks(shape: list[int], read: list[fx.Node], value: torch.Tensor | None) -> frozenset[int]:
    """Where two neighbouring dimensions of ``shape`` are walked by two loops."""
    walked = [a.meta["val"] for a in read] + ([value] if value is not None else [])
    rank, found = len(shape), set()
    for tensor in walked:
        strides = _strides(tensor)
        if tensor.dim() > rank or len(strides) != tensor.dim():
            continue
        strides = [0] * (rank - len(strides)) + strides
        dims = [d for d in range(rank) if shape[d] != 1]
        for outer, inner in itertools.pairwise(dims):
            if strides[outer] != strides[inner] * shape[inner]:
                found.add(inner - rank)
    return frozenset(found)


def _meeting(node: fx.Node, rank: int) -> frozenset[int]:
    """Where kept dimensions meet reduced ones."""
    gone = reduced_dims(node)
    return frozenset(d - rank for d in range(1, rank) if (d in gone) != (d - 1 in gone))
