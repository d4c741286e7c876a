"""Autograd's own copies: what the backward computes though the forward has the same numbers.

A norm's backward makes the normalised rows again from what the norm read. Only when it reads the
forward's own can one rounded value serve both. The forward may have read a contiguous copy where
the backward reads the value itself; then the numbers are the same, in memory in another order.
"""

from __future__ import annotations

import torch
from memcompile_passes.cast.casting import computed, inherited
from memcompile_passes.cast.islands import tensor
from torch import fx

from memcompile.analysis.ops import is_random, op_name
from memcompile.step import Step, hint, is_view

aten = torch.ops.aten


def merge_copies(step: Step, late: frozenset[fx.Node]) -> frozenset[fx.Node]:
    """Late nodes give way to early ones that have their numbers.

    Returns the late nodes there are then: those without readers are gone, and what lays numbers
    out in another order is new.
    """
    found, late_now = _copies(step, late), set(late)
    for node in reversed(list(found)):
        if node.users:
            same = _strides(node) == _strides(found[node])
            if is_view(node) and not same:
                continue
            made = [found[node]] if same else _laid_out(step, found[node], node)
            late_now.update([] if same else made)
            node.replace_all_uses_with(made[-1])
        step.graph.erase_node(node)
        late_now.discard(node)
    return frozenset(late_now)


def _copies(step: Step, late: frozenset[fx.Node]) -> dict[fx.Node, fx.Node]:
    """Late nodes, and who has their numbers, in order."""
    first: dict[object, fx.Node] = {}
    found: dict[fx.Node, fx.Node] = {}
    numbers: dict[fx.Node, fx.Node] = {}  #: a node, and the first that has the same ones

    def source(read: fx.Node) -> fx.Node:
        return numbers.get(read, read)

    for node in step.graph.nodes:
        if node.op != "call_function" or node in step.sides.late or is_random(node):
            continue
        if node in late and op_name(node) in ("alias", "detach"):
            found[node], numbers[node] = node.args[0], source(node.args[0])
            continue
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), source)
        known = first.setdefault((node.target, repr(args), repr(kwargs)), node)
        if known is not node and node in late and tensor(node) is not None:
            found[node] = known
        numbers[node] = source(node.args[0]) if op_name(node) == "clone" else source(known)
    return found


def _laid_out(step: Step, node: fx.Node, like: fx.Node) -> list[fx.Node]:
    """The numbers of ``node``, in memory in the order of ``like``, made right before that."""
    strides, made = _strides(like), [node]
    order = sorted(range(len(strides)), key=lambda dim: -strides[dim])
    back = sorted(range(len(strides)), key=order.__getitem__)
    for target, args, kwargs in (
        (aten.permute.default, (order,), {}),
        (aten.clone.default, (), {"memory_format": torch.contiguous_format}),
        (aten.permute.default, (back,), {}),
    ):
        with step.graph.inserting_before(like):
            new = step.graph.call_function(target, (made[-1], *args), kwargs)
        new.meta = inherited(like) | {"val": computed(target, new.args, new.kwargs)}
        made.append(new)
    return made[1:]


def _strides(node: fx.Node) -> list[int]:
    return [hint(stride) for stride in node.meta["val"].stride()]
