"""Bytes live at every node, for a list of ops in execution order.

Pure: it knows ops, bytes and lifetimes, nothing of graphs or passes. An op that
Inductor would inline into its readers, or keep inside one fused kernel, holds no
memory: :func:`materialise` models those two decisions (Inductor's ``realize``
thresholds and its vertical fusion), and the closed loop corrects what it gets wrong.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Mapping, Sequence
from typing import Any


class Kind(enum.IntEnum):
    """How an op executes."""

    SOURCE = 0  #: alive when the graph starts: an input, a saved value, a tangent
    POINTWISE = 1  #: fuses into its readers
    REDUCTION = 2  #: one loop nest of its own, whose readers may fuse after it
    EXTERN = 3  #: a library call or a kernel that does not fuse: inputs and output are real
    PART = 4  #: one of the outputs of an EXTERN op, allocated by it


#: The same as plain numbers: a step is walked hundreds of times.
SOURCE, POINTWISE, EXTERN, PART = map(int, (Kind.SOURCE, Kind.POINTWISE, Kind.EXTERN, Kind.PART))


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
    reshaped: tuple[int, ...] = ()  #: those of ``inputs`` that are read in another shape
    moved: tuple[int, ...] = ()  #: those read in another order than the result is written in
    breaks: frozenset[int] = frozenset()  #: between which dimensions its loops are not merged
    moves: int = 0  #: bytes that it begins to copy between host and device, beside other work
    over: tuple[int, ...] = ()  #: those of ``inputs`` whose place it writes in, if they die there
    group: str = ""  #: of loops that fill the same buffers, and of what they give


#: Inductor's defaults (``config.realize_reads_threshold`` and
#: ``config.realize_acc_reads_threshold``, torch 2.13).
REUSED_READS, ACCUMULATED_READS = 4, 8


#: A C++ function ends where what it has done with is this share of the largest value.
HELD = 1 / 16


@dataclasses.dataclass(slots=True)
class Real:
    """Which ops hold memory, what each reads when it runs, and its compute."""

    real: list[bool]
    reads: list[set[int] | None]
    seconds: list[float]
    awaits: list[int]  #: the library calls each waits for, a bit for each op's place
    summed: dict[int, set[int]]  #: for some ops: what a reduction in the same kernel reads too
    own: list[set[int]]  #: what each reads itself, other ops of its kernel left out
    moved: list[set[int]]  #: what each reads in another order than it writes


def materialise(ops: Sequence[Op]) -> Real:
    """Decide which ops hold memory and which vanish into their readers."""
    n = len(ops)
    users, hard = [0] * n, [op.keep for op in ops]
    copied = [False] * n  # real, but only in the shape a library call reads it in
    called = [op.kind >= EXTERN for op in ops]
    for op, call in zip(ops, called, strict=True):
        for i in op.inputs:
            users[i] += 1
        if call:
            for i in op.inputs:
                if i in op.reshaped:
                    copied[i] = True
                else:
                    hard[i] = True
    for j, copy in enumerate(copied):
        if copy and users[j] == 1:
            hard[j] = True
    real = [False] * n
    reads: list[set[int] | None] = [None] * n
    seconds = [0.0] * n
    awaits = [0] * n
    heavy = [op.heavy for op in ops]  # itself, or what it computes on the way
    nothing: set[int] = set()
    moved = [nothing] * n
    breaks = [op.breaks for op in ops]
    for j, op in enumerate(ops):
        if op.kind == SOURCE:
            real[j] = True
            continue
        touched: set[int] = set()
        cost = op.seconds
        for i in op.inputs:
            if real[i] or (copied[i] and i in op.reshaped):
                touched.add(i)
                if i in op.moved:
                    moved[j] = moved[j] | {i}
            else:
                inner = reads[i]
                if inner:
                    touched |= inner
                other = inner if i in op.moved else moved[i]
                if other:
                    moved[j] = moved[j] | other
                if breaks[i]:
                    breaks[j] = breaks[j] | breaks[i]
                cost += seconds[i]
                if heavy[i]:
                    heavy[j] = True
        reads[j], seconds[j] = touched, cost
        calls = 0
        for i in touched:
            calls |= awaits[i]
            if called[i] and not ops[i].moves:
                calls |= 1 << i
        awaits[j] = calls
        real[j] = (
            op.kind != POINTWISE
            or hard[j]
            or op.drawn
            or (users[j] > 1 and (len(touched) > REUSED_READS or heavy[j]))
            or len(touched) > ACCUMULATED_READS
        )
    for j, copy in enumerate(copied):
        if copy:
            real[j] = hard[j] = True
    own = [touched or nothing for touched in reads]
    summed = _drop_inside_kernels(ops, hard, awaits, real, reads, seconds, moved, breaks)
    return Real(real, reads, seconds, awaits, summed, own, moved)


def _drop_inside_kernels(
    ops: Sequence[Op],
    hard: list[bool],
    awaits: list[int],
    real: list[bool],
    reads: list[set[int] | None],
    seconds: list[float],
    moved: list[set[int]],
    breaks: list[frozenset[int]],
) -> dict[int, set[int]]:
    """A value that only its own fused kernel reads never reaches memory.

    A draw depends on nothing but its seed, so the one kernel that reads it can draw it.
    Returns, for ops whose kernel holds such a reduction, what that one reads.
    """
    loose = [real[j] and not hard[j] and SOURCE < op.kind < EXTERN for j, op in enumerate(ops)]
    start: dict[int, int] = {}  # where the kernel that would hold a value begins
    for j, op in enumerate(ops):
        if not real[j] or op.kind == SOURCE:
            continue
        for i in reads[j] or ():
            if loose[i]:
                first = start.setdefault(i, j if ops[i].drawn else i)
                loose[i] = not (awaits[j] & ~awaits[first]) >> first
    inside = {i for i in start if loose[i]}
    summed: dict[int, set[int]] = {}
    if not inside:
        return summed
    for j in range(len(ops)):
        touched = reads[j]
        if touched and not touched.isdisjoint(inside):
            merged = touched - inside
            for i in touched & inside:
                merged |= reads[i] or set()
                other = reads[i] if i in moved[j] else moved[i]
                if other:
                    moved[j] = moved[j] | other
                if ops[i].kind == Kind.REDUCTION and breaks[i] != breaks[j]:
                    summed.setdefault(j, set()).update(reads[i] or ())
                if i in summed:
                    summed.setdefault(j, set()).update(summed[i])
                seconds[j] += seconds[i]
                seconds[i] = 0.0
            reads[j] = merged
    for j in inside:
        real[j] = False
    return summed


@dataclasses.dataclass(slots=True)
class Timeline:
    """Bytes alive while each op runs, base excluded; ``live[j]`` belongs to ``ops[j]``."""

    ops: Sequence[Op]
    real: Real
    live: list[int]
    last: list[int]  #: place of the last op that needs each op's memory
    since: Mapping[int, int]  #: for some ops: where their memory is taken, before they run
    over: dict[int, int]  #: for some loops: bytes of what they read that they write over

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
            if self.real.real[j]
            and self.last[j] >= at
            and (op.kind == Kind.SOURCE or self.since.get(j, j) <= at)
        ]

    def seconds(self, bandwidth: float, launch: float) -> float:
        """Predicted seconds: for each kernel the longer of its compute and its traffic.

        Fusible ops that wait for the same library calls and read the same buffer are taken
        to share that read (horizontal fusion). ``bandwidth`` is in bytes per second,
        ``launch`` in seconds.
        """
        total = 0.0
        for seconds in kernel_seconds(self.ops, self.real, bandwidth, launch):
            total += seconds
        return total


def kernel_seconds(ops: Sequence[Op], real: Real, bandwidth: float, launch: float) -> list[float]:
    """Predicted seconds of each op: see :meth:`Timeline.seconds`. A copy's are those to begin it
    and to wait for it."""
    found = [0.0] * len(ops)
    shared: set[int] = set()  #: what was read since the last library call
    sizes = [op.traffic or op.bytes for op in ops]
    for j, op in enumerate(ops):
        if op.moves:
            found[j] = 2 * launch
            continue
        call = op.kind >= EXTERN
        if call:
            shared = set()
        if not real.real[j] or op.kind in (SOURCE, PART):
            continue
        traffic = op.bytes
        for i in real.reads[j] or ():
            if not call:
                if i in shared:
                    continue
                shared.add(i)
            traffic += sizes[i]
        found[j] = max(real.seconds[j], traffic / bandwidth) + launch
    return found


def simulate(
    ops: Sequence[Op],
    base: int = 0,
    grouped: bool = False,
    parted: bool = False,
    real: Real | None = None,
    held: Mapping[int, int] | None = None,
    since: Mapping[int, int] | None = None,
) -> Timeline:
    """Walk ``ops`` once: allocate outputs, then free what was read for the last time.

    Args:
        ops: sources first, then ops in execution order.
        base: bytes alive throughout that no op owns.
        grouped: kernels between two library calls are one call, which allocates all it
            writes before it starts and frees nothing until it ends (Inductor's C++ does so),
            which is where it has done with much (``HELD``).
        parted: what reads a value for its sums and then writes in its place are two kernels
            where a third reads it too and waits for the sums (in a loop's body they are).
        real: of these ops, where it is known.
        held: for some ops, the place up to which their memory is held at least.
        since: for some ops, the place before which it is taken, ahead of their own.
    """
    real = materialise(ops) if real is None else real
    last = last_needs(ops, real)
    since = since or {}
    n = len(ops)
    longer = {j for j, place in (held or {}).items() if place > last[j]}
    for j in longer:
        last[j] = (held or {})[j]
    freed: list[int] = [0] * (n + 1)
    dies_into: dict[int, list[int]] = {}
    current = base
    for j, op in enumerate(ops):
        if op.kind == SOURCE:
            current += op.bytes
        if real.real[j] and last[j] < n:
            place = max(last[j], 0)
            freed[place] += op.bytes
            if place != j and j not in longer:
                dies_into.setdefault(place, []).append(j)
    taken: dict[int, int] = {}
    for j, place in since.items():
        taken[place] = taken.get(place, 0) + ops[j].bytes
    live = [0] * n
    over: dict[int, int] = {}
    waiting = 0  # bytes the present call has done with
    largest = max((op.bytes for j, op in enumerate(ops) if real.real[j]), default=0)
    for j, op in enumerate(ops):
        current += taken.get(j, 0)
        alone = op.kind >= EXTERN or not grouped
        if alone:
            current, waiting = current - waiting, 0
        if op.kind != SOURCE and real.real[j] and j not in since:
            summed = real.summed.get(j, set())
            if parted and summed:
                thirds = (read & real.own[k] for k, read in real.summed.items() if k < j)
                summed = summed - set().union(*thirds)
            reuse = op.kind < EXTERN and any(
                ops[i].bytes == op.bytes
                and i not in summed
                and i not in real.moved[j]
                and not ops[i].group  # Inductor writes nothing in the place of what a loop wrote
                for i in dies_into.get(j, ())
            )
            if op.over:
                dying = [i for i in _written_over(ops, last, j) if i not in longer]
                over[j] = sum(ops[i].bytes for i in dying)
                if op.kind == PART and dying:  # its memory is that of what dies
                    current -= op.bytes
                    freed[last[dying[0]]] -= op.bytes
            current += op.bytes
            live[j] = (current - op.bytes if reuse else current) + op.work
            if op.kind != PART:
                live[j] -= over.get(j, 0)
            if reuse:
                current -= op.bytes
                freed[j] -= op.bytes
        else:
            live[j] = current
        waiting += freed[j]
        if alone or waiting >= HELD * largest:
            current, waiting = current - waiting, 0
    return Timeline(ops, real, live, last, since, over)


def _written_over(ops: Sequence[Op], last: list[int], j: int) -> list[int]:
    """What an op writes over: of what it may, that which nothing else reads later."""
    op = ops[j]
    ends = {i: last[i] for i in op.over if ops[i].kind != SOURCE and last[i] < len(ops)}
    same = op.group or None  # loops that fill the same buffers end together
    return [i for i, end in ends.items() if end == j or ops[end].group == same]


def last_needs(ops: Sequence[Op], real: Real) -> list[int]:
    """The place of the last op that needs each op's memory; ``len(ops)`` for what stays."""
    n = len(ops)
    last = [-1] * n
    for j, op in enumerate(ops):
        if op.keep or (op.kind == SOURCE and not op.owned):
            last[j] = n
        if op.kind == SOURCE or not real.real[j]:
            continue
        last[j] = max(last[j], j)
        for i in real.reads[j] or ():
            if last[i] < j:
                last[i] = j
    return last
