"""Symmetry: values that are the same with two of their dimensions exchanged.

Read off the graph: something is added to, multiplied with or compared with its own transpose, and
ops that round in one way follow. Bits must be equal, not only numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import fx

from memcompile.analysis.ops import op_name

#: How far back is looked.
DEPTH = 24
#: Of one value: what is symmetric stays so.
_ONE = frozenset(
    {
        "neg",
        "abs",
        "relu",
        "sqrt",
        "clone",
        "convert_element_type",
        "_to_copy",
        "logical_not",
        "bitwise_not",
        "clamp",
        "clamp_min",
        "clamp_max",
        "reciprocal",
    }
)
#: Of two: symmetric where each is, or where each is the other's transpose. (Not ``maximum``: of
#: zeros of two signs it gives the second.)
_COMMUTE = frozenset(
    {
        "add",
        "mul",
        "eq",
        "ne",
        "logical_and",
        "logical_or",
        "logical_xor",
        "bitwise_and",
        "bitwise_or",
        "bitwise_xor",
    }
)
#: Of several: symmetric where each is.
_SEVERAL = _COMMUTE | {"sub", "div", "where", "maximum", "minimum", "le", "lt", "ge", "gt"}

#: What a view shows: a value, and for each dimension the value's own, or ``None`` if broadcast.
Shown = tuple[Any, tuple[int | None, ...]]


def is_symmetric(node: Any, one: int, two: int, depth: int = DEPTH) -> bool:
    """Whether the bits stay the same when dimensions ``one`` and ``two`` are exchanged."""
    value, dims = shown(node, depth)
    row, column = dims[one], dims[two]
    if row is None or column is None or depth == 0:
        return row is column is None
    one, two = row, column
    if not isinstance(value, fx.Node) or value.op != "call_function":
        return False
    name, rank = op_name(value), value.meta["val"].dim()
    given = [a for a in value.args if isinstance(a, fx.Node)]
    if any(isinstance(a, fx.Node) for a in value.kwargs.values()):
        return False
    if name in ("full", "full_like", "scalar_tensor"):
        return True
    if name in _COMMUTE and len(given) == 2 and not value.kwargs:
        first, second = (_broadcast(shown(a, depth), rank) for a in given)
        swapped = list(second[1])
        swapped[one], swapped[two] = swapped[two], swapped[one]
        if first[0] is second[0] and list(first[1]) == swapped:
            return True
    if name not in _ONE | _SEVERAL:
        return False
    ranks = [rank - a.meta["val"].dim() for a in given]
    return bool(given) and all(
        is_symmetric(a, one - less, two - less, depth - 1)
        if one >= less and two >= less
        else one < less and two < less
        for a, less in zip(given, ranks, strict=True)
    )


def shown(node: Any, depth: int = DEPTH) -> Shown:
    """Which value a chain of views shows, and how its dimensions lie."""
    dims: list[int | None] = list(range(node.meta["val"].dim()))
    while depth and node.op == "call_function" and op_name(node) in _VIEWS:
        inner = _VIEWS[op_name(node)](node)
        if inner is None:
            break
        dims = [None if d is None else inner[d] for d in dims]
        node, depth = node.args[0], depth - 1
    return node, tuple(dims)


def _broadcast(given: Shown, rank: int) -> Shown:
    return given[0], (*[None] * (rank - len(given[1])), *given[1])


def _permuted(node: fx.Node) -> list[int | None]:
    rank = node.meta["val"].dim()
    return [d % rank for d in node.args[1]]


def _transposed(node: fx.Node) -> list[int | None]:
    rank = node.meta["val"].dim()
    dims: list[int | None] = list(range(rank))
    one, two = (node.args[1:] if op_name(node) == "transpose" else (0, 1)) if rank > 1 else (0, 0)
    dims[one], dims[two] = dims[two], dims[one]
    return dims


def _unsqueezed(node: fx.Node) -> list[int | None]:
    rank = node.meta["val"].dim()
    dims: list[int | None] = list(range(rank - 1))
    dims.insert(node.args[1] % rank, None)
    return dims


def _expanded(node: fx.Node) -> list[int | None]:
    shape, before = node.meta["val"].shape, node.args[0].meta["val"].shape
    new = len(shape) - len(before)
    return [
        None if d < new or (before[d - new] == 1 and shape[d] != 1) else d - new
        for d in range(len(shape))
    ]


def _viewed(node: fx.Node) -> list[int | None] | None:
    """A view that only adds or drops dimensions of length one."""
    shape, before = list(node.meta["val"].shape), list(node.args[0].meta["val"].shape)
    if [n for n in shape if n != 1] != [n for n in before if n != 1]:
        return None
    places = iter(d for d, n in enumerate(before) if n != 1)
    return [None if n == 1 else next(places) for n in shape]


_VIEWS: dict[str, Callable[[fx.Node], list[int | None] | None]] = {
    "permute": _permuted,
    "transpose": _transposed,
    "t": _transposed,
    "unsqueeze": _unsqueezed,
    "expand": _expanded,
    "view": _viewed,
    "squeeze": _viewed,
    "clone": lambda node: list(range(node.meta["val"].dim())),
    "alias": lambda node: list(range(node.meta["val"].dim())),
}
