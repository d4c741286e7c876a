"""Triangles: pair tensors of which one half says all.

A value is symmetric in two dimensions where the graph adds, multiplies or compares something with
its own transpose; it is zero above or below a diagonal where ``tril`` or ``triu`` made it. One
triangle is kept, folded into a rectangle: a row from the top beside one from the bottom.

Bits must be equal, not only numbers: only ops that round in one way are followed, and only on the
CPU (elsewhere a product and a sum may round once, and ``a*b + c*d`` is no longer symmetric).
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import fx

from memcompile.analysis.ops import op_name
from memcompile.contract import Codec, Coding
from memcompile.step import Step

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


class Triangles(Codec):
    """Symmetric tensors and triangular ones."""

    name: ClassVar[str] = "triangles"

    def coding(self, value: fx.Node, step: Step) -> Coding | None:
        """One triangle, where two dimensions of one length have one; of masks, see ``bits``."""
        tensor = value.meta["val"]
        if tensor.device.type != "cpu" or tensor.dim() < 2 or tensor.dtype is torch.bool:
            return None
        shape = tensor.shape
        for one in range(tensor.dim()):
            for two in range(one + 1, tensor.dim()):
                if type(shape[one]) is not int or shape[one] != shape[two] or shape[one] < 3:
                    continue
                if is_symmetric(value, one, two):
                    return folded(tensor, one, two, "both")
                if two == tensor.dim() - 1 == one + 1 and (side := zero_side(value)):
                    return folded(tensor, one, two, side)
        return None


def folded(tensor: torch.Tensor, one: int, two: int, side: str) -> Coding:
    """The lower triangle of dimensions ``one`` and ``two``; ``side`` "upper": the upper one.

    Beyond it stands the same transposed ("both"), or zero.
    """
    n = tensor.shape[one]
    half = (n + 1) // 2
    turn = (two, one) if side == "upper" else (one, two)

    def encode(x: torch.Tensor) -> torch.Tensor:
        rows, columns = _grid(half, n + 1, x.device)
        top = columns <= rows
        row = torch.where(top, rows, n - 1 - rows)
        column = torch.where(top, columns, columns - rows - 1)
        return x.movedim(turn, (0, 1))[row, column]

    def decode(stored: torch.Tensor) -> torch.Tensor:
        rows, columns = _grid(n, n, stored.device)
        high, low = torch.maximum(rows, columns), torch.minimum(rows, columns)
        top = high < half
        row = torch.where(top, high, n - 1 - high)
        whole = stored[row, torch.where(top, low, low + n - high)]
        if side != "both":
            inside = (columns <= rows).view(n, n, *[1] * (whole.dim() - 2))
            whole = torch.where(inside, whole, 0)
        return whole.movedim((0, 1), turn)

    return Coding(encode, decode, lambda x: x.nbytes // (n * n) * (half * (n + 1)))


def _grid(rows: int, columns: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Every place's row and column."""
    return (
        torch.arange(rows, device=device)[:, None].expand(rows, columns),
        torch.arange(columns, device=device)[None].expand(rows, columns),
    )


# -- symmetry -----------------------------------------------------------------------------------

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


# -- zeros --------------------------------------------------------------------------------------


def zero_side(node: Any, depth: int = DEPTH) -> str | None:
    """Of a matrix in the last two dimensions: the triangle in which all that is not zero lies."""
    if not isinstance(node, fx.Node) or node.op != "call_function" or not depth:
        return None
    name, args = op_name(node), node.args
    if name in ("tril", "triu"):
        across = args[1] if len(args) > 1 else 0
        fits = across <= 0 if name == "tril" else across >= 0
        return {"tril": "lower", "triu": "upper"}[name] if fits else None
    if name in ("clone", "convert_element_type", "_to_copy", "relu"):
        return zero_side(args[0], depth - 1)
    if name == "where" and _is_zero(args[2]):
        return _true_side(args[0])
    return None


def _is_zero(given: Any) -> bool:
    if isinstance(given, fx.Node) and op_name(given) in ("full", "full_like", "scalar_tensor"):
        given = given.args[0 if op_name(given) == "scalar_tensor" else 1]
    return type(given) in (int, float, bool) and given == 0 and str(float(given)) != "-0.0"


def _true_side(mask: Any) -> str | None:
    """The triangle in which all of a mask lies that is true, the diagonal included."""
    if not isinstance(mask, fx.Node) or mask.meta["val"].dim() < 2:
        return None
    name = op_name(mask)
    if name in ("logical_and", "bitwise_and"):
        return _true_side(mask.args[0]) or _true_side(mask.args[1])
    compare = _COMPARE.get(name)
    if compare is None or len(mask.args) != 2:
        return None
    one, two = _affine(mask.args[0]), _affine(mask.args[1])
    if one is None or two is None:
        return None
    row, column, offset = (a - b for a, b in zip(one, two, strict=True))
    if row != -column or row == 0:
        return None  # not a diagonal
    for side, beyond in (("lower", -1), ("upper", 1)):  # the comparison is monotone in i - j
        if not any(compare(row * away + offset, 0) for away in (beyond, beyond * _FAR)):
            return side
    return None


_FAR = 2**40
_COMPARE: dict[str, Callable[[int, int], bool]] = {
    "le": operator.le,
    "lt": operator.lt,
    "ge": operator.ge,
    "gt": operator.gt,
}


def _affine(node: Any, depth: int = DEPTH) -> tuple[int, int, int] | None:
    """``(a, b, c)`` where a value is ``a * i + b * j + c`` of its row and column."""
    if type(node) is int:
        return 0, 0, node
    if not isinstance(node, fx.Node) or not depth:
        return None
    value, dims = shown(node)
    if op_name(value) == "iota" and value.op == "call_function":
        start, step = value.kwargs.get("start", 0), value.kwargs.get("step", 1)
        if type(start) is not int or type(step) is not int:
            return None
        places = [d for d, inner in enumerate(dims) if inner == 0]
        if len(places) != 1 or len(dims) - places[0] > 2:
            return None
        return (step, 0, start) if len(dims) - places[0] == 2 else (0, step, start)
    if value is not node or op_name(node) not in ("add", "sub") or node.kwargs:
        return None
    one, two = (_affine(a, depth - 1) for a in node.args[:2])
    if one is None or two is None:
        return None
    sign = 1 if op_name(node) == "add" else -1
    row, column, offset = (a + sign * b for a, b in zip(one, two, strict=True))
    return row, column, offset
