"""Plans none of which another beats, from the least peak up."""

from __future__ import annotations

import bisect
import dataclasses
from typing import Any

from memcompile.plan import Plan

#: Share of the room that is aimed for: what a draft leaves out is small, but not nothing.
AIM = 0.995
#: A rung drafted within this share of the room fits, whatever the draft leaves out.
SURE = 0.9


@dataclasses.dataclass(frozen=True)
class Rung:
    """One plan of the ladder."""

    peak: int  #: total bytes
    seconds: float  #: of the whole step
    plan: Plan
    planner: Any = dataclasses.field(default=None, compare=False)  #: whose step it plans
    drafted: Any = dataclasses.field(default=None, compare=False)  #: held for the planner


class Ladder:
    """Plans none of which another beats: peaks fall as seconds rise."""

    def __init__(self) -> None:
        self.rungs: list[Rung] = []

    def offer(self, rung: Rung) -> bool:
        """Add a rung unless one is at least as good in both; drop those it beats."""
        place = bisect.bisect_right(self.rungs, rung.peak, key=lambda r: r.peak)
        if place and self.rungs[place - 1].seconds <= rung.seconds:
            return False
        start = place
        if start and self.rungs[start - 1].peak == rung.peak:
            start -= 1
        stop = start
        while stop < len(self.rungs) and self.rungs[stop].seconds >= rung.seconds:
            stop += 1
        self.rungs[start:stop] = [rung]
        return True

    def fit(self, budget: int) -> Rung | None:
        """The cheapest rung whose peak is at most ``budget`` bytes."""
        place = bisect.bisect_right(self.rungs, budget, key=lambda r: r.peak)
        return self.rungs[place - 1] if place else None

    @property
    def floor(self) -> Rung:
        """The rung of the least peak."""
        return self.rungs[0]


def merged(*ladders: Ladder) -> Ladder:
    """The rungs of all that none beats."""
    found = Ladder()
    for ladder in ladders:
        for rung in ladder.rungs:
            found.offer(rung)
    return found


def fits_surely(ladder: Ladder, inputs: int, budget: int | None, held: int) -> bool:
    """Whether some rung is drafted well within ``budget`` total bytes; never for ``None``."""
    if budget is None:
        return False
    return ladder.fit(inputs + int(SURE * (budget - inputs - held))) is not None
