"""Values that no input of the graph reaches, such as masks made of ``arange``: computed."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx

from memcompile import _torch
from memcompile.analysis.ops import classify, op_name, runs_twice
from memcompile.analysis.timeline import Kind
from memcompile.step import is_view

#: Of how many ops one is computed, at most.
OPS = 96
#: Values of more elements are not computed.
LARGEST = 2**24
_MADE = frozenset({"full", "full_like", "scalar_tensor", "iota", "arange"})

#: Where passes run, ops give fake tensors; within this, real ones.
real_tensors = _torch.unset_fake_temporarily


@real_tensors()
def fixed(given: Any) -> torch.Tensor | None:
    """The value on the CPU of a node that no input reaches, or of a number.

    ``None`` where it hangs on the data, where its size is not known or above :data:`LARGEST`, and
    where it is drawn. Call it, and use what it gives, within :func:`real_tensors`.
    """
    if isinstance(given, (int, float, bool)):
        return torch.tensor(given)
    if not isinstance(given, fx.Node):
        return None
    chain: dict[fx.Node, None] = {}
    waiting = [given]
    while waiting:
        node = waiting.pop()
        if node in chain:
            continue
        if not _is_fixed(node) or len(chain) > OPS:
            return None
        chain[node] = None
        waiting += node.all_input_nodes
    return _value(given, {})


def _is_fixed(node: fx.Node) -> bool:
    """Whether the node is computed from what it reads alone, and small."""
    if not runs_twice(node) or not isinstance(node.meta.get("val"), torch.Tensor):
        return False
    shape = node.meta["val"].shape
    if any(type(n) is not int for n in shape) or math.prod(shape) > LARGEST:
        return False
    if not node.all_input_nodes:
        return op_name(node) in _MADE
    return is_view(node) or classify(node) == Kind.POINTWISE


def _value(node: fx.Node, known: dict[fx.Node, torch.Tensor]) -> torch.Tensor:
    if node not in known:
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda a: _value(a, known))
        if "device" in kwargs:
            kwargs = {**kwargs, "device": torch.device("cpu")}
        known[node] = node.target(*args, **kwargs)
    return known[node]
