"""Bytes live at every node, for a list of ops in execution order.

Pure: it knows ops, bytes and lifetimes, nothing of graphs or passes. An op that
Inductor would inline into its readers, or keep inside one fused kernel, holds no
memory: :func:`materialise` models those two decisions (Inductor's ``realize``
thresholds and its vertical fusion), and the closed loop corrects what it gets wrong.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Sequence
from typing import Any


class Kind(enum.IntEnum):
    """How an op executes."""

    SOURCE = 0  #: alive when the graph starts: an input, a saved value, a tangent
    POINTWISE = 1  #: fuses into its readers
    REDUCTION = 2  #: one loop nest of its own, whose readers may fuse after it
    EXTERN = 3  #: a library call or a kernel that does not fuse: inputs and output are real
    PART = 4  #: one of the outputs of an EXTERN op, allocated by it


@dataclasses.dataclass(slots=True)
class Op:
    """One op of one side, in the order it runs.

    ``inputs`` are places of earlier ops in the list (views already resolved to their
    base). ``seconds`` is compute alone; bytes moved are charged where it is real.
    """

    node: Any
    kind: Kind
    inputs: tuple[int, ...]
    bytes: int
    seconds: float = 0.0
    heavy: bool = False  #: exp, sigmoid: Inductor will not compute it twice on a CPU
    drawn: bool = False  #: a random draw: Inductor makes it a buffer, however few read it
    keep: bool = False  #: alive when the graph ends
    owned: bool = True  #: for a source: the graph frees it after its last use
    work: int = 0  #: bytes alive inside it while it runs
    traffic: int = 0  #: bytes a read moves, where ``bytes`` is not it (inputs count as zero)


#: Inductor's defaults (``config.realize_reads_threshold`` and
#: ``config.realize_acc_reads_threshold``, torch 2.13).
REUSED_READS, ACCUMULATED_READS = 4, 8
#: Buffers between two that Inductor calls "long distant" (``are_long_distant_nodes``).
FAR = 64


@dataclasses.dataclass(slots=True)
class Real:
    """Which ops hold memory, what each reads when it runs, and its compute."""

    real: list[bool]
    reads: list[set[int] | None]
    seconds: list[float]
    level: list[int]  #: ops of one level, unbroken by a library call, can share a kernel


def materialise(ops: Sequence[Op], near: bool = True) -> Real:
    """Decide which ops hold memory and which vanish into their readers.

    ``near``: a reduction is fused with no reader far below it; Inductor alone would.
    """
    n = len(ops)
    users, hard = [0] * n, [op.keep for op in ops]
    for op in ops:
        for i in op.inputs:
            users[i] += 1
            if op.kind >= Kind.EXTERN:
                hard[i] = True
    real = [False] * n
    reads: list[set[int] | None] = [None] * n
    seconds = [0.0] * n
    level = [0] * n
    for j, op in enumerate(ops):
        if op.kind == Kind.SOURCE:
            real[j] = True
            continue
        touched: set[int] = set()
        cost = op.seconds
        for i in op.inputs:
            if real[i]:
                touched.add(i)
            else:
                touched |= reads[i] or set()
                cost += seconds[i]
        reads[j], seconds[j] = touched, cost
        external = op.kind >= Kind.EXTERN
        depth = 0
        for i in touched:
            step = ops[i].kind != Kind.SOURCE and (external or ops[i].kind >= Kind.EXTERN)
            depth = max(depth, level[i] + step)
        level[j] = depth
        real[j] = (
            op.kind != Kind.POINTWISE
            or hard[j]
            or op.drawn
            or (users[j] > 1 and (len(touched) > REUSED_READS or op.heavy))
            or len(touched) > ACCUMULATED_READS
        )
    _drop_inside_kernels(ops, hard, level, real, reads, seconds, near)
    return Real(real, reads, seconds, level)


def _drop_inside_kernels(
    ops: Sequence[Op],
    hard: list[bool],
    level: list[int],
    real: list[bool],
    reads: list[set[int] | None],
    seconds: list[float],
    near: bool,
) -> None:
    """A value that only its own fused kernel reads never reaches memory.

    A draw depends on nothing but its seed, so the one kernel that reads it can draw it.
    """
    first_level, last_level = [len(ops)] * len(ops), [-1] * len(ops)
    number, last_number = [0] * len(ops), [0] * len(ops)  # in Inductor's order of buffers
    buffers = 0
    for j, op in enumerate(ops):
        if real[j] and op.kind != Kind.SOURCE:
            number[j] = buffers = buffers + 1
            for i in reads[j] or ():
                first_level[i] = min(first_level[i], level[j])
                last_level[i] = max(last_level[i], level[j])
                last_number[i] = buffers
    inside = {
        j
        for j, op in enumerate(ops)
        if real[j]
        and not hard[j]
        and op.kind in (Kind.POINTWISE, Kind.REDUCTION)
        and last_level[j] == (first_level[j] if op.drawn else level[j])
        and not (near and op.kind == Kind.REDUCTION and last_number[j] - number[j] > FAR)
    }
    if not inside:
        return
    for j in range(len(ops)):
        touched = reads[j]
        if touched and not touched.isdisjoint(inside):
            merged = touched - inside
            for i in touched & inside:
                merged |= reads[i] or set()
                seconds[j] += seconds[i]
                seconds[i] = 0.0
            reads[j] = merged
    for j in inside:
        real[j] = False


@dataclasses.dataclass(slots=True)
class Timeline:
    """Bytes alive while each op runs, base excluded; ``live[j]`` belongs to ``ops[j]``."""

    ops: Sequence[Op]
    real: Real
    live: list[int]
    last: list[int]  #: place of the last op that needs each op's memory

    @property
    def peak(self) -> int:
        """The maximum, in bytes."""
        return max(self.live, default=0)

    @property
    def at(self) -> int:
        """Place of the op at the peak."""
        return max(range(len(self.live)), key=self.live.__getitem__, default=0)

    def alive(self, at: int) -> list[int]:
        """Places of the ops whose memory is alive while op ``at`` runs."""
        return [
            j
            for j, op in enumerate(self.ops)
            if self.real.real[j] and self.last[j] >= at and (op.kind == Kind.SOURCE or j <= at)
        ]

    def seconds(self, bandwidth: float, launch: float) -> float:
        """Predicted seconds: for each kernel the longer of its compute and its traffic.

        Fusible ops of one level that read the same buffer are taken to share that read
        (horizontal fusion). ``bandwidth`` is in bytes per second, ``launch`` in seconds.
        """
        total, shared = 0.0, set()
        ops, real = self.ops, self.real
        for j, op in enumerate(ops):
            if not real.real[j] or op.kind in (Kind.SOURCE, Kind.PART):
                continue
            traffic = op.bytes
            for i in real.reads[j] or ():
                if op.kind < Kind.EXTERN:
                    if (i, real.level[j]) in shared:
                        continue
                    shared.add((i, real.level[j]))
                traffic += ops[i].traffic or ops[i].bytes
            total += max(real.seconds[j], traffic / bandwidth) + launch
        return total


def simulate(ops: Sequence[Op], base: int = 0, near: bool = True) -> Timeline:
    """Walk ``ops`` once: allocate outputs, then free what was read for the last time.

    Args:
        ops: sources first, then ops in execution order.
        base: bytes alive throughout that no op owns.
        near: see :func:`materialise`.
    """
    real = materialise(ops, near)
    n = len(ops)
    last = [-1] * n
    for j, op in enumerate(ops):
        if op.keep or (op.kind == Kind.SOURCE and not op.owned):
            last[j] = n
        if op.kind == Kind.SOURCE or not real.real[j]:
            continue
        last[j] = max(last[j], j)
        for i in real.reads[j] or ():
            if last[i] < j:
                last[i] = j
    freed: list[int] = [0] * (n + 1)
    dies_into: list[list[int]] = [[] for _ in range(n)]
    current = base
    for j, op in enumerate(ops):
        if op.kind == Kind.SOURCE:
            current += op.bytes
        if real.real[j] and last[j] < n:
            place = max(last[j], 0)
            freed[place] += op.bytes
            if place != j:
                dies_into[place].append(op.bytes)
    live = [0] * n
    for j, op in enumerate(ops):
        if op.kind != Kind.SOURCE and real.real[j]:
            reuse = op.kind < Kind.EXTERN and op.bytes in dies_into[j]
            current += op.bytes
            live[j] = (current - op.bytes if reuse else current) + op.work
        else:
            live[j] = current
        current -= freed[j]
    return Timeline(ops, real, live, last)
