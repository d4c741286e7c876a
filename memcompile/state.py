"""A step with some of its regions as loops: its draft, and the same with one loop more."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from torch import fx

from memcompile.analysis.timeline import simulate
from memcompile.body import trips
from memcompile.contract import Loop
from memcompile.head import Form
from memcompile.loop import Looped
from memcompile.plan import Drafted, Plan
from memcompile.planner import Planner
from memcompile.report import LoopRow
from memcompile.step import source_line
from memcompile.trip import LoopCost, cost


@dataclasses.dataclass(frozen=True)
class Last:
    """The move that made a state."""

    loop: Loop
    form: int  #: which of the forms of its region
    looped: Looped


@dataclasses.dataclass
class State:
    planner: Planner
    loops: list[Loop]
    drafted: Drafted
    rows: tuple[LoopRow, ...]
    last: Last | None = None
    write: Callable[[], State | None] | None = None  #: set where only its draft is known

    def real(self) -> State | None:
        """The state itself; ``None`` where it cannot be written."""
        return self if self.write is None else self.write()

    @property
    def peak(self) -> int:
        return self.drafted.peak

    @property
    def shape(self) -> tuple[tuple[str, int, int, int], ...]:
        """What its loops are over; states of one shape are the same."""
        return tuple((row.value, row.dim, row.chunks, row.nodes) for row in self.rows)


#: A looped graph made into a step again: its planner, and the loops offered on it.
Anew = Callable[[fx.GraphModule, Planner], tuple[Planner, list[Loop]]]


def recounted(new: State, old: State, form: Form, chunks: int) -> Drafted:
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


def looped(state: State, form: Form, number: int, loop: Loop, anew: Anew) -> State:
    """The state with one more loop, in a region's form of that number."""
    step, found = state.planner.draft.step, form.region
    made = Looped(form.step, found, loop.chunks, state.planner.draft.rates)
    planner, loops = anew(made.outline(), state.planner)
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
    return State(planner, loops, drafted, (*state.rows, row), Last(loop, number, made))
