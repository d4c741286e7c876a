"""The closed loop: lower a rung, look at its real peak, choose the next by the error seen."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from memcompile.draft import Drafted
from memcompile.ladder import Ladder, Rung
from memcompile.planner import Planner
from memcompile.split import Split, rewrite_whole, split
from memcompile.step import Step

#: Schedulings of one graph, Inductor's own included.
TRIES = 3


@dataclasses.dataclass(frozen=True)
class Tried:
    """A split and what it lowers to, in total bytes."""

    drafted: Drafted
    split: Split
    peak: int
    unpooled: int  #: the peak with no buffer held past its last use for another's sake
    pooled: bool = True  #: whether the lowering may hold them

    def within(self, budget: int | None) -> Tried:
        """The same with buffers freed at once, where that fits the budget or, with none, helps.

        It costs an allocation a buffer and no arithmetic.
        """
        helps = self.unpooled < self.peak
        fits = helps if budget is None else helps and self.unpooled <= budget < self.peak
        return dataclasses.replace(self, peak=self.unpooled, pooled=False) if fits else self


#: Total bytes of a split once lowered: buffers pooled, and not.
Lower = Callable[[Split, Drafted], tuple[int, int]]


class Search:
    """Looks for the cheapest rung whose lowered peak fits.

    Args:
        step: the step.
        planner: whose ladder it is.
        lower: lowers a split.
        first: Inductor's own split, lowered.
        held: bytes that earlier graphs of the step hold; part of every lowered peak.
    """

    def __init__(
        self, step: Step, planner: Planner, ladder: Ladder, lower: Lower, first: Tried, held: int
    ) -> None:
        self.step, self.planner, self.ladder = step, planner, ladder
        self.lower, self.first, self.held = lower, first, held
        self.least = first  #: the lowest peak seen

    def lowest(self) -> Tried:
        """The least lowered peak found, ties by time."""
        floor = self.ladder.floor
        tries = [self.first.within(None), self._try(floor, None)]
        # A rung a little above may lower better than it was predicted to.
        above = self.ladder.fit(floor.peak + (floor.peak - self.step.input_bytes()) // 20)
        if above is not None and above.plan.key() != floor.plan.key():
            tries.append(self._try(above, None))
        return min(tries, key=lambda t: (t.peak, t.drafted.seconds))

    def fitting(self, budget: int) -> Tried | None:
        """The cheapest tried rung whose lowered peak is at most ``budget``; ``None`` for none."""
        inputs = self.step.input_bytes()
        room = max(0, budget - inputs - self.held)
        error = self._error(self.first)
        fits: Tried | None = None
        rung = self.ladder.fit(inputs + int(room / max(1.0, error))) or self.ladder.floor
        for left in range(TRIES - 2, -1, -1):
            tried = self._try(rung, budget)
            error = self._error(tried)
            if tried.peak <= budget:
                if fits is None or tried.drafted.seconds < fits.drafted.seconds:
                    fits = tried
                slack = (budget - tried.peak) / max(1, room)
                looser = self.ladder.fit(inputs + int(0.99 * room / error))
                if left == 0 or slack < 0.03 or looser is None or looser.peak <= rung.peak:
                    return fits
                rung = looser
                continue
            if fits is not None:
                return fits
            target = inputs + int(0.97 * room / max(error, 1e-9))
            tighter = self.ladder.fit(min(target, rung.peak - 1)) or self.ladder.floor
            if tighter.plan.key() == rung.plan.key():
                break
            rung = tighter
        return fits

    def _try(self, rung: Rung, budget: int | None) -> Tried:
        drafted = self.planner.drafted(rung.plan)
        if self.step.late_from is not None:
            cut = Split(rewrite_whole(self.step, drafted), None)
        else:
            cut = split(self.step, drafted)
        tried = Tried(drafted, cut, *self.lower(cut, drafted)).within(budget)
        self.least = min((self.least, tried), key=lambda t: t.unpooled)
        return tried

    def _error(self, tried: Tried) -> float:
        """Lowered over predicted, both as step peaks."""
        inputs = self.step.input_bytes()
        lowered = tried.peak - inputs - self.held
        return max(1, lowered) / max(1, tried.drafted.peak - inputs)
