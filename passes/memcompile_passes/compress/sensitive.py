"""Sensitive: values that no lossy codec may touch, read off the graph.

A small error is harmless where it is multiplied with a gradient. It is not where it decides (a
comparison), where it is raised to a power (logits, distances), or where one number stands for many
(statistics of a norm or a softmax). What is meant goes by how a value is made and what reads it,
elementwise ops and views followed; users name ops and modules beside it.
"""

from __future__ import annotations

import enum
import operator
import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import fx

from memcompile.analysis.ops import REDUCTION, classify, is_named, op_name
from memcompile.analysis.timeline import Kind
from memcompile.step import Step, is_view

#: Reductions whose result is not a few numbers that stand for many.
_WIDE = frozenset(
    {"cat", "_softmax", "_log_softmax", "avg_pool2d", "avg_pool3d", "max_pool2d_with_indices"}
)
_STATISTICS = REDUCTION - _WIDE | {"linalg_vector_norm", "_cdist_forward", "sqrt", "rsqrt"}
_POWERS = frozenset(
    {
        "exp",
        "exp2",
        "expm1",
        "log",
        "log2",
        "log10",
        "log1p",
        "logsumexp",
        "reciprocal",
        "rsqrt",
        "sqrt",
        "acos",
        "asin",
        "_softmax",
        "_log_softmax",
        "prepare_softmax_online",
    }
)
_COMPARISONS = frozenset({"le", "lt", "ge", "gt", "eq", "ne"})
_STEPS = frozenset({"floor", "ceil", "round", "trunc", "fmod", "remainder", "frac"})
_ORDERED = frozenset({"sort", "topk", "max", "min", "argmax", "argmin", "kthvalue", "median"})
#: Ops that keep signs, or turn them all.
_SIGNED = frozenset({"relu", "neg", "clone", "convert_element_type", "_to_copy"})
#: Numbers beyond it stand for "masked".
_MASKED = 1e4


class Read(enum.IntEnum):
    """What the readers of a value make of it; of several, the largest."""

    FREELY = 0
    SIGN = 1  #: they ask whether it is above zero
    COMPARED = 2  #: they compare it, or round it
    POWER = 3  #: they take its exponential, logarithm, root or inverse


class Readers:
    """How the values of one step are read."""

    def __init__(self, step: Step) -> None:
        self._early = step.sides.early
        self._known: dict[fx.Node, Read] = {}

    @classmethod
    def of(cls, step: Step) -> Readers:
        """Those of a step, made once."""
        if step not in _KNOWN:
            _KNOWN[step] = cls(step)
        return _KNOWN[step]

    def read(self, value: fx.Node) -> Read:
        """By early readers, elementwise ops and views followed; library calls are not."""
        if value not in self._known:
            self._known[value] = self._walk(value)
        return self._known[value]

    def _walk(self, value: fx.Node) -> Read:
        found, stack, seen = Read.FREELY, [(value, True)], {value}
        while stack and found != Read.POWER:
            at, signed = stack.pop()
            for user in at.users:
                if user in seen or user not in self._early or user.op != "call_function":
                    continue
                seen.add(user)
                found = max(found, _reads(user, signed))
                if is_view(user) or (classify(user) == Kind.POINTWISE and _is_float(user)):
                    stack.append((user, signed and (is_view(user) or op_name(user) in _SIGNED)))
        return found


_KNOWN: weakref.WeakKeyDictionary[Step, Readers] = weakref.WeakKeyDictionary()


def _reads(user: fx.Node, signed: bool) -> Read:
    name = op_name(user)
    if name in _POWERS and not _is_bounded(user):
        return Read.POWER
    if name in ("sign", "sgn") or (name in _COMPARISONS and _is_number(user.args[1], 0)):
        return Read.SIGN if signed else Read.COMPARED
    if name in _COMPARISONS or name in _STEPS or name in _ORDERED:
        return Read.COMPARED
    rounds = classify(user) == Kind.POINTWISE and not is_view(user) and not _is_float(user)
    return Read.COMPARED if rounds else Read.FREELY


def _is_bounded(user: fx.Node) -> bool:
    """A sigmoid's ``1 / (1 + exp(-x))``, a GELU's ``exp(-x * x / 2)``: no steep slope."""
    if op_name(user) != "exp":
        return False
    readers = list(user.users)
    if readers and all(op_name(n) == "add" and _is_number(n.args[1], 1) for n in readers):
        return True
    (given,) = user.all_input_nodes
    share = _number(given.args[1]) if op_name(given) == "mul" else None
    (square, *_) = given.args or (None,)
    if share is None or not -1 <= share < 0 or not isinstance(square, fx.Node):
        return False
    return op_name(square) == "mul" and square.args[0] is square.args[1]


def _is_float(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and value.dtype.is_floating_point


def _is_number(given: Any, number: float) -> bool:
    return _number(given) == number


def _number(given: Any) -> float | None:
    """A number in the graph, or a tensor filled with one."""
    if isinstance(given, fx.Node) and op_name(given) in ("full", "full_like", "scalar_tensor"):
        given = given.args[0 if op_name(given) == "scalar_tensor" else 1]
    return float(given) if isinstance(given, (bool, int, float)) else None


# -- the list -----------------------------------------------------------------------------------


def is_statistic(value: fx.Node, step: Step) -> bool:
    """A mean, a sum, a maximum, a norm; or made elementwise of such alone."""
    stack, seen = [value], {value}
    while stack:
        at = stack.pop()
        if at.target is operator.getitem and not is_view(at):
            if at.args[1] == 0 and op_name(at.args[0]) not in _STATISTICS:
                return False  # what an op with several results is for
            continue
        if at.op == "call_function" and op_name(at) in _STATISTICS:
            continue
        made = [n for n in at.all_input_nodes if isinstance(n.meta.get("val"), torch.Tensor)]
        follows = is_view(at) or (at.op == "call_function" and classify(at) == Kind.POINTWISE)
        if not follows or not made:
            return False
        stack.extend(n for n in made if n not in seen)
        seen.update(made)
    return True


def is_compared(value: fx.Node, step: Step) -> bool:
    """Compared with another number than zero, or rounded: an error would decide."""
    return Readers.of(step).read(value) == Read.COMPARED


def is_logit(value: fx.Node, step: Step) -> bool:
    """An exponential, logarithm, root or inverse is taken of it."""
    return Readers.of(step).read(value) == Read.POWER


def is_masked(value: fx.Node, step: Step) -> bool:
    """Filled with a number that stands for "masked", which would be the scale of its group."""
    if op_name(value) not in ("where", "masked_fill"):
        return False
    found = [number for a in value.args[1:] if (number := _number(a)) is not None]
    return any(not abs(number) <= _MASKED for number in found)


def is_coordinate(value: fx.Node, step: Step) -> bool:
    """Its last dimension is three: places, differences of them, rotations."""
    tensor = value.meta["val"]
    return tensor.dim() > 1 and isinstance(tensor.shape[-1], int) and tensor.shape[-1] == 3


#: What ``default`` stands for.
KINDS: dict[str, Callable[[fx.Node, Step], bool]] = {
    "statistics": is_statistic,
    "logits": is_logit,
    "compared": is_compared,
    "masked": is_masked,
    "coordinates": is_coordinate,
}


def is_sensitive(value: fx.Node, step: Step, names: Iterable[str]) -> bool:
    """Whether one of ``names`` is meant: ``default``, a kind, an op's name, or a module's."""
    for name in names:
        kinds = KINDS.values() if name == "default" else [KINDS[name]] if name in KINDS else []
        if any(kind(value, step) for kind in kinds) or is_named(value, name):
            return True
    return False


def unknown(step: Step, name: str) -> bool:
    """Whether the name is neither a kind's, nor an op's or module's of the step."""
    return name not in ("default", *KINDS) and not any(is_named(n, name) for n in step.nodes)
