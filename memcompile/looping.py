"""Which regions become loops: where the peak of the cheapest-in-bytes plan stands.

Round by round: the largest values alive at the peak, the loops that passes offer over
them, and of those the one that lowers the draft's peak most. What is left is a step like
any other, with a ladder of its own.
"""

from __future__ import annotations

import dataclasses
import functools
import operator
from collections.abc import Callable, Iterator
from typing import Any

from torch import fx

from memcompile.analysis.ops import classify, is_random, op_name
from memcompile.analysis.timeline import simulate
from memcompile.body import trips
from memcompile.contract import Loop
from memcompile.head import Form, forms
from memcompile.info import Info
from memcompile.loop import Looped
from memcompile.plan import Drafted, Plan
from memcompile.planner import Planner
from memcompile.report import LoopRow
from memcompile.step import source_line
from memcompile.trip import LoopCost, cost

#: Rounds, and values looked at in each.
ROUNDS, WIDEST = 24, 4
#: What a round must lower the excess to, as a share of itself.
ENOUGH = 0.95
#: What a loop must take off where the floor is looked for, as a share of the first excess: one
#: layer is a small part of a step.
WORTH = 0.004
#: How many high moments of the step are looked at for the floor's sake.
HIGHEST = 4
#: How high one moment may stand on the way, as a share of the peak, for others to come down.
RISE = 1.1


@dataclasses.dataclass(frozen=True)
class _Aim:
    """What loops are chosen for: what is above ``share`` of the peak is to be lowered.

    Of what leaves about as little as any, the quickest is taken. About: more by at most
    ``near`` of what is gained or, with ``spread``, of how far the choices lie apart.
    """

    share: float
    near: float
    spread: bool = False


#: As few chunks as will do; as many as make much of a difference; whatever leaves least.
SHALLOW, DEEPER, DEEPEST = (
    _Aim(0.75, 0.05),
    _Aim(0.25, 0.33, spread=True),
    _Aim(0.1, 0.0),
)


@dataclasses.dataclass
class _State:
    planner: Planner
    loops: list[Loop]
    drafted: Drafted
    rows: tuple[LoopRow, ...]
    last: tuple[Loop, Looped] | None = None  #: the move that made it, and how
    write: Callable[[], _State | None] | None = None  #: set where only its draft is known

    def real(self) -> _State | None:
        """The state itself; ``None`` where it cannot be written."""
        return self if self.write is None else self.write()

    @property
    def peak(self) -> int:
        return self.drafted.peak

    @property
    def shape(self) -> tuple[tuple[str, int, int, int], ...]:
        """What its loops are over; states of one shape are the same."""
        return tuple((row.value, row.dim, row.chunks, row.nodes) for row in self.rows)


@dataclasses.dataclass(frozen=True)
class _Over:
    """What a loop was put over."""

    value: str
    dim: int


#: A looped graph made into a step again: its planner, and the loops offered on it.
Anew = Callable[[fx.GraphModule, Planner], tuple[Planner, list[Loop]]]

#: Told of a loop that could not be written, and why.
Failed = Callable[[Loop, Exception], None]


def with_loops(
    planner: Planner,
    plan: Plan,
    loops: list[Loop],
    anew: Anew,
    failed: Failed,
    room: int | None = None,
) -> list[tuple[Planner, tuple[LoopRow, ...]]]:
    """The step with the loops that lower its peak under ``plan``, as few chunks as will do.

    The same loops made to go lower come after it, where that differs: with chunks as many as
    make much of a difference, and with whatever leaves the least: below ``room`` (bytes above
    the inputs) where that is little. Nothing where no loop helps.
    """
    search = _Search(_State(planner, loops, planner.drafted(plan), ()), anew, failed)
    state, taken = search.rounds(SHALLOW)
    deeper = search.replayed(taken, DEEPER)
    deepest, _ = search.rounds(_deep_enough(search.start, room))
    states = {each.shape: each for each in (state, deeper, deepest)}
    return [(s.planner, s.rows) for s in states.values() if s.rows]


def _deep_enough(start: _State, room: int | None) -> _Aim:
    """What leaves the least, well below the room there is where that is less still."""
    span = max(1, start.peak - start.planner.draft.before)
    share = DEEPEST.share if room is None else max(0.0, 0.8 * room / span)
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
    """Looks for loops from one state on; what was tried once is not tried again."""

    def __init__(self, start: _State, anew: Anew, failed: Failed) -> None:
        self.start, self.anew, self.failed = start, anew, failed
        self.known_forms: dict[Any, list[Form]] = {}
        self.known: dict[Any, _State | None] = {}
        self.in_vain: set[tuple[str, float]] = set()  #: values over which no loop has helped

    def rounds(self, aim: _Aim) -> tuple[_State, list[_Over]]:
        """Loop after loop, until none helps."""
        state, taken = self.start, []
        for _ in range(ROUNDS):
            found = self._round(state, aim)
            if found is None:
                break
            over, state = found
            taken.append(over)
        return state, taken

    def replayed(self, taken: list[_Over], aim: _Aim) -> _State:
        """The loops that were taken, chosen by another aim."""
        state = self.start
        for over in taken:
            values = [n for n in state.planner.draft.step.nodes if n.name == over.value]
            for loops in _by_dim(state.loops, values[0]) if values else []:
                if loops[0].dim == over.dim:
                    tried = self._tried(state, self._forms(state, loops[0]), loops)
                    chosen = _chosen(state, self.start, aim, tried)
                    state = self._written(chosen) or state
        return state

    def _round(self, state: _State, aim: _Aim) -> tuple[_Over, _State] | None:
        """The best loop over what is alive at the peak or, for the floor's sake, wherever helps."""
        for value in _large_at_peak(state, 1 if aim.share > DEEPEST.share else HIGHEST):
            if (value.name, aim.share) in self.in_vain:
                continue
            by_dim = [
                (self._forms(state, loops[0]), loops) for loops in _by_dim(state.loops, value)
            ]
            last = aim.share <= DEEPEST.share  # the first form holds more than the others do
            tried = [
                (new, loops[0].dim)
                for found, loops in by_dim
                for new in self._tried(state, found, loops, first=int(last and len(found) > 1))
            ]
            chosen = _chosen(state, state, aim, [new for new, _ in tried], self.start)
            if chosen is not None:
                dim = next(dim for new, dim in tried if new is chosen)
                real = self._written(chosen)
                if real is not None:
                    return _Over(value.name, dim), real
            self.in_vain.add((value.name, aim.share))
        return None

    def _forms(self, state: _State, loop: Loop) -> list[Form]:
        key = state.shape, loop.value.name, loop.dim
        if key not in self.known_forms:
            step = state.planner.draft.step
            self.known_forms[key] = []
            try:
                kept = state.drafted.plan.kept
                self.known_forms[key] = list(forms(step, loop.value, loop.dim, kept))
            except Exception as error:  # a graph that no rule foresaw
                self.failed(loop, error)
        return self.known_forms[key]

    def _tried(
        self, state: _State, found: list[Form], loops: list[Loop], first: int = 0
    ) -> list[_State]:
        """The state with one more loop, in every form and count that can be written.

        One count is written; what others would leave is read off the cost of their trips.
        """
        made: list[_State] = []
        for number, form in list(enumerate(found))[first:]:
            able = [loop for loop in loops if loop.chunks <= form.region.length]
            if not able:
                continue
            middle = able[len(able) // 2]
            written = self._apply(state, form, number, middle)
            if written is None:
                continue
            for loop in able:
                if loop is middle:
                    made.append(written)
                    continue
                write = functools.partial(self._apply, state, form, number, loop)
                drafted = _recounted(written, state, form, loop.chunks)
                made.append(dataclasses.replace(written, drafted=drafted, write=write))
        most = _line(state, RISE)
        return [new for new in made if new.peak <= most]

    def _apply(self, state: _State, form: Form, number: int, loop: Loop) -> _State | None:
        """The state with one more loop; ``None`` where it cannot be written."""
        key = state.shape, loop.value.name, loop.dim, number, loop.chunks
        if key not in self.known:
            self.known[key] = None
            try:
                self.known[key] = _looped(state, form, loop, self.anew)
            except Exception as error:  # an op that does not stand a smaller shape
                self.failed(loop, error)
        return self.known[key]

    def _written(self, chosen: _State | None) -> _State | None:
        """What was chosen, the bodies of its loops traced; ``None`` where they cannot be."""
        real = chosen and chosen.real()
        if real is None or real.last is None:
            return None
        loop, looped = real.last
        try:
            looped.fill()
        except Exception as error:  # an op that does not stand a smaller shape
            self.failed(loop, error)
            return None
        return real


def _chosen(
    state: _State, start: _State, aim: _Aim, tried: list[_State], first: _State | None = None
) -> _State | None:
    """The quickest of those that leave about as little as any; ``None`` where none helps."""
    now = _excess(state, start, aim.share)
    lefts = [_excess(new, start, aim.share) for new in tried]
    least = (1 - ENOUGH) * now
    if first is not None and aim.share <= DEEPEST.share:
        least = WORTH * _excess(first, first, aim.share)
    if not tried or now - min(lefts) <= least:
        return None
    about = aim.near * ((max(lefts) if aim.spread else now) - min(lefts))
    close = [n for n, left in zip(tried, lefts, strict=True) if left <= min(lefts) + about]
    return min(close, key=lambda new: (new.drafted.seconds, new.peak))


def _by_dim(loops: list[Loop], value: fx.Node) -> list[list[Loop]]:
    """The loops over one value, a list a dimension, fewest chunks first."""
    found: dict[int, list[Loop]] = {}
    for loop in loops:
        if loop.value is value:
            found.setdefault(loop.dim, []).append(loop)
    return [sorted(same, key=lambda loop: loop.chunks) for same in found.values()]


def _line(state: _State, share: float) -> int:
    """A share of the peak, in total bytes."""
    before = state.planner.draft.before
    return before + int(share * (state.peak - before))


def _excess(state: _State, start: _State, share: float) -> int:
    """How much the step rises above ``share`` of what it was, summed over its moments.

    Layers that are alike have peaks that are alike: one loop lowers one of them.
    """
    line, drafted = _line(start, share), state.drafted
    moments = (*drafted.forward.live, *drafted.backward.live)
    return sum(live - line for live in moments if live > line)


def _large_at_peak(state: _State, moments: int) -> Iterator[fx.Node]:
    """The largest computed values alive at the highest moments, the highest moment's first.

    Of one moment the largest come first, of those products of several values; what is kept
    anyway comes last.
    """
    drafted, given = state.drafted, set()
    order, info = state.planner.draft.step.order, state.planner.draft.info
    lines = (drafted.backward, drafted.forward)
    places = [
        (line.live[at], -number, -at)
        for number, line in enumerate(lines)
        for at in range(len(line.live))
    ]
    for _, number, at in sorted(places, reverse=True):
        line = lines[-number]
        alive = {line.ops[j].node: line.ops[j].bytes for j in line.alive(-at)}
        nodes = [n for n in alive if n in order and n.op == "call_function" and alive[n]]
        kept = drafted.plan.kept
        nodes.sort(key=lambda n: (-alive[n], n in kept, -classify(n), -_made_of(info[n]), order[n]))
        new = [n for n in nodes[:WIDEST] if n not in given]
        if new:
            yield from new
            given.update(new)
            moments -= 1
        if not moments:
            return


def _made_of(info: Info) -> int:
    """How many computed values a value is made of: a product of two says most of its layer."""
    return sum(node.op == "call_function" for node in info.inputs)


def _recounted(new: _State, old: _State, form: Form, chunks: int) -> Drafted:
    """The draft of a state as if its newest loop had another count of chunks."""
    draft, drafted, region = new.planner.draft, new.drafted, form.region
    known = {id(node.meta["loop"]) for node in old.planner.draft.step.nodes if "loop" in node.meta}
    costs: dict[fx.Node, LoopCost] = {}
    done: set[bool] = set()
    for node in draft.step.nodes:
        if "loop" not in node.meta or id(node.meta["loop"]) in known:
            continue
        late = node in draft.step.sides.late and region.late is not None
        part = region.late if late else region.early
        assert part is not None
        each = [
            cost(form.step, region, part, run, draft.rates) for run in trips(region.size, chunks)
        ]
        costs[node] = LoopCost(max(c.bytes for c in each), sum(c.seconds for c in each))
        if late in done:  # a shorter last chunk's: counted with the others
            costs[node] = LoopCost(0, 0.0)
        done.add(late)
    lines = []
    for line in (drafted.forward, drafted.backward):
        ops = [
            dataclasses.replace(op, work=costs[op.node].bytes, seconds=costs[op.node].seconds)
            if op.node in costs
            else op
            for op in line.ops
        ]
        again = simulate(ops, 0, draft.grouped)
        base = line.live[0] - again.live[0] if ops else 0
        lines.append(dataclasses.replace(again, live=[live + base for live in again.live]))
    rates = draft.rates
    seconds = sum(line.seconds(rates.memory, rates.launch) for line in lines)
    return dataclasses.replace(drafted, forward=lines[0], backward=lines[1], seconds=seconds)


def _looped(state: _State, form: Form, loop: Loop, anew: Anew) -> _State:
    step, found = state.planner.draft.step, form.region
    looped = Looped(form.step, found, loop.chunks, state.planner.draft.rates)
    planner, loops = anew(looped.outline(), state.planner)
    kept = {node.name for node in state.drafted.plan.kept}
    new = planner.draft.step
    plan = Plan(frozenset(n for n in new.early_values() if n.name in kept))
    drafted = planner.drafted(plan)
    row = LoopRow(
        by=loop.by,
        value=loop.value.name,
        source=source_line(loop.value),
        dim=loop.dim,
        length=found.length,
        chunks=loop.chunks,
        nodes=len(found.early.nodes) + (len(found.late.nodes) if found.late else 0),
        bytes=step.bytes(loop.value),
        peak_before=state.peak,
        peak_after=drafted.peak,
    )
    return _State(planner, loops, drafted, (*state.rows, row), (loop, looped))
