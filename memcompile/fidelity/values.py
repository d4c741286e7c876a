"""Run one node: as it was traced, or in double precision."""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

from memcompile.analysis.ops import is_random, op_name
from memcompile.testing.numbers import Result, norms, own, relative, wide

#: A gradient whose norm is below this share of the largest one's is judged by that share.
FLOOR = 1e-4

Env = dict[fx.Node, Any]


def as_traced(node: fx.Node, env: Mapping[fx.Node, Any], owner: fx.GraphModule) -> Any:
    """The node's value from ``env``'s, each first rounded to the dtype it was traced with."""
    return _call(node, lambda arg: rounded(env[arg], arg), owner, lambda value: value)


def in_double(node: fx.Node, env: Mapping[fx.Node, Any], owner: fx.GraphModule) -> Any:
    """The node's value in double precision; where the op has none, as traced."""
    try:
        if _has_no_double(node):
            raise NotImplementedError
        return widest(_call(node, lambda arg: widest(env[arg]), owner, wide))
    except (RuntimeError, TypeError, NotImplementedError):
        return widest(as_traced(node, env, owner))


def rounded(value: Any, node: fx.Node) -> Any:
    """A value in the dtype that its node was traced with."""
    return _like(value, node.meta.get("val"))


def widest(value: Any) -> Any:
    """A value, or each of several, in double precision."""
    return fx.node.map_aggregate(value, wide)


def error(value: Any, exact: Any) -> float:
    """The relative error of a node's value; of several tensors the largest."""
    if isinstance(value, (list, tuple)) and isinstance(exact, (list, tuple)):
        return max((error(v, e) for v, e in zip(value, exact, strict=False)), default=0.0)
    return apart(value, exact, 0.0) if is_float(value) and is_float(exact) else 0.0


def apart(value: Any, exact: Any, scale: float) -> float:
    """:func:`relative`, where a number that is none is infinitely far from one that is."""
    found = relative(value, exact, scale)
    return math.inf if math.isnan(found) else found


def under(result: Result, scale: float) -> bool:
    """Whether a tensor is zero, or under the floor of its group.

    What it is off by is then told beside the floor, and counts for nothing: gradients that
    are zero but for rounding have no digit to lose.
    """
    norm = norms([result])[result.group]
    return norm == 0 or norm < FLOOR * scale


def is_float(value: Any) -> bool:
    """Whether it is a tensor of numbers that are rounded."""
    return isinstance(value, torch.Tensor) and (value.is_floating_point() or value.is_complex())


def _like(value: Any, traced: Any) -> Any:
    if isinstance(value, torch.Tensor) and isinstance(traced, torch.Tensor):
        return value.to(traced.dtype)
    if isinstance(value, (list, tuple)) and isinstance(traced, (list, tuple)):
        return type(value)(_like(v, t) for v, t in zip(value, traced, strict=True))
    return value


def _has_no_double(node: fx.Node) -> bool:
    """Whether the op means its own dtypes: it draws, reads bits, or runs graphs."""
    known = node.meta.get("memcompile_no_double")  # asked of each node very often
    if known is None:
        known = is_drawn(node) or "view.dtype" in str(node.target) or runs_graphs(node)
        node.meta["memcompile_no_double"] = known
    return bool(known)


def is_drawn(node: fx.Node) -> bool:
    """Whether running the node op by op draws, from a seed or without one."""
    return is_random(node) or op_name(node) in ("inductor_random", "inductor_randint")


def runs_graphs(node: fx.Node) -> bool:
    """Whether the op runs graphs of its own, such as a loop: their dtypes are written in them."""
    return any(arg.op == "get_attr" and "val" not in arg.meta for arg in node.all_input_nodes)


def _call(node: fx.Node, read: Any, owner: fx.GraphModule, change: Any) -> Any:
    if node.op == "get_attr":
        return operator.attrgetter(str(node.target))(owner)
    schema = getattr(node.target, "_schema", None)
    writes = schema is not None and schema.is_mutable

    def given(arg: fx.Node) -> Any:
        return own(read(arg)) if writes else read(arg)

    args, kwargs = fx.node.map_arg((node.args, node.kwargs), given)
    args, kwargs = fx.node.map_aggregate((args, kwargs), change)
    return node.target(*args, **kwargs)
