"""Private torch that packing needs: the loops of Inductor's kernels.

Checked by running on torch 2.13.0 (CPU). Numbers packed eight to a byte are a sum over eight rows.
What makes the numbers walks over all rows in one loop, and Inductor's C++ fuses kernels only where
their loops are the same. Here the loop over the rows is written as one over every eighth and one,
inside of all others, over the eight: the same elements, each once, and the loops of the sum. Then
producer and packing are one kernel.
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
    """Whether the kernel is a sum of bytes over eight rows, on a CPU."""
    if not isinstance(node, SchedulerNode) or not isinstance(node.node, ir.ComputedBuffer):
        return False
    data = node.node.data
    if not isinstance(data, ir.Reduction) or node.node.get_device_or_error().type != "cpu":
        return False
    return data.dtype is torch.uint8 and list(data.reduction_ranges) == [8]


def _align(packing: list[Any], nodes: Sequence[Any]) -> None:
    """Give sums over rows, and all that walks over what they pack, the same loops."""
    while packing:
        first, *packing = packing
        (count,), whole = first._sizes[1], _product(first._sizes[0]) * 8
        sums, found = [first], list[Any]()
        reached = _names(first)
        while True:
            more = [n for n in nodes if n not in found and _walks(n, whole) and _names(n) & reached]
            also = [
                n for n in packing if _product(n._sizes[0]) * 8 == whole and _names(n) & reached
            ]
            if not more and not also:
                break
            found, sums = found + more, sums + also
            packing = [n for n in packing if n not in also]
            reached = reached.union(*map(_names, more + also))
        inner = tuple(first._sizes[0])
        finest = (inner[0] * count, *inner[1:])
        if {tuple(node._sizes[0]) for node in sums} != {inner}:
            continue
        if {tuple(node._sizes[0]) for node in found} - {finest, (whole,)}:
            continue
        for node in sums:
            _reindex(node, list(inner))
        for node in found:
            _reindex(node, list(finest))
            _split(node, int(count))


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
