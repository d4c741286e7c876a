"""Which regions become loops: where the peak of the cheapest-in-bytes plan stands.

Round by round: the largest values alive at the peak, the loops that passes offer over
them, and of those the one that lowers the draft's peak most. What is left is a step like
any other, with a ladder of its own.
"""

from __future__ import annotations

import dataclasses
import functools
import operator
from collections.abc import Callable, Collection, Iterator
from typing import Any

from torch import fx

from memcompile.alike import families
from memcompile.analysis.ops import is_random, op_name
from memcompile.analysis.rules import Place
from memcompile.contract import Loop
from memcompile.cuts import narrow_cuts
from memcompile.draft import Draft
from memcompile.head import Form, forms
from memcompile.ladder import AIM, SURE
from memcompile.moments import large_at_peak
from memcompile.plan import Drafted, Plan
from memcompile.planner import Planner
from memcompile.report import LoopRow
from memcompile.state import Anew, State, looped, recounted, redrafted, replanned
from memcompile.step import source_line

#: Rounds, at most.
ROUNDS = 24
#: How often the step with loops is planned anew, for more of them.
TURNS = 3
#: What a round must lower the excess to, as a share of itself.
ENOUGH = 0.95
#: What a loop must take off where the floor is looked for, as a share of the first excess: one
#: layer is a small part of a step.
WORTH = 0.004
#: Or off the peak itself: the highest of many moments.
LOWER = 0.02
#: How many high moments of the step are looked at for the floor's sake.
HIGHEST = 4
#: How much of what chunk counts differ by may be given up for fewer of them.
EASED = 0.01
#: How high one moment may stand on the way, as a share of the peak, for others to come down.
RISE = 1.1


@dataclasses.dataclass(frozen=True)
class _Aim:
    """What loops are chosen for: what is above ``share`` of the peak is to be lowered.

    Of what leaves about as little as any, the quickest is taken. About: more by at most
    ``near`` of what is gained.
    """

    share: float
    near: float


#: As few chunks as will do; whatever leaves least.
SHALLOW, DEEPEST = _Aim(0.75, 0.05), _Aim(0.05, 0.0)


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


#: The planner of a step with loops, its ladder built: from that of the same loops with other
#: counts, where there is one.
Planned = Callable[[Planner, Planner | None], Planner]


def with_loops(
    planner: Planner,
    plan: Plan,
    loops: list[Loop],
    anew: Anew,
    planned: Planned,
    failed: Failed,
    room: int | None = None,
) -> Iterator[tuple[Planner, tuple[LoopRow, ...]]]:
    """The step with the loops that lower its peak under ``plan``, as few chunks as will do.

    What goes lower comes after it, where that differs: the quickest loops that leave less than
    ``room`` (bytes above the inputs), and whatever leaves the least. With no room to fit into,
    only that. Nothing where no loop helps. What is yielded has a ladder.
    """
    start = State(planner, lambda: loops, planner.drafted(plan))
    search = _Search(start, anew, planned, failed)
    given: set[object] = set()
    for state, found in search.ever_lower(room):
        if state.rows and state.shape not in given:
            given.add(state.shape)
            yield found or planned(state.planner, None), state.rows


def _fitting(start: State, room: float) -> _Aim:
    """The quickest loops that leave nothing above the room there is."""
    return _Aim(room / _span(start), 0.0)


def _deep_enough(start: State, room: int) -> _Aim:
    """What leaves the least, well below the room there is where that is less still."""
    share = max(0.0, 0.8 * room / _span(start))
    return dataclasses.replace(DEEPEST, share=min(DEEPEST.share, share))


def _span(start: State) -> int:
    return max(1, start.peak - start.planner.draft.before)


def unseeded(loops: list[Loop]) -> str | None:
    """A note on the first value offered that is a draw without a seed; ``None`` without one.

    Such a draw cannot be made in parts: nothing that hangs together with it is looped.
    """
    for loop in loops:
        node = loop.value.args[0] if loop.value.target is operator.getitem else loop.value
        assert isinstance(node, fx.Node)
        if is_random(node) and op_name(node) != "inductor_seeds":
            where = source_line(node)
            said = f"node {node.name}{f' ({where})' if where else ''}"
            return f"{loop.by}: {said} draws without a seed; what it goes into is not chunked"
    return None


class _Search:
    """Looks for loops from one state on; what was tried once is not tried again."""

    def __init__(self, start: State, anew: Anew, planned: Planned, failed: Failed) -> None:
        self.start, self.anew, self.planned, self.failed = start, anew, planned, failed
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

    def ever_lower(self, room: int | None) -> Iterator[tuple[State, Planner | None]]:
        """The start with the loops that help, one aim after the other; each costs a search.

        With it its planner, where there is one already.
        """
        if room is None:
            yield from self._least()
            return
        enough = self.start.planner.draft.before + int(SURE * room)
        fitting = _fitting(self.start, SURE * room)
        few = fitting.share >= SHALLOW.share  # a few loops may do
        aims = [_fitting(self.start, AIM * room) if few else SHALLOW]
        for aim in (*aims, fitting):
            for state in self._found(aim, None if aim in aims else enough):
                yield state, None
        for state, planner in self._deeper(_deep_enough(self.start, room)):
            floor = planner.drafted(planner.ladder.floor.plan)
            if floor.peak <= enough:
                eased = self.eased(state, planner.draft, floor, enough)
                if eased is not state and self._fill(eased):
                    yield eased, self.planned(eased.planner, planner)
            yield state, planner

    def _least(self) -> Iterator[tuple[State, Planner]]:
        """What leaves least, with as few chunks as leave the floor where it is."""
        found = [*self._deeper(DEEPEST)]
        if found:
            state, planner = min(found, key=lambda each: each[1].ladder.floor.peak)
            floor = planner.drafted(planner.ladder.floor.plan)
            eased = self.eased(state, planner.draft, floor, floor.peak)
            if eased is not state and self._fill(eased):
                yield eased, self.planned(eased.planner, planner)
            else:
                yield state, planner

    def _deeper(self, aim: _Aim) -> Iterator[tuple[State, Planner]]:
        """Loops, the plan that leaves least with them, the loops that lower this one, and so on."""
        state = self.start
        for _ in range(TURNS):
            new = self.rounds(aim, state)
            if new is state:
                return
            if not self._fill(new):
                continue
            planner = self.planned(new.planner, None)
            yield new, planner
            if not new.planner.draft.step.sides.late:
                return  # nothing is kept for a backward: one plan is like another
            state = replanned(new, planner.ladder.floor.plan)

    def _found(self, aim: _Aim, enough: int | None) -> Iterator[State]:
        """What rounds lead to, the loops traced.

        Where its peak is no more than ``enough`` bytes, the same with as few chunks as fit in
        these comes first.
        """
        while True:
            state = self.rounds(aim, self.start)
            states = [state]
            if enough is not None and state.peak <= enough:
                eased = self.eased(state, state.planner.draft, state.drafted, enough)
                states = [eased, *(s for s in states if s is not eased)]
            if all([self._fill(each) for each in states]):
                yield from states
                return

    def _fill(self, state: State) -> bool:
        """Trace the loops of a state; whether all can be. What cannot is not tried again."""
        module = state.planner.draft.step.module
        for made in state.made:
            try:
                made.looped.fill(module)
            except Exception as error:  # an op that does not stand a smaller shape
                self.failed(made.loop, error)
                self.barred.add(_what(made.loop, made.form))
                return False
        return True

    def eased(self, state: State, draft: Draft, drafted: Drafted, peak: int) -> State:
        """The same loops with as few chunks as leave ``drafted`` no more than ``peak`` bytes."""
        made = [each.looped for each in state.made]
        for at, each in enumerate(state.made):
            tried = []
            for chunks in each.counts:
                what = _what(dataclasses.replace(each.loop, chunks=chunks), each.form)
                other = made[at].recounted(chunks)
                if other is not None and what not in self.barred:
                    tried.append((other, redrafted(draft, drafted, other.costs())))
            lefts = [_above(new, peak) for _, new in tried]
            about = min(lefts) + EASED * (max(lefts) - min(lefts))
            close = [new for new, left in zip(tried, lefts, strict=True) if left <= about]
            made[at], drafted = min(close, key=lambda new: (new[1].seconds, new[1].peak))
        if [each.chunks for each in made] == [each.loop.chunks for each in state.made]:
            return state
        return recounted(state, made, self.anew)

    def rounds(self, aim: _Aim, state: State) -> State:
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

    def _again(self, state: State, over: _Over, aim: _Aim) -> State | None:
        """The state with one more loop as given; ``None`` where there is none, or it is no help."""
        for loop in state.loops:
            if (loop.value.name, loop.dim, loop.chunks) == (over.value, over.dim, over.chunks):
                found = self._forms(state, loop)[over.form : over.form + 1]
                same = [form for form in found if _gives(form) == over.gives]
                tried = [self._apply(state, form, over.form, loop) for form in same]
                helped = [new for new in tried if new is not None]
                return _chosen(state, aim, helped, self.start)
        return None

    def _round(self, state: State, aim: _Aim) -> tuple[_Over, State] | None:
        """The best loop over what is alive at the peak or, for the floor's sake, wherever helps."""
        last = aim.share <= DEEPEST.share
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
        what = _what(loop, number)
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
    return range(max(0, min(1, forms - 1)), forms)


def _grown(forms: int) -> range:
    """That of the first form, where there are others: it holds more and moves less."""
    return range(min(1, max(0, forms - 1)))


def _what(loop: Loop, form: int) -> tuple[str, int, int, int]:
    """Equal for loops that are written alike, in whatever state."""
    return loop.value.name, loop.dim, form, loop.chunks


def _gives(form: Form) -> tuple[Place, ...]:
    """How what a region's forward gives is sliced: alike is what is so in the same way."""
    region = form.region
    return tuple(region.places[node] for node in region.early.outputs)


def _chosen(state: State, aim: _Aim, tried: list[State], start: State) -> State | None:
    """The quickest of those that leave about as little as any; ``None`` where none helps."""
    line = _line(state, aim.share)
    now = _above(state.drafted, line)
    lefts = {id(new): _above(new.drafted, line) for new in tried}
    least, lower = (1 - ENOUGH) * now, 1.0
    if aim.share <= DEEPEST.share:
        least, lower = WORTH * _above(start.drafted, _line(start, aim.share)), LOWER
    peak = state.peak - lower * _span(state)
    helped = [new for new in tried if now - lefts[id(new)] > least or new.peak < peak]
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


def _above(drafted: Drafted, line: int) -> int:
    """How much a draft rises above ``line`` total bytes, summed over its moments.

    Layers that are alike have peaks that are alike: one loop lowers one of them.
    """
    moments = (*drafted.forward.live, *drafted.backward.live)
    return sum(live - line for live in moments if live > line)
