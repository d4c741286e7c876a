"""What loops read again in every trip, made contiguous in front of them.

A kernel runs along the innermost dimension of what it makes. Where an operand is strided there it
reads one element at a time: Inductor's C++ then leaves the whole kernel without vector
instructions, and a GPU fetches a line of memory an element. The bias of attention is such an
operand, as the linear layer that makes it leaves the heads innermost. One copy before a loop is
read in each of its trips.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import sympy
import torch
from torch import fx

from memcompile import _torch
from memcompile.analysis.ops import classify
from memcompile.analysis.timeline import Kind
from memcompile.layout import computed, copy_before, given_anew, put_body
from memcompile.lengths import size_expr
from memcompile.step import hint, is_view, loops_in, view_base

aten = torch.ops.aten

#: Reads of an element in one trip from which on a copy pays for what a trip has a slice of.
READS = 4


def make_contiguous(module: fx.GraphModule) -> None:
    """Copy what elementwise kernels in a graph's loops read along a stride, again and again.

    Args:
        module: the finished graph, changed in place; bodies that change are copied.
    """
    changed = False
    for loop in loops_in(module.graph):
        for at, value in enumerate(loop.args[3], len(loop.args[2])):
            changed |= isinstance(value, fx.Node) and _copy_before(module, loop, at, value)
    if changed:
        module.recompile()


def _copy_before(module: fx.GraphModule, loop: fx.Node, at: int, value: fx.Node) -> bool:
    """Whether a loop's input by that number is a contiguous copy now."""
    body = getattr(module, loop.args[1].target)
    order = _wanted(body.graph.find_nodes(op="placeholder")[at])
    if order is None:
        return False
    old = value.meta["val"]
    back = [order.index(dim) for dim in range(old.dim())]
    with _torch.detect_fake_mode([old]) or contextlib.nullcontext():
        new = old.permute(order).clone(memory_format=torch.contiguous_format).permute(back)
    try:
        body = given_anew(body, {at: new})
    except RuntimeError:  # a view that such an order does not have
        return False
    if not _makes_the_same(body, at):
        return False
    given = list(loop.args[3])
    given[at - len(loop.args[2])] = copy_before(loop, value, order, new)[-1]
    loop.update_arg(3, tuple(given))
    put_body(module, loop, body)
    return True


def _readers(node: fx.Node, whole: bool = True) -> Iterator[tuple[fx.Node, fx.Node, bool]]:
    """What reads views of a node: the reader, the view, and whether each trip has the same one."""
    for user in node.users:
        if is_view(user) and user.args[0] is node:
            fixed = all(view_base(user) is each for each in user.all_input_nodes)
            yield from _readers(user, whole and fixed)
        else:
            yield user, node, whole


def _wanted(given: fx.Node) -> list[int] | None:
    """The order of an input's dimensions, outermost first, that its largest reader wants."""
    value = given.meta["val"]
    if not isinstance(value, torch.Tensor):
        return None
    order, most = None, 0
    for reader, view, whole in _readers(given):
        made, read = reader.meta.get("val"), view.meta["val"]
        if not isinstance(made, torch.Tensor) or classify(reader) != Kind.POINTWISE:
            return None  # how others want it is theirs
        number = hint(made.numel())
        if number > most and (whole or number >= READS * hint(read.numel())):
            order, most = _along(value, read, made), number
    return order


def _lies(value: torch.Tensor) -> tuple[list[int], list[int]]:
    """Sizes and strides, in this trace where they are symbolic."""
    return [hint(size) for size in value.shape], [hint(each) for each in value.stride()]


def _along(value: torch.Tensor, read: torch.Tensor, made: torch.Tensor) -> list[int] | None:
    """The dimensions of ``value`` with the one innermost that a kernel making ``made`` runs along.

    ``None`` where that is so already, or where ``read`` is one number there.
    """
    sizes, strides = _lies(made)
    runs = min(
        (dim for dim, size in enumerate(sizes) if size > 1),
        key=lambda dim: (strides[dim], -dim),
        default=None,
    )
    if runs is None or (at := runs - made.dim() + read.dim()) < 0:
        return None
    sizes, strides = _lies(read)
    step = strides[at]
    if sizes[at] == 1 or step in (0, 1):
        return None
    sizes, strides = _lies(value)
    dims = [dim for dim, size in enumerate(sizes) if size > 1]
    found = [dim for dim in dims if strides[dim] == step]
    if len(found) != 1 or any(strides[dim] == 0 for dim in dims):
        return None
    rest = sorted(set(range(value.dim())) - set(found), key=lambda dim: -strides[dim])
    return rest + found


def _exactly(value: torch.Tensor) -> list[sympy.Expr]:
    """Strides at every length."""
    return [size_expr(each) for each in value.stride()]


def _makes_the_same(body: fx.GraphModule, at: int) -> bool:
    """Whether all that reads a body's input makes a tensor that lies as the body notes it."""
    given = body.graph.find_nodes(op="placeholder")[at]
    with _torch.detect_fake_mode([given.meta["val"]]) or contextlib.nullcontext():
        return all(
            _exactly(computed(reader, {})) == _exactly(reader.meta["val"])
            for reader, _, _ in _readers(given)
        )
