"""The closed loop: lower a rung, look at its real peak, choose the next by the error seen."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from memcompile.ladder import Ladder, Rung
from memcompile.plan import Drafted
from memcompile.planner import Planner
from memcompile.split import Split, rewrite_whole, split
from memcompile.step import Step

#: Schedulings of one graph, Inductor's own included.
TRIES = 3
#: Share of the room that a second try aims for: its error may be larger than the first one's.
SAFE = 0.9


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
        """The cheapest tried rung whose lowered peak is at most ``budget``; ``None`` for none.

        A budget is refused only when the floor itself has been lowered and missed it, be
        that one scheduling more than ``TRIES``.
        """
        inputs = self.step.input_bytes()
        room = max(0, budget - inputs - self.held)
        error = self._error(self.first)
        floor = self.ladder.floor
        fits: Tried | None = None
        rung = self.ladder.fit(inputs + int(room / max(1.0, error))) or floor
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
            if fits is not None or rung is floor:
                return fits
            target = inputs + int(SAFE * room / max(error, 1e-9))
            rung = self.ladder.fit(min(target, rung.peak - 1)) or floor
        last = self._try(floor, budget)  # only the floor's own miss is a refusal
        return last if last.peak <= budget else None

    def _try(self, rung: Rung, budget: int | None) -> Tried:
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
