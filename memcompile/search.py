"""The closed loop: lower a rung, look at its real peak, choose the next by the error seen."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from memcompile.ladder import AIM, Ladder, Rung
from memcompile.plan import Drafted
from memcompile.planner import Planner
from memcompile.split import Split, rewrite_whole, split
from memcompile.step import Step, is_loop

#: Peaks that are as good as the least one of a step with loops, as multiples of it: the last bytes
#: of it cost many chunks.
NEAR = 1.01
#: Of the seconds drafted for a floor with loops, what a rung above must do with to be tried, too.
SOONER = 0.99
#: A draft further above what was lowered than this wastes memory, and is tried anew.
WASTE = 0.95


@dataclasses.dataclass(frozen=True)
class Tried:
    """A split and what it lowers to, in total bytes."""

    step: Step
    drafted: Drafted
    split: Split
    peak: int
    unpooled: int  #: the peak with no buffer held past its last use for another's sake
    pooled: bool = True  #: whether the lowering may hold them
    prompt: bool = False  #: whether kernels are kept from waiting for others' library calls

    def within(self, budget: int | None) -> Tried:
        """The same with buffers freed at once, where that fits the budget or, with none, helps.

        It costs an allocation a buffer and no arithmetic.
        """
        helps = self.unpooled < self.peak
        fits = helps if budget is None else helps and self.unpooled <= budget < self.peak
        return dataclasses.replace(self, peak=self.unpooled, pooled=False) if fits else self


#: Total bytes of a split once lowered: buffers pooled, and not.
Lower = Callable[[Step, Split, Drafted], tuple[int, int]]


class Search:
    """Looks for the cheapest rung whose lowered peak fits.

    Args:
        step: the step as captured; a rung may plan it with some of its regions as loops.
        ladder: the rungs.
        lower: lowers a split that we planned.
        first: Inductor's own split, lowered.
        held: bytes that earlier graphs of the step hold; part of every lowered peak.
    """

    def __init__(self, step: Step, ladder: Ladder, lower: Lower, first: Tried, held: int) -> None:
        self.step, self.ladder = step, ladder
        self.lower, self.first, self.held = lower, first, held
        self.least = first  #: the lowest peak seen
        self.known: dict[tuple[int, int | None], tuple[Rung, Tried]] = {}

    def lowest(self) -> Tried:
        """The least lowered peak found, ties by time; with loops what is as good is a tie."""
        least, inputs = self.ladder.floor.peak, self.step.input_bytes()
        near = NEAR if _has_loops(self.ladder.floor) else 1.0
        floor = self.ladder.fit(inputs + int(near * (least - inputs))) or self.ladder.floor
        tries = [self.first.within(None), self._try(floor, None)]
        above = self._above(tries[1])
        sooner = above.seconds <= SOONER * floor.seconds
        if above is not floor and (sooner or not _has_loops(floor)):
            tries.append(self._try(above, None))
        inputs += self.held
        least = min(tried.peak for tried in tries)
        most = min(tries[0].peak, inputs + int(near * (least - inputs)))
        able = [tried for tried in tries if tried.peak <= most]
        return min(able, key=lambda tried: (tried.drafted.seconds, tried.peak))

    def fitting(self, budget: int) -> Tried | None:
        """The cheapest tried rung whose lowered peak is at most ``budget``; ``None`` for none.

        The first try follows the drafts alone, so that a lower budget gets a lower rung. A
        budget is refused only when the floor itself has been lowered and missed it, be that
        the fourth scheduling, Inductor's own included.
        """
        inputs = self.step.input_bytes()
        room = AIM * max(0, budget - inputs - self.held)
        floor = self.ladder.floor
        rung = self._aimed(budget) or floor
        tried = self._try(rung, budget)
        error = self._error(tried)
        other = self.ladder.fit(inputs + int(room / error)) or floor
        if tried.peak <= budget:
            if error < WASTE and other.peak > rung.peak:
                again = self._try(other, budget)
                return again if again.peak <= budget else tried
            return tried
        if rung is floor:
            other = self._above(tried)
        elif other.peak >= rung.peak:
            other = self.ladder.fit(rung.peak - 1) or floor
        if other is not rung:
            tried = self._try(other, budget)
        if tried.peak > budget and floor is not rung and floor is not other:
            tried = self._try(floor, budget)
        return tried if tried.peak <= budget else None

    def fits(self, budget: int) -> bool:
        """Whether a rung is drafted to be at most ``budget`` and, lowered, the cheapest one is."""
        rung = self._aimed(budget)
        return rung is not None and self._try(rung, budget).peak <= budget

    def _aimed(self, budget: int) -> Rung | None:
        """The cheapest rung drafted to fit."""
        inputs = self.step.input_bytes()
        return self.ladder.fit(inputs + int(AIM * max(0, budget - inputs - self.held)))

    def _above(self, floor: Tried) -> Rung:
        """The cheapest rung that was predicted to do better than the floor has done."""
        return self.ladder.fit(floor.peak - self.held - 1) or self.ladder.floor

    def _try(self, rung: Rung, budget: int | None) -> Tried:
        """A rung lowered, once."""
        key = id(rung), budget
        if key not in self.known:
            self.known[key] = rung, self._lowered(rung, budget)
        return self.known[key][1]

    def _lowered(self, rung: Rung, budget: int | None) -> Tried:
        planner: Planner = rung.planner
        step, drafted = planner.draft.step, planner.drafted(rung.plan)
        if step.late_from is not None:
            cut = Split(rewrite_whole(step, drafted), None)
        else:
            cut = split(step, drafted)
        lowered = self.lower(step, cut, drafted)
        tried = Tried(step, drafted, cut, *lowered, prompt=True).within(budget)
        self.least = min((self.least, tried), key=lambda t: t.unpooled)
        return tried

    def _error(self, tried: Tried) -> float:
        """Lowered over predicted, both as step peaks."""
        inputs = self.step.input_bytes()
        lowered = tried.peak - inputs - self.held
        return max(1, lowered) / max(1, tried.drafted.peak - inputs)


def _has_loops(rung: Rung) -> bool:
    return any(is_loop(node) for node in rung.planner.draft.step.nodes)
