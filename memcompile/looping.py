"""Which regions become loops: where the peak of a plan that takes few bytes stands.

Round by round, for one aim after the other: a few loops, the quickest that fit the room, whatever
leaves least. What is left is a step like any other, with a ladder of its own.
"""

from __future__ import annotations

import dataclasses
import functools
import operator
from collections.abc import Callable, Iterator, Sequence

from torch import fx

from memcompile.analysis.ops import is_random, op_name
from memcompile.contract import Loop
from memcompile.cuts import segment_seeds
from memcompile.draft import Draft
from memcompile.ladder import AIM, SURE
from memcompile.loop import Looped
from memcompile.plan import Drafted, Plan
from memcompile.planner import Planner
from memcompile.report import LoopRow
from memcompile.rounds import DEEP, Aim, Failed, Rounds, above, span, what_of
from memcompile.state import Anew, Made, State, recounted, redrafted, replanned
from memcompile.step import source_line

#: With less of the peak than this to fit into, loops that leave three quarters are of no use.
HALF = 0.5
#: How often the step with loops is planned anew, for more of them.
TURNS = 3
#: How much of what chunk counts differ by may be given up for fewer of them.
EASED = 0.01
#: What is kept and smaller than this share of the largest kept value is left alone.
SMALL = 0.01
#: Nodes of a step that is looked at from two plans for its least peak: it takes twice as long.
FEW = 1200
#: As few chunks as will do; whatever leaves least.
SHALLOW, DEEPEST = Aim(0.75, 0.05), Aim(DEEP, 0.0)

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


def leanest(planner: Planner, plan: Plan) -> Drafted:
    """The plan to look for the floor's loops from: what it keeps stays where loops have been.

    Under ``plan``, the one of least peak, all may be kept that the highest moment has room for, and
    values inside the regions of loops. Keeping what crosses narrow places is tried, too; of both is
    dropped what adds to the excess that the loops are to lower: asked of bytes, not of seconds.
    """
    before = planner.draft.before
    line = before + int(DEEP * (planner.drafted(plan).peak - before))
    plans = (plan, *segment_seeds(planner.draft, planner.is_candidate)[:1])
    found = [_lean(planner, each, line) for each in plans]
    return min(found, key=lambda drafted: (above(drafted, line), drafted.peak))


def _lean(planner: Planner, plan: Plan, line: int) -> Drafted:
    """A plan without what adds to the excess above ``line``, the largest values first, in all
    blocks that are alike at once."""
    now, info = planner.drafted(plan), planner.draft.info
    kept = [v for v in now.saved if v in planner.is_candidate]
    groups = (tuple(o for o in planner.alike[v] if o in kept) for v in kept)
    sizes = {same: sum(info[v].bytes for v in same) for same in groups}
    least = SMALL * max((info[v].bytes for v in kept), default=0)
    for same in sorted(sizes, key=sizes.__getitem__, reverse=True):
        if sizes[same] < least:
            break
        new = planner.drafted(dataclasses.replace(now.plan, kept=now.plan.kept - set(same)))
        if above(new, line) < above(now, line):
            now = new
    return now


def _fitting(start: State, room: float) -> Aim:
    """The quickest loops that leave nothing above the room there is."""
    return Aim(room / span(start), 0.0)


def _deep_enough(start: State, room: int) -> Aim:
    """What leaves the least, well below the room there is where that is less still."""
    share = max(0.0, 0.8 * room / span(start))
    return dataclasses.replace(DEEPEST, share=min(DEEPEST.share, share))


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
    """Aims at less and less.

    Args:
        start: the step without loops.
        anew: makes a step of a graph with loops.
        planned: plans it.
        failed: told of loops that cannot be made.
    """

    def __init__(self, start: State, anew: Anew, planned: Planned, failed: Failed) -> None:
        self.start, self.anew, self.planned, self.failed = start, anew, planned, failed
        self.rounds = Rounds(start, anew, failed)

    @functools.cached_property
    def starts(self) -> list[State]:
        """What to look for the floor's loops from, the likeliest first: see :func:`leanest`."""
        planner, plan = self.start.planner, self.start.drafted.plan
        lean = leanest(planner, plan).plan
        if lean.key() == plan.key():
            return [self.start]
        other = replanned(self.start, lean)  # its turns are none of the start's
        return [dataclasses.replace(other, turn=TURNS), self.start]

    def ever_lower(self, room: int | None) -> Iterator[tuple[State, Planner | None]]:
        """The start with the loops that help, one aim after the other; each costs a search.

        With it its planner, where there is one already.
        """
        if room is None:
            yield from self._least()
            return
        enough = self.start.planner.draft.before + int(SURE * room)
        fitting = _fitting(self.start, SURE * room)
        aims = [SHALLOW] if fitting.share >= HALF else []
        if fitting.share >= SHALLOW.share:  # a few loops may do
            aims = [_fitting(self.start, AIM * room)]
        for aim in (*aims, fitting):
            for state in self._found(aim, None if aim in aims else enough):
                yield state, None
        aim = _deep_enough(self.start, room)
        deeper = (found for start in self.starts for found in self._deeper(aim, start))
        for state, planner in deeper:
            floor = planner.drafted(planner.ladder.floor.plan)
            if floor.peak <= enough:
                eased = self.eased(state, planner.draft, floor, enough)
                if eased is not state and self._fill(eased):
                    yield eased, self.planned(eased.planner, planner)
            yield state, planner

    def _least(self) -> Iterator[tuple[State, Planner]]:
        """What leaves least, with as few chunks as leave the floor where it is."""
        few = len(self.start.planner.draft.step.nodes) <= FEW
        starts = self.starts if few else self.starts[:1]
        while found := [f for start in starts for f in self._deeper(DEEPEST, start, fill=False)]:
            state, planner = min(found, key=lambda each: each[1].ladder.floor.peak)
            floor = planner.drafted(planner.ladder.floor.plan)
            eased = self.eased(state, planner.draft, floor, floor.peak)
            if self._fill(eased):
                yield eased, planner if eased is state else self.planned(eased.planner, planner)
                return

    def _deeper(self, aim: Aim, state: State, fill: bool = True) -> Iterator[tuple[State, Planner]]:
        """Loops, the plan that leaves least with them, the loops that lower this one, and so on."""
        for _ in range(TURNS):
            new = self.rounds.run(aim, state)
            if new is state:
                return
            if fill and not self._fill(new):
                continue
            planner = self.planned(new.planner, None)
            yield new, planner
            if not new.planner.draft.step.sides.late:
                return  # nothing is kept for a backward: one plan is like another
            state = replanned(new, planner.ladder.floor.plan)

    def _found(self, aim: Aim, enough: int | None) -> Iterator[State]:
        """What rounds lead to, the loops traced.

        Where its peak is no more than ``enough`` bytes, the same with as few chunks as fit in
        these comes first.
        """
        while True:
            state = self.rounds.run(aim, self.start)
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
                self.rounds.barred.add(what_of(made.loop, made.form))
                return False
        return True

    def eased(self, state: State, draft: Draft, drafted: Drafted, peak: int) -> State:
        """The same loops with as few chunks as leave ``drafted`` no more than ``peak`` bytes.

        Loops in the same place of blocks that are alike get the same number: they may share
        their functions.
        """
        made = [each.looped for each in state.made]
        for places in self._alike(state.made):
            group, tried = [state.made[at] for at in places], []
            for chunks in group[0].counts:
                if others := self._recounted(group, chunks):
                    costs = dict(cost for other in others for cost in other.costs().items())
                    tried.append((others, redrafted(draft, drafted, costs)))
            if not tried:
                continue
            lefts = [above(new, peak) for _, new in tried]
            about = min(lefts) + EASED * (max(lefts) - min(lefts))
            close = [new for new, left in zip(tried, lefts, strict=True) if left <= about]
            others, drafted = min(close, key=lambda new: (new[1].seconds, new[1].peak))
            for at, other in zip(places, others, strict=True):
                made[at] = other
        if [each.chunks for each in made] == [each.loop.chunks for each in state.made]:
            return state
        return recounted(state, made, self.anew)

    def _alike(self, made: Sequence[Made]) -> list[list[int]]:
        """Places of loops that stand in the same place of blocks that are alike."""
        groups: dict[object, list[int]] = {}
        for at, each in enumerate(made):
            name = each.loop.value.name
            family = frozenset((name, *self.rounds.alike.get(name, ())))
            groups.setdefault((family, each.loop.dim, each.form, each.counts), []).append(at)
        return list(groups.values())

    def _recounted(self, group: Sequence[Made], chunks: int) -> list[Looped]:
        """A group's loops with so many chunks; none where one cannot have as many."""
        others: list[Looped] = []
        for each in group:
            loop, other = (
                dataclasses.replace(each.loop, chunks=chunks),
                each.looped.recounted(chunks),
            )
            if other is None or what_of(loop, each.form) in self.rounds.barred:
                return []
            others.append(other)
        return others
