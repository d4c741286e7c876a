"""When copies between device and host are over, and when they must begin.

Pure: it knows places of ops, their seconds, and bytes. All copies of a side queue on one stream,
which runs beside the kernels. A copy out is waited for where it is over, so that its source can go;
a copy back begins so early that it is over where it is read. Where the link is too slow for that
the kernels wait, and the seconds they do are the move's.
"""

from __future__ import annotations

import bisect
import dataclasses
import itertools
from collections import deque
from collections.abc import Sequence

#: Copies are taken to last so many times as long as measured: kernels use the memory, too.
MARGIN = 1.1


@dataclasses.dataclass(frozen=True)
class Copy:
    """One copy of a side.

    ``at`` is the place of the op that begins it (out) or of the one that reads it (back). Out:
    ``until`` is the place of the last op that reads what is copied. ``waits``: the kernels wait
    rather than hold device memory for longer.
    """

    at: int
    bytes: int
    waits: bool = False
    until: int = 0


@dataclasses.dataclass(frozen=True)
class Schedule:
    """For each copy a place, and the seconds of all.

    Out: the copy is waited for after the op at that place. Back: it begins before it.
    """

    places: tuple[int, ...]
    busy: float = 0.0  #: seconds that the link copies
    stalls: tuple[float, ...] = ()  #: seconds that the kernels wait for each


def out(copies: Sequence[Copy], seconds: Sequence[float], rate: float) -> Schedule:
    """Where each copy to the host is over.

    Args:
        copies: in the order in which they begin.
        seconds: of each op.
        rate: of the link, bytes/s.
    """
    begins: dict[int, list[int]] = {}
    for number, copy in enumerate(copies):
        begins.setdefault(copy.at, []).append(number)
    places = [len(seconds) - 1] * len(copies)
    ends: dict[int, float] = {}
    queue: deque[int] = deque()
    stalls = [0.0] * len(copies)
    clock = free = 0.0
    for place, spent in enumerate(seconds):
        clock += spent
        for number in begins.get(place, ()):
            free = ends[number] = max(free, clock) + _lasts(copies[number], rate)
            queue.append(number)
        due = [n for n in queue if copies[n].waits and copies[n].until <= place]
        if place == len(seconds) - 1:
            due = list(queue)
        for number in list(queue)[: list(queue).index(due[-1]) + 1] if due else ():
            clock = _wait(number, ends, clock, stalls)  # one is over after those before it
        while queue and ends[queue[0]] <= clock:
            places[queue.popleft()] = place
    return Schedule(tuple(places), _busy(copies, rate), tuple(stalls))


def back(copies: Sequence[Copy], seconds: Sequence[float], rate: float) -> Schedule:
    """Where each copy from the host begins; arguments as for :func:`out`, in the order of reading.

    As late as possible, counted from the last one backwards.
    """
    starts = list(itertools.accumulate(seconds, initial=0.0))
    places = [copy.at for copy in copies]
    next_begins = float("inf")
    for number in reversed(range(len(copies))):
        copy = copies[number]
        if copy.waits:
            continue
        next_begins = min(starts[copy.at], next_begins) - _lasts(copy, rate)
        places[number] = min(copy.at, max(0, bisect.bisect_right(starts, next_begins) - 1))
    return begun(copies, places, seconds, rate)


def begun(
    copies: Sequence[Copy], places: Sequence[int], seconds: Sequence[float], rate: float
) -> Schedule:
    """Seconds of copies from the host that begin at ``places``; arguments as for :func:`back`."""
    begins: dict[int, list[int]] = {}
    reads: dict[int, list[int]] = {}
    for number, copy in enumerate(copies):
        begins.setdefault(places[number], []).append(number)
        reads.setdefault(copy.at, []).append(number)
    ends: dict[int, float] = {}
    stalls = [0.0] * len(copies)
    clock = free = 0.0
    for place, spent in enumerate(seconds):
        for number in begins.get(place, ()):
            free = ends[number] = max(free, clock) + _lasts(copies[number], rate)
        for number in reads.get(place, ()):
            clock = _wait(number, ends, clock, stalls)
        clock += spent
    return Schedule(tuple(places), _busy(copies, rate), tuple(stalls))


def _wait(number: int, ends: dict[int, float], clock: float, stalls: list[float]) -> float:
    """The time when the kernels go on; what they wait for is noted."""
    stalls[number] += max(0.0, ends[number] - clock)
    return max(clock, ends[number])


def _lasts(copy: Copy, rate: float) -> float:
    return MARGIN * copy.bytes / rate


def _busy(copies: Sequence[Copy], rate: float) -> float:
    return sum(_lasts(copy, rate) for copy in copies)
