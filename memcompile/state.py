"""A step with some of its regions as loops: its draft, and the same with one loop more."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence

from torch import fx

from memcompile import _torch
from memcompile.analysis.timeline import simulate
from memcompile.contract import Loop
from memcompile.draft import Draft
from memcompile.head import Form
from memcompile.loop import Looped, body_of, loops_of
from memcompile.plan import Drafted, Plan
from memcompile.planner import Planner
from memcompile.report import LoopRow
from memcompile.step import source_line
from memcompile.trip import LoopCost


@dataclasses.dataclass(frozen=True)
class Made:
    """A loop of a state."""

    loop: Loop
    form: int  #: which of the forms of its region
    counts: tuple[int, ...]  #: of chunks that were offered
    looped: Looped


@dataclasses.dataclass
class State:
    planner: Planner  #: that drafts it; moves of single values are not offered to it
    offers: Callable[[], list[Loop]]
    drafted: Drafted
    rows: tuple[LoopRow, ...] = ()
    made: tuple[Made, ...] = ()  #: the loops, one for each row
    turn: int = 0  #: under which of the plans looked from it is drafted
    write: Callable[[], State | None] | None = None  #: set where only its draft is known

    def real(self) -> State | None:
        """The state itself; ``None`` where it cannot be written."""
        return self if self.write is None else self.write()

    @functools.cached_property
    def loops(self) -> list[Loop]:
        """The loops that may be added."""
        return self.offers()

    @property
    def peak(self) -> int:
        return self.drafted.peak

    @property
    def shape(self) -> tuple[object, ...]:
        """What its loops are over, and its turn; states of one shape are the same."""
        return self.turn, *((row.value, row.dim, row.chunks, row.nodes) for row in self.rows)


#: A looped graph made into a step again: its planner, and the loops offered on it.
Anew = Callable[[fx.GraphModule, Planner], tuple[Planner, Callable[[], list[Loop]]]]


def redrafted(draft: Draft, drafted: Drafted, costs: Mapping[str, LoopCost]) -> Drafted:
    """The draft of a step as if some loops, by the names of their bodies, cost something else."""
    other = {node: costs[body_of(node)] for node in loops_of(draft.step.graph, costs)}
    lines = []
    for line in (drafted.forward, drafted.backward):
        ops = [
            dataclasses.replace(op, work=other[op.node].bytes, seconds=other[op.node].seconds)
            if op.node in other
            else op
            for op in line.ops
        ]
        again = simulate(ops, 0, draft.grouped)
        base = line.live[0] - again.live[0] if ops else 0
        lines.append(dataclasses.replace(again, live=[live + base for live in again.live]))
    rates = draft.rates
    seconds = sum(line.seconds(rates.memory, rates.launch) for line in lines)
    return dataclasses.replace(drafted, forward=lines[0], backward=lines[1], seconds=seconds)


def looped(state: State, form: Form, number: int, loop: Loop, anew: Anew) -> State:
    """The state with one more loop, in a region's form of that number."""
    step, found = state.planner.draft.step, form.region
    made = Looped(form.step, found, loop.chunks, state.planner.draft.rates)
    planner, offers = anew(made.outline(), state.planner)
    drafted = _drafted(planner, state.drafted.plan)
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
    alike = (o for o in state.loops if (o.value, o.dim) == (loop.value, loop.dim))
    counts = tuple(sorted(o.chunks for o in alike if o.chunks <= found.length))
    every = *state.made, Made(loop, number, counts, made)
    return State(planner, offers, drafted, (*state.rows, row), every, state.turn)


def recounted(state: State, others: Sequence[Looped], anew: Anew) -> State:
    """The state with other counts of chunks in its loops."""
    module = _torch.copy_graph(state.planner.draft.step.module)
    for each in others:
        costs = each.costs()
        for node in loops_of(module.graph, costs):
            node.meta["loop"] = costs[body_of(node)]
    planner, offers = anew(module, state.planner)
    drafted = _drafted(planner, state.drafted.plan)
    rows = tuple(
        dataclasses.replace(row, chunks=each.chunks)
        for row, each in zip(state.rows, others, strict=True)
    )
    made = [
        dataclasses.replace(
            old, loop=dataclasses.replace(old.loop, chunks=each.chunks), looped=each
        )
        for old, each in zip(state.made, others, strict=True)
    ]
    return State(planner, offers, drafted, rows, tuple(made), state.turn)


def replanned(state: State, plan: Plan) -> State:
    """The state under another plan, of a step whose values are named alike."""
    drafted = _drafted(state.planner, plan)
    return dataclasses.replace(state, drafted=drafted, turn=state.turn + 1)


def _drafted(planner: Planner, plan: Plan) -> Drafted:
    """The draft of what a plan keeps, of a step whose values are named alike."""
    kept = {node.name for node in plan.kept}
    values = planner.draft.step.early_values()
    return planner.drafted(Plan(frozenset(n for n in values if n.name in kept)))
