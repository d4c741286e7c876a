"""One loop after another: of those that are offered the one that leaves least, until none helps.

A round looks at the largest values alive at the peak, writes the step with each loop offered over
them, in every form of its region, and drafts what is left.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Collection, Iterator
from typing import Any

from torch import fx

from memcompile.alike import families
from memcompile.analysis.rules import Place
from memcompile.contract import Loop
from memcompile.cuts import narrow_cuts
from memcompile.head import Form, forms
from memcompile.moments import large_at_peak
from memcompile.plan import Drafted
from memcompile.state import Anew, State, looped, redrafted

#: Rounds, at most.
ROUNDS = 24
#: What a round must lower the excess to, as a share of itself.
ENOUGH = 0.95
#: What a loop must take off where the floor is looked for, as a share of the first excess: one
#: layer is a small part of a step.
WORTH = 0.004
#: Or off the peak itself: the highest of many moments.
LOWER = 0.02
#: How many high moments of the step are looked at for the floor's sake.
HIGHEST = 4
#: How high one moment may stand on the way, as a share of the peak, for others to come down; and
#: the excess of all, as a share of itself, for the peak to.
RISE = 1.1
#: Where no more of the peak than this is aimed at, the floor is.
DEEP = 0.05


@dataclasses.dataclass(frozen=True)
class Aim:
    """What loops are chosen for: what is above ``share`` of the peak is to be lowered.

    Of what leaves about as little as any, the quickest is taken. About: more by at most
    ``near`` of what is gained.
    """

    share: float
    near: float


@dataclasses.dataclass(frozen=True)
class _Over:
    """What a loop was put over, and how."""

    value: str
    dim: int
    form: int  #: which of the forms of its region
    chunks: int
    gives: tuple[Place, ...]  #: how what its forward gives is sliced


#: Told of a loop that could not be written, and why.
Failed = Callable[[Loop, Exception], None]


class Rounds:
    """Looks for loops from one state on; what was tried once is not tried again.

    Args:
        start: the step without any.
        anew: makes a step of a graph with loops.
        failed: told of loops that cannot be written.
    """

    def __init__(self, start: State, anew: Anew, failed: Failed) -> None:
        self.start, self.anew, self.failed = start, anew, failed
        self.known_forms: dict[Any, list[Form]] = {}
        self.known: dict[Any, State | None] = {}
        self.in_vain: set[tuple[str, int, float]] = set()  #: values over which no loop has helped
        self.barred: set[tuple[str, int, int, int]] = set()  #: what cannot be traced

    @functools.cached_property
    def alike(self) -> dict[str, list[str]]:
        """For each value that loops are offered over those in the same place of other blocks."""
        draft = self.start.planner.draft
        values = dict.fromkeys(loop.value for loop in self.start.loops)
        found = families(draft.step, draft.info, (v for v in values if v in draft.info))
        return {v.name: [o.name for o in same if o is not v] for v, same in found.items()}

    def run(self, aim: Aim, state: State) -> State:
        """Loop after loop, until none helps; what helps in one block is done in all alike."""
        for _ in range(ROUNDS):
            found = self._round(state, aim)
            if found is None:
                break
            over, state = found
            for name in self.alike.get(over.value, ()):
                twin = dataclasses.replace(over, value=name)
                new = self._again(state, twin, aim)
                state = new or state
        return state

    def _again(self, state: State, over: _Over, aim: Aim) -> State | None:
        """The state with one more loop as given; ``None`` where there is none, or it is no help."""
        for loop in state.loops:
            if (loop.value.name, loop.dim, loop.chunks) == (over.value, over.dim, over.chunks):
                found = self._forms(state, loop)[over.form : over.form + 1]
                same = [form for form in found if _gives(form) == over.gives]
                tried = [self._apply(state, form, over.form, loop) for form in same]
                helped = [new for new in tried if new is not None]
                return _chosen(state, aim, helped, self.start)
        return None

    def _round(self, state: State, aim: Aim) -> tuple[_Over, State] | None:
        """The best loop over what is alive at the peak or, for the floor's sake, wherever helps."""
        last = aim.share <= DEEP
        for value in large_at_peak(state.planner.draft, state.drafted, HIGHEST if last else 1):
            if (value.name, state.turn, aim.share) in self.in_vain:
                continue
            for batch in (_wide, _grown) if last else (range,):
                tried = []
                for loops in _by_dim(state.loops, value):
                    found = self._forms(state, loops[0])
                    forms = {number: found[number] for number in batch(len(found))}
                    tried += self._tried(state, forms, loops, last)
                chosen = _chosen(state, aim, tried, self.start)
                real = chosen and chosen.real()
                if real is not None:
                    break
            if real is not None:
                loop, number = real.made[-1].loop, real.made[-1].form
                form = self._forms(state, loop)[number]
                return _Over(value.name, loop.dim, number, loop.chunks, _gives(form)), real
            self.in_vain.add((value.name, state.turn, aim.share))
        return None

    @functools.cached_property
    def narrow(self) -> frozenset[str]:
        """What is alive where least is, which is where layers begin and end."""
        return frozenset(n.name for cut in narrow_cuts(self.start.planner.draft) for n in cut)

    def _stops(self, state: State) -> Iterator[Collection[fx.Node]]:
        """What no layer's loop goes past: narrow places too or, where that leads to none, only what
        is saved. A stream of which only the terms are saved is soon made again."""
        step, kept = state.planner.draft.step, state.drafted.plan.kept
        yield [node for node in step.nodes if node.name in self.narrow or node in kept]
        if step.sides.late:
            yield kept

    def _forms(self, state: State, loop: Loop) -> list[Form]:
        key = state.shape, loop.value.name, loop.dim
        if key not in self.known_forms:
            step, found = state.planner.draft.step, self.known_forms.setdefault(key, [])
            try:
                for stops in self._stops(state):
                    found += forms(step, loop.value, loop.dim, stops)
                    if found:
                        break
            except Exception as error:  # a graph that no rule foresaw
                self.failed(loop, error)
        return self.known_forms[key]

    def _tried(
        self, state: State, forms: dict[int, Form], loops: list[Loop], deep: bool
    ) -> list[State]:
        """The state with one more loop, in every form (by number) and count that can be written.

        One count is written, the one that is likely to be taken; what others would leave is read
        off the cost of their trips.
        """
        made: list[State] = []
        for number, form in forms.items():
            able = [loop for loop in loops if loop.chunks <= form.region.length]
            if not able:
                continue
            likely = able[-1] if deep else able[len(able) // 2]
            written = self._apply(state, form, number, likely)
            if written is None:
                continue
            for loop in able:
                if loop is likely:
                    made.append(written)
                    continue
                write = functools.partial(self._apply, state, form, number, loop)
                costs = written.made[-1].looped.costs(loop.chunks)
                drafted = redrafted(written.planner.draft, written.drafted, costs)
                made.append(dataclasses.replace(written, drafted=drafted, write=write))
        most = _line(state, RISE)
        return [new for new in made if new.peak <= most]

    def _apply(self, state: State, form: Form, number: int, loop: Loop) -> State | None:
        """The state with one more loop; ``None`` where it cannot be written."""
        what = what_of(loop, number)
        key = state.shape, what
        if what in self.barred:
            return None
        if key not in self.known:
            self.known[key] = None
            try:
                self.known[key] = looped(state, form, number, loop, self.anew)
            except Exception as error:  # an op that does not stand a smaller shape
                self.failed(loop, error)
        return self.known[key]


def _wide(forms: int) -> range:
    """Numbers of the forms that hold little: all but the first, where there are others."""
    return range(int(forms > 1), forms)


def _grown(forms: int) -> range:
    """That of the first form, where there are others: it holds more and moves less."""
    return range(int(forms > 1))


def what_of(loop: Loop, form: int) -> tuple[str, int, int, int]:
    """Equal for loops that are written alike, in whatever state."""
    return loop.value.name, loop.dim, form, loop.chunks


def _gives(form: Form) -> tuple[Place, ...]:
    """How what a region's forward gives is sliced: alike is what is so in the same way."""
    region = form.region
    return tuple(region.places[node] for node in region.early.outputs)


def _chosen(state: State, aim: Aim, tried: list[State], start: State) -> State | None:
    """The quickest of those that leave about as little as any; ``None`` where none helps."""
    line = _line(state, aim.share)
    now = above(state.drafted, line)
    lefts = {id(new): above(new.drafted, line) for new in tried}
    least, lower = (1 - ENOUGH) * now, 1.0
    if aim.share <= DEEP:
        least, lower = WORTH * above(start.drafted, _line(start, aim.share)), LOWER
    peak = state.peak - lower * span(state)
    most = RISE * now
    helped = [
        new
        for new in tried
        if now - (left := lefts[id(new)]) > least or (new.peak < peak and left <= most)
    ]
    if not helped:
        return None
    left = min(lefts[id(new)] for new in helped)
    about = left + aim.near * (now - left)
    close = [new for new in helped if lefts[id(new)] <= about]
    return min(close, key=lambda new: (new.drafted.seconds, new.peak))


def _by_dim(loops: list[Loop], value: fx.Node) -> list[list[Loop]]:
    """The loops over one value, a list a dimension, fewest chunks first."""
    found: dict[int, list[Loop]] = {}
    for loop in loops:
        if loop.value is value:
            found.setdefault(loop.dim, []).append(loop)
    return [sorted(same, key=lambda loop: loop.chunks) for same in found.values()]


def _line(state: State, share: float) -> int:
    """A share of the peak, in total bytes."""
    before = state.planner.draft.before
    return before + int(share * (state.peak - before))


def above(drafted: Drafted, line: int) -> int:
    """How much a draft rises above ``line`` total bytes, summed over its moments.

    Layers that are alike have peaks that are alike: one loop lowers one of them.
    """
    moments = (*drafted.forward.live, *drafted.backward.live)
    return sum(live - line for live in moments if live > line)


def span(start: State) -> int:
    return max(1, start.peak - start.planner.draft.before)
