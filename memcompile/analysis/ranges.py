"""Which whole numbers a value may hold, proved from the graph.

Interval arithmetic over the ops that make a value, and what its readers prove of it: an index
into a dimension of ``n`` is at least ``-n`` and below ``n``, or the step fails in its forward.
A bound holds for every input; where nothing is known there is none. Pure: graphs are read.
"""

from __future__ import annotations

import functools
import operator
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from memcompile.analysis.ops import op_name
from memcompile.step import Step, tensors

#: The least and the largest number a value may hold.
Bounds = tuple[int, int]

#: Ops that give elements of their first argument and nothing else.
MOVES = frozenset(
    [
        "alias",
        "amax",
        "amin",
        "clone",
        "contiguous",
        "detach",
        "diagonal",
        "embedding",
        "expand",
        "flip",
        "gather",
        "index",
        "index_select",
        "lift_fresh_copy",
        "permute",
        "repeat",
        "reshape",
        "roll",
        "select",
        "slice",
        "split",
        "split_with_sizes",
        "squeeze",
        "t",
        "transpose",
        "unbind",
        "unfold",
        "unsqueeze",
        "view",
        "_unsafe_index",
        "_unsafe_view",
    ]
)
#: Views that leave nothing out: what is true of their elements is true of the whole value.
WHOLE = frozenset(
    [
        "alias",
        "clone",
        "detach",
        "expand",
        "permute",
        "reshape",
        "squeeze",
        "t",
        "transpose",
        "unsqueeze",
        "view",
        "_unsafe_view",
        "_to_copy",
        "convert_element_type",
    ]
)


class Ranges:
    """The bounds of the integer values of one step."""

    def __init__(self, step: Step) -> None:
        self._outputs = [node for node in step.outputs if node is not None]
        self._early = step.sides.early  # not the step: it is what the cache below hangs on
        self._made: dict[fx.Node, Bounds | None] = {}

    @classmethod
    def of(cls, step: Step) -> Ranges:
        """Those of a step, made once."""
        if step not in _KNOWN:
            _KNOWN[step] = cls(step)
        return _KNOWN[step]

    def bounds(self, node: fx.Node) -> Bounds | None:
        """What is known of an integer or boolean value, by how it is made and how it is read."""
        found = [b for b in (self.made(node), self.read(node)) if b is not None]
        if not found:
            return None
        return max(low for low, _ in found), min(high for _, high in found)

    def made(self, node: Any) -> Bounds | None:
        """Bounds by the ops that make the value; of a number in the graph, itself."""
        if isinstance(node, bool | int):
            return int(node), int(node)
        if not isinstance(node, fx.Node):
            return None
        stack = [node]  # no recursion: graphs are deep
        while stack:
            at = stack[-1]
            if at in self._made:
                stack.pop()
                continue
            missing = [a for a in at.all_input_nodes if a not in self._made]
            if missing and _is_whole(at):
                stack.extend(missing)
                continue
            self._made[at] = self._make(at)
            stack.pop()
        return self._made[node]

    def _make(self, node: fx.Node) -> Bounds | None:
        dtype = _dtype(node)
        if dtype is None or dtype.is_floating_point or dtype.is_complex:
            return None
        if dtype is torch.bool:
            return 0, 1
        rule = _RULES.get(op_name(node)) if node.op == "call_function" else None
        if node.target is operator.getitem:
            rule = _item
        found = rule(node, self.made) if rule is not None else None
        limits = torch.iinfo(dtype)
        fits = found is not None and limits.min <= found[0] and found[1] <= limits.max
        return found if fits else None  # beyond it the numbers wrap around

    def read(self, node: fx.Node) -> Bounds | None:
        """Bounds by the readers that index with the whole value, in every forward."""
        dtype = _dtype(node)
        if dtype not in (torch.int64, torch.int32):
            return None
        found: list[int] = []
        stack, seen = [node], {node}
        while stack:
            at = stack.pop()
            for user in at.users:
                if user in seen or user not in self._certain:
                    continue
                seen.add(user)
                length = _indexed_length(user, at)
                if length is not None:
                    found.append(length)
                elif op_name(user) in WHOLE and _holds(_dtype(user), _dtype(at)):
                    stack.append(user)
        return (-min(found), min(found) - 1) if found else None

    @functools.cached_property
    def _certain(self) -> frozenset[fx.Node]:
        """Early nodes that every forward runs: its outputs hang on them."""
        stack, seen = list(self._outputs), set()
        while stack:
            node = stack.pop()
            if node not in seen:
                seen.add(node)
                stack.extend(node.all_input_nodes)
        return frozenset(seen & self._early)


_KNOWN: weakref.WeakKeyDictionary[Step, Ranges] = weakref.WeakKeyDictionary()


def _dtype(node: fx.Node) -> torch.dtype | None:
    value = node.meta.get("val")
    return value.dtype if isinstance(value, torch.Tensor) else None


def _holds(wide: torch.dtype | None, narrow: torch.dtype | None) -> bool:
    """Whether a copy in ``wide`` has the same whole numbers."""
    wider = (torch.int64,) if narrow is torch.int64 else (torch.int64, torch.int32)
    return wide in wider


def _is_whole(node: fx.Node) -> bool:
    """Whether the node's numbers are whole, so that its inputs may bound them."""
    dtype = _dtype(node)
    return dtype is not None and not dtype.is_floating_point and not dtype.is_complex


def _indexed_length(user: fx.Node, index: fx.Node) -> int | None:
    """The length of the dimension that ``user`` indexes with ``index``."""
    name, args = op_name(user), user.args
    length: Any = None
    if name == "embedding" and args[1] is index:
        length = _shape(args[0])[0]
    elif name in ("gather", "index_select") and args[2] is index:
        length = _shape(args[0])[args[1]] if _shape(args[0]) else None
    elif name == "index" and isinstance(args[1], (list, tuple)):
        places = [p for p, each in enumerate(args[1]) if each is index]
        lengths = [_shape(args[0])[p] for p in places]
        length = min(lengths) if all(isinstance(n, int) for n in lengths) and lengths else None
    return length if isinstance(length, int) and length > 0 else None


def _shape(node: Any) -> tuple[Any, ...]:
    return tuple(node.meta["val"].shape)


# -- what an op makes of bounds ---------------------------------------------------------------

Made = Callable[[Any], Bounds | None]
Rule = Callable[[fx.Node, Made], Bounds | None]


def _first(node: fx.Node, made: Made) -> Bounds | None:
    return made(node.args[0])


def _union(values: list[Any], made: Made) -> Bounds | None:
    found = [made(value) for value in values]
    if not found or any(b is None for b in found):
        return None
    return min(b[0] for b in found if b), max(b[1] for b in found if b)


def _pad(node: fx.Node, made: Made) -> Bounds | None:
    (around,) = node.args[2:] or (0,)
    return _union([node.args[0], int(around)], made) if around == int(around) else None


def _arithmetic(function: Callable[[int, int], int]) -> Rule:
    def rule(node: fx.Node, made: Made) -> Bounds | None:
        if node.kwargs or len(node.args) != 2:
            return None
        one, two = made(node.args[0]), made(node.args[1])
        if one is None or two is None:
            return None
        corners = [function(a, b) for a in one for b in two]
        return min(corners), max(corners)

    return rule


def _clamp(node: fx.Node, made: Made) -> Bounds | None:
    name, args = op_name(node), (*node.args[1:], None, None)
    low, high = node.kwargs.get("min", args[0]), node.kwargs.get("max", args[1])
    if name == "clamp_max":
        low, high = None, node.kwargs.get("max", args[0])
    if not all(limit is None or type(limit) is int for limit in (low, high)):
        return None
    dtype = _dtype(node)
    assert dtype is not None
    limits = torch.iinfo(dtype)
    least, most = made(node.args[0]) or (limits.min, limits.max)
    if low is not None:
        least, most = max(least, low), max(most, low)
    if high is not None:
        least, most = min(least, high), min(most, high)
    return least, most


def _remainder(node: fx.Node, made: Made) -> Bounds | None:
    by = node.args[1]
    return (0, by - 1) if type(by) is int and by > 0 else None


def _and(node: fx.Node, made: Made) -> Bounds | None:
    masks = [b for b in map(made, node.args) if b is not None and b[0] >= 0]
    return (0, min(b[1] for b in masks)) if masks else None


def _absolute(node: fx.Node, made: Made) -> Bounds | None:
    inner = made(node.args[0])
    if inner is None:
        return None
    low = 0 if inner[0] <= 0 <= inner[1] else min(map(abs, inner))
    return low, max(map(abs, inner))


def _negative(node: fx.Node, made: Made) -> Bounds | None:
    inner = made(node.args[0])
    return None if inner is None else (-inner[1], -inner[0])


def _full(node: fx.Node, made: Made) -> Bounds | None:
    given = node.args[0 if op_name(node) == "scalar_tensor" else 1]
    return made(int(given)) if isinstance(given, (int, float)) and given == int(given) else None


def _iota(node: fx.Node, made: Made) -> Bounds | None:
    length = node.args[0]
    start, step = node.kwargs.get("start", 0), node.kwargs.get("step", 1)
    if not all(isinstance(n, int) for n in (length, start, step)) or length < 1:
        return None
    last = start + (length - 1) * step
    return min(start, last), max(start, last)


def _positions(node: fx.Node, made: Made) -> Bounds | None:
    """``argmax`` and ``argmin``: places along a dimension, or in the whole value."""
    source = node.args[0].meta["val"]
    dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
    length = source.numel() if dim is None else source.shape[dim]
    return (0, length - 1) if isinstance(length, int) and length > 0 else None


def _item(node: fx.Node, made: Made) -> Bounds | None:
    """Places that an op with several outputs gives."""
    op, place = node.args
    name = op_name(op)
    source = op.args[0]
    shape = _shape(source) if isinstance(source, fx.Node) and tensors(source) else ()
    length: Any = None
    if place == 1 and name in ("sort", "topk", "max", "min", "cummax", "cummin", "kthvalue"):
        at = {"topk": 2, "kthvalue": 2}.get(name, 1)
        dim = op.args[at] if len(op.args) > at else op.kwargs.get("dim", -1)
        length = shape[dim] if shape else 1
    elif place == 1 and name == "_low_memory_max_pool_with_offsets":
        kernel = op.args[1]
        length = 1
        for size in kernel if len(kernel) == len(shape) - 2 else (*kernel, *kernel):
            length *= size
    elif place == 1 and name == "max_pool2d_with_indices":
        length = shape[-1] * shape[-2]
    elif name in ("split", "split_with_sizes", "unbind"):
        return made(source)
    return (0, length - 1) if isinstance(length, int) and length > 0 else None


def _bucket(node: fx.Node, made: Made) -> Bounds | None:
    edges = node.args[1] if op_name(node) == "bucketize" else node.args[0]
    shape = _shape(edges) if isinstance(edges, fx.Node) else ()
    return (0, shape[-1]) if shape and isinstance(shape[-1], int) else None


def _randint(node: fx.Node, made: Made) -> Bounds | None:
    low, high = node.args[:2]
    return (low, high - 1) if type(low) is int and type(high) is int else None


_RULES: dict[str, Rule] = {
    **dict.fromkeys(MOVES, _first),
    "_to_copy": _first,
    "convert_element_type": _first,
    "cat": lambda node, made: _union(list(node.args[0]), made),
    "stack": lambda node, made: _union(list(node.args[0]), made),
    "where": lambda node, made: _union(list(node.args[1:]), made),
    "constant_pad_nd": _pad,
    "add": _arithmetic(operator.add),
    "sub": _arithmetic(operator.sub),
    "mul": _arithmetic(operator.mul),
    "minimum": _arithmetic(min),
    "maximum": _arithmetic(max),
    "clamp": _clamp,
    "clamp_min": _clamp,
    "clamp_max": _clamp,
    "remainder": _remainder,
    "bitwise_and": _and,
    "abs": _absolute,
    "neg": _negative,
    "full": _full,
    "full_like": _full,
    "scalar_tensor": _full,
    "iota": _iota,
    "argmax": _positions,
    "argmin": _positions,
    "bucketize": _bucket,
    "searchsorted": _bucket,
    "inductor_randint": _randint,
}
