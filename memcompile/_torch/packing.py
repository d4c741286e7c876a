"""Private torch that packing needs: the loops of Inductor's kernels.

Checked by running on torch 2.13.0 (CPU). Numbers packed into words are a sum over eight rows, or
sixteen. What makes the numbers walks over all rows in one loop, and Inductor's C++ fuses kernels
only where their loops are the same. Here the loop over the rows is written as one over every eighth
and one, inside of all others, over the eight: the same elements, each once, and the loops of the
sum. Then producer and packing are one kernel.
"""

from __future__ import annotations

import contextlib
import functools
import operator
from collections.abc import Iterator, Sequence
from typing import Any
from unittest import mock

import torch
from torch._inductor import dependencies, ir
from torch._inductor.loop_body import LoopBody
from torch._inductor.scheduler import Scheduler, SchedulerNode

__all__ = ["LoopBody", "Scheduler", "SchedulerNode", "dependencies", "fused_packing", "ir"]

#: The dtypes of words, and of how many rows each is the sum.
WORDS = ((torch.uint8, 8), (torch.int32, 8), (torch.int32, 16))


@contextlib.contextmanager
def fused_packing() -> Iterator[None]:
    """Within the block, C++ kernels that pack numbers are fused with what makes those."""
    if not hasattr(SchedulerNode, "apply_loop_reindexing"):  # before 2.13
        yield
        return
    fuse = Scheduler.fuse_nodes

    def fuse_nodes(self: Any, nodes: list[Any]) -> list[Any]:
        _align([node for node in nodes if _packs(node)], nodes)
        return list(fuse(self, nodes))

    with mock.patch.object(Scheduler, "fuse_nodes", fuse_nodes):
        yield


def _packs(node: Any) -> bool:
    """Whether the kernel is a sum of rows to words, on a CPU."""
    if not isinstance(node, SchedulerNode) or not isinstance(node.node, ir.ComputedBuffer):
        return False
    data = node.node.data
    if not isinstance(data, ir.Reduction) or node.node.get_device_or_error().type != "cpu":
        return False
    return (data.dtype, *data.reduction_ranges) in WORDS


def _align(packing: list[Any], nodes: Sequence[Any]) -> None:
    """Give sums over rows, and all that walks over what they pack, the same loops."""
    while packing:
        sums, walking = _together(packing, nodes)
        packing = [node for node in packing if node not in sums]
        inner, (count,) = tuple(sums[0]._sizes[0]), sums[0]._sizes[1]
        finest = (inner[0] * count, *inner[1:])
        if any(tuple(node._sizes[0]) != inner for node in sums):
            continue
        flat = ((_product(finest),), finest)
        if not all(tuple(n._sizes[0]) in flat or _feeds(n, sums) for n in walking):
            continue
        for node in sums:
            _reindex(node, list(inner))
        for node in walking:
            _reindex(node, list(finest))
            _split(node, int(count))
        nodes = [node for node in nodes if node not in walking]


def _together(packing: Sequence[Any], nodes: Sequence[Any]) -> tuple[list[Any], list[Any]]:
    """The first sum and those beside it; what walks over their elements, and what makes those."""
    first = packing[0]
    (count,), words = first._sizes[1], _product(first._sizes[0])
    sums, walking = [first], list[Any]()
    near, read = _names(first), set[str]()  # by the sums; by what walks
    while True:
        more = [
            n
            for n in nodes
            if n not in walking
            and _walks(n, words * count)
            and (_names(n) & near or _writes(n) & read)
        ]
        also = [
            n
            for n in packing
            if n not in sums
            and n._sizes[1] == first._sizes[1]
            and _product(n._sizes[0]) == words
            and _names(n) & (near | read)
        ]
        if not more and not also:
            return sums, walking
        walking, sums = walking + more, sums + also
        near = near.union(*map(_names, also))
        read = read.union(*map(_names, more))


def _product(sizes: Sequence[Any]) -> Any:
    return functools.reduce(operator.mul, sizes, 1)


def _walks(node: Any, whole: Any) -> bool:
    """Whether the kernel is elementwise, over as many elements."""
    if not isinstance(node, SchedulerNode) or not isinstance(node.node, ir.ComputedBuffer):
        return False
    if not isinstance(node.node.data, ir.Pointwise) or node._sizes[1]:
        return False
    if node.node.get_device_or_error().type != "cpu":
        return False
    return bool(_product(node._sizes[0]) == whole)


def _feeds(node: Any, sums: Sequence[Any]) -> bool:
    """Whether the kernel makes, as it lies in memory, what nothing but the sums reads."""
    buffers = {buffer.get_name() for buffer in node.get_outputs()}
    users = {user.node for buffer in node.get_outputs() for user in buffer.users}
    return users <= set(sums) and all(
        dep.normalize().is_contiguous() for dep in node.read_writes.writes if dep.name in buffers
    )


def _writes(node: Any) -> set[str]:
    """Buffers it writes."""
    return {dep.name for dep in node.read_writes.writes}


def _names(node: Any) -> set[str]:
    """Buffers it reads or writes in full."""
    return {dep.name for dep in (*node.read_writes.reads, *node.read_writes.writes)}


def _reindex(node: Any, sizes: list[Any]) -> None:
    if list(node._sizes[0]) != sizes:
        node.apply_loop_reindexing(sizes)
    else:
        node.refresh_dependencies(normalize=False, need_clear_tiling_cache=True)


def _split(node: Any, count: int) -> None:
    """The outermost loop becomes one over every ``count`` rows and one, innermost, over those."""
    body = node._body
    first, *others = body.sizes[0]
    sizes: tuple[list[Any], list[Any]] = ([first // count, *others, count], [])

    def moved(*indices: Sequence[Any]) -> Any:
        outer, *inner, row = [each for index in indices for each in index]
        return body([outer * count + row, *inner], [])

    fresh, ranges = dependencies.index_vars_no_squeeze(*sizes, prefix="t")
    between = LoopBody(moved, fresh, ranges, *fresh)
    names, ranges = dependencies.index_vars_no_squeeze(*sizes, prefix="p")
    split = LoopBody(between, names, ranges, *names)
    node._before_loop_state_mutation()
    node._body, node._sizes = split, split.sizes
    device = node.node.get_device_or_error()
    node.group = (device, node.scheduler.get_backend(device).group_fn(node._sizes))
    node.refresh_dependencies(normalize=False, need_clear_tiling_cache=True)
