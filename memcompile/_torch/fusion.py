"""Private torch that fusion needs: Inductor's fusion heuristics.

Checked by running on torch 2.13.0.
"""

from __future__ import annotations

import bisect
import contextlib
import weakref
from collections.abc import Iterator
from typing import Any
from unittest import mock

from torch._inductor.codegen.cpp import CppScheduling
from torch._inductor.virtualized import V

from memcompile._torch import inductor_config, sizevar_hint
from memcompile._torch.packing import fused_packing
from memcompile._torch.transfers import is_transfer

__all__ = ["CppScheduling", "V", "in_order", "prompt_kernels"]

#: How the graphs of loops' bodies are named.
BODY = "loop_body"


@contextlib.contextmanager
def prompt_kernels(held: float) -> Iterator[None]:
    """Within the block, Inductor lets go of values promptly.

    Args:
        held: the share of the graph's largest buffer that one C++ function may hold of what
            it has done with. A function frees nothing before it ends, and Inductor puts all
            kernels between two library calls into one.

    Nor does it fuse what would move a value's life past a library call. What packs numbers is
    fused with what makes them (:func:`memcompile._torch.packing.fused_packing`).

    A kernel runs where its last part can. Inductor fuses, say, the half of a parameter's
    gradient that the first use gives with the sum at the other end of the backward, or a
    recomputed value with a kernel that shares an input but needs a later product: what the
    first part reads, and all that waits for it, stays alive until then (pytorch #193193).
    Inductor has a rule of this kind, by distance alone, for kernels that merely share an input.
    """
    given = V.choices
    base: Any = type(given)
    together = CppScheduling.ready_to_flush
    calls: weakref.WeakKeyDictionary[Any, list[int]] = weakref.WeakKeyDictionary()
    sizes: weakref.WeakKeyDictionary[Any, dict[str, int]] = weakref.WeakKeyDictionary()

    class Prompt(base):  # a user's own heuristics stay in force
        @staticmethod
        def can_fuse_vertical(scheduler: Any, one: Any, two: Any, score: int) -> bool:
            if _delays(scheduler, one, two) or _forbids_overwriting(scheduler, one, two):
                return False
            return bool(base.can_fuse_vertical(scheduler, one, two, score))

        @staticmethod
        def can_fuse_horizontal(scheduler: Any, one: Any, two: Any, score: int) -> bool:
            if scheduler not in calls:
                calls[scheduler] = _calls(scheduler)
            if _before(calls[scheduler], one) != _before(calls[scheduler], two):
                return False
            return bool(base.can_fuse_horizontal(scheduler, one, two, score))

    def ready_to_flush(self: Any) -> bool:
        scheduler = self.scheduler
        if scheduler not in sizes:
            sizes[scheduler] = _sizes(scheduler)
        size = sizes[scheduler]
        done = scheduler.buffer_names_to_free - V.graph.removed_buffers
        largest = max((size[name] for name in scheduler.name_to_buf), default=0)
        much = sum(size.get(name, 0) for name in done) >= max(1, held * largest)
        return much or bool(together(self))

    prompt = object.__new__(Prompt)
    prompt.__dict__.update(given.__dict__)
    apart = mock.patch.object(CppScheduling, "ready_to_flush", ready_to_flush)
    with V.set_choices_handler(prompt), apart, fused_packing():
        yield


@contextlib.contextmanager
def in_order(wanted: bool) -> Iterator[None]:
    """Within the block Inductor looks for no other order of kernels, where that is wanted.

    Copies to the host and back are where they are hidden; its estimate of memory counts what
    lies on the host as if it lay on the device, and nothing of what a loop's body holds.
    """
    with inductor_config.patch({"reorder_for_peak_memory": False} if wanted else {}):
        yield


def _sizes(scheduler: Any) -> dict[str, int]:
    """Bytes of every buffer and input, by name."""
    buffers = {name: buffer.node for name, buffer in scheduler.name_to_buf.items()}
    return {name: _bytes(node) for name, node in (*V.graph.graph_inputs.items(), *buffers.items())}


def _bytes(node: Any) -> int:
    try:
        return sizevar_hint(V.graph, node.get_numel()) * int(node.get_dtype().itemsize)
    except (AttributeError, NotImplementedError):  # no tensor
        return 0


def _delays(scheduler: Any, one: Any, two: Any) -> bool:
    """Whether fusing the two makes one wait for a library call that only the other needs."""
    early, late = (one, two) if one.min_order <= two.min_order else (two, one)
    for name in late.ancestors - early.ancestors:
        node = scheduler.name_to_node.get(name)
        if node is None or not node.is_extern() or _copies(node):
            continue
        if node.min_order > early.min_order:
            return True
    return False


def _forbids_overwriting(scheduler: Any, one: Any, two: Any) -> bool:
    """Whether fusing the two keeps the later from writing over what it reads, in a loop's body.

    It does where a third kernel reads that too and waits for the earlier one alone: it would
    come after both. (A loss reads one logit a row, by their sum, before their gradient is made.)
    """
    if not (V.graph.name or "").startswith(BODY):
        return False
    early, late = (one, two) if one.min_order <= two.min_order else (two, one)
    ours, theirs = set(early.get_operation_names()), set(late.get_operation_names())
    written = {_shape(buffer) for buffer in late.get_outputs()}
    for read in late.read_writes.reads:
        buffer = scheduler.name_to_buf.get(read.name)
        if buffer is None or _shape(buffer) not in written:
            continue
        for user in buffer.users:
            above: set[str] = getattr(user.node, "ancestors", set())
            if user.node.get_name() not in ours | theirs and ours & above and not theirs & above:
                return True
    return False


def _shape(buffer: Any) -> tuple[Any, ...]:
    node = buffer.node
    return (node.get_dtype(), *node.get_size()) if node.maybe_get_size() is not None else ()


def _calls(scheduler: Any) -> list[int]:
    """Where in the schedule the library calls stand, those that read nothing left out.

    Nor does it count what only begins or awaits a copy to or from the host.
    """
    return sorted(
        node.min_order
        for node in scheduler.name_to_node.values()
        if hasattr(node, "min_order")
        and node.is_extern()
        and node.read_writes.reads
        and not _copies(node)
    )


def _copies(node: Any) -> bool:
    """Whether the node is one of the ops that copy, or what such an op returns."""
    ir = node.node
    inner = [ir, *getattr(ir, "inputs", ())]
    return any(is_transfer(getattr(each, "op_overload", None)) for each in inner)


def _before(calls: list[int], node: Any) -> int:
    """How many library calls stand before the kernel."""
    return bisect.bisect(calls, node.min_order)
