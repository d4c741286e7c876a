"""Zeros beyond a diagonal: what ``tril``, ``triu`` and causal masks leave of a matrix.

A mask that no input reaches is computed when the step is planned, whatever it is made of.
Attention weights under a mask of ``-inf`` are zero where it lies, but in rows of NaN: a softmax has
a whole row of NaN or none.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from memcompile.analysis.fixed import fixed, real_tensors
from memcompile.analysis.ops import op_name

#: How far back is looked.
DEPTH = 24
_SAME = frozenset({"clone", "convert_element_type", "_to_copy"})


@real_tensors()
def zero_side(node: Any, depth: int = DEPTH) -> str | None:
    """Of a matrix in the last two dimensions: the triangle in which all that is not zero lies."""
    if not isinstance(node, fx.Node) or node.op != "call_function" or not depth:
        return None
    name, args = op_name(node), node.args
    if name in ("tril", "triu"):
        across = args[1] if len(args) > 1 else 0
        fits = across <= 0 if name == "tril" else across >= 0
        return {"tril": "lower", "triu": "upper"}[name] if fits else None
    if name in _SAME | {"relu"}:
        return zero_side(args[0], depth - 1)
    if name == "where":
        kept = _left(node, lambda x: (x == 0) & ~x.signbit())  # -0.0 is another number
        return None if kept is None else _side(kept, node)
    return None


@real_tensors()
def weights_side(node: Any, depth: int = DEPTH) -> str | None:
    """Of weights in the last two dimensions, a softmax of each row: the triangle that is attended.

    Elsewhere they are zero, or NaN where all of the row is.
    """
    if not isinstance(node, fx.Node) or node.op != "call_function" or not depth:
        return None
    if op_name(node) in _SAME and node.meta["val"].is_floating_point():
        return weights_side(node.args[0], depth - 1)
    if op_name(node) != "div" or len(node.args) != 2 or node.kwargs:
        return None
    raised, total = node.args
    if not _is(raised, "exp") or not _is(total, "sum") or total.args[0] is not raised:
        return None
    moved = _unscaled(raised.args[0])
    if not _is(moved, "sub") or not _is(moved.args[1], "amax"):
        return None
    scores, most = moved.args
    if most.args[0] is not scores or not (_by_rows(total) and _by_rows(most)):
        return None
    scores = _unscaled(scores)
    seen = _seen(scores)
    return None if seen is None else _side(seen, scores)


def _unscaled(node: Any) -> Any:
    """What a chain of casts and of products with positive numbers begins with."""
    while isinstance(node, fx.Node) and node.op == "call_function":
        times = node.args[1] if op_name(node) in ("mul", "div") else 1
        if op_name(node) not in _SAME | {"mul", "div"} or not _is_positive(times):
            break
        if not node.meta["val"].is_floating_point():
            break
        node = node.args[0]
    return node


def _is_positive(given: Any) -> bool:
    return type(given) in (int, float) and 0 < given < math.inf


def _seen(scores: Any) -> torch.Tensor | None:
    """Where the scores are not ``-inf`` by a mask."""
    if _is(scores, "where"):
        return _left(scores, lambda x: x == -math.inf)
    if _is(scores, "add") and not scores.kwargs:
        for given in scores.args:  # what is added to -inf makes -inf, or NaN and so a row of it
            bias = fixed(given)
            if bias is not None:
                return bias != -math.inf
    return None


def _left(where: fx.Node, gone: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor | None:
    """Where a ``where`` does not give what is ``gone``; ``None``: its mask is not known."""
    mask, one, two = (fixed(a) for a in where.args)
    if mask is None:
        return None
    left = torch.ones_like(mask)
    for given, here in ((one, mask), (two, ~mask)):
        if given is not None:
            left = left & ~(here & gone(given))
    return left


def _side(kept: torch.Tensor, value: fx.Node) -> str | None:
    """The triangle in which all of a mask lies that is true, the diagonal included."""
    rows, columns = value.meta["val"].shape[-2:]
    if kept.dim() > 2:
        kept = kept.flatten(0, -3).any(0)
    kept = kept.expand(rows, columns)
    if not kept.triu(1).any():
        return "lower"
    return None if kept.tril(-1).any() else "upper"


def _is(node: Any, name: str) -> bool:
    return isinstance(node, fx.Node) and node.op == "call_function" and op_name(node) == name


def _by_rows(reduced: fx.Node) -> bool:
    """Whether it is over the last dimension, which it keeps."""
    args, rank = reduced.args, reduced.meta["val"].dim()
    return len(args) > 2 and bool(args[2]) and [d % rank for d in args[1]] == [rank - 1]
