"""What was decided, read off the drafts: the rows of a report."""

from __future__ import annotations

import dataclasses
import heapq
from collections.abc import Callable, Iterator, Sequence

from torch import fx

from memcompile.analysis.ops import op_name
from memcompile.analysis.timeline import Kind, Timeline
from memcompile.contract import Proposal
from memcompile.plan import Drafted, Late
from memcompile.report import LoopRow, MoveRow, Point, StayRow, ValueRow
from memcompile.split import Split
from memcompile.step import Step, loops_in, source_line, tensors
from memcompile.symbolic import peak_expression

LARGEST = 10

#: The moves that were offered for a value, and the seconds that each is likely to cost.
Ways = Callable[[fx.Node], tuple[tuple[str, float], ...]]


@dataclasses.dataclass
class Explained:
    """The part of a report that is known when a graph has been planned."""

    before: int
    budget: int | None
    inductor: int
    predicted: int
    lowered: int
    floor: int | None
    seconds: float
    step_seconds: float
    peak_expression: str
    symbols: dict[str, int]
    moves: tuple[MoveRow, ...]
    loops: tuple[LoopRow, ...]
    stays: tuple[StayRow, ...]
    host: int
    link_seconds: float
    largest: tuple[ValueRow, ...]
    timeline_before: tuple[Point, ...]
    timeline_after: tuple[Point, ...]
    graph_before: str
    forward: str
    backward: str
    held_after: int = 0  #: bytes alive between forward and backward, inputs included
    planning_seconds: float = 0.0


def explain(
    *,
    step: Step,
    before: Drafted,
    after: Drafted,
    after_step: Step,
    loops: tuple[LoopRow, ...],
    proposals: Sequence[Proposal],
    budget: int | None,
    inductor: int,
    lowered: int,
    floor: int | None,
    split: Split | None,
    ways: Ways = lambda value: (),
) -> Explained:
    """Collect everything a report says of one graph.

    ``ways`` gives the moves that were offered for a value, with the seconds of each.
    """
    return Explained(
        before=step.input_bytes(),
        budget=budget,
        inductor=inductor,
        predicted=after.peak,
        lowered=lowered,
        floor=floor,
        # No gain over Inductor's own split is claimed: the roofline is too coarse for it.
        seconds=max(0.0, after.seconds - before.seconds),
        step_seconds=before.seconds,
        peak_expression=str(peak_expression(after_step, after)) if step.dynamic else "",
        symbols={str(symbol): value for symbol, value in step.symbols().items()},
        moves=tuple(_moves(step, before, after, proposals, ways)),
        loops=_placed(loops, after_step),
        stays=tuple(_stays(after)),
        host=after.hosted,
        link_seconds=after.link.busy,
        largest=tuple(_largest(after_step, after)),
        timeline_before=_points(step, before),
        timeline_after=_points(after_step, after) if after is not before else (),
        graph_before=_text(step.module),
        forward=_text(split.forward) if split else "",
        backward=_text(split.backward) if split and split.backward else "",
        held_after=_held_after(after_step, after),
    )


def number_loops(module: fx.GraphModule) -> None:
    """Note on each loop which row of the report it belongs to: one round makes one row."""
    loops = loops_in(module.graph)
    made = max((node.meta.get("row", -1) for node in loops), default=-1) + 1
    for node in loops:
        node.meta.setdefault("row", made)


def _placed(rows: Sequence[LoopRow], step: Step) -> tuple[LoopRow, ...]:
    """The rows with the names of their loops in the planned step."""
    at: list[list[str]] = [[] for _ in rows]
    for node in loops_in(step.graph):
        if node.meta.get("row", len(at)) < len(at):
            at[node.meta["row"]].append(node.name)
    return tuple(
        dataclasses.replace(row, at=tuple(names)) for row, names in zip(rows, at, strict=True)
    )


def _stays(drafted: Drafted) -> Iterator[StayRow]:
    """What lies on the host, in the order in which it comes back."""
    for stay in drafted.stays:
        value, item = stay.move.value, drafted.late[stay.begins]
        begins = item.node if isinstance(item, Late) else item.value
        yield StayRow(
            value.name, stay.move.how, source_line(value), stay.bytes,
            stay.landed.name, begins.name, stay.stalled,
        )  # fmt: skip


def _held_after(step: Step, drafted: Drafted) -> int:
    """Bytes alive when the forward has returned: inputs, outputs and what is saved."""
    roots = {*drafted.saved, *(step.roots[n] for n in step.node_outputs())}
    stored = sum(step.bytes(n) for n in drafted.stored)
    return (
        step.input_bytes() + stored + sum(step.bytes(r) for r in roots if r.op == "call_function")
    )


def _text(module: fx.GraphModule) -> str:
    return str(module.print_readable(print_output=False))


def _moves(
    step: Step, before: Drafted, after: Drafted, proposals: Sequence[Proposal], ways: Ways
) -> list[MoveRow]:
    """Values stored before and not after are moved; the other way round they are kept.

    A value that is stored encoded, so that others can be made of it, is a row too: who judges what
    a plan does to numbers goes by the rows.
    """
    owner = {p.value.name: (p.by, p.how) for p in reversed(proposals) if p.rebuild is None}
    # A step with loops is another graph; what they left alone has kept its name.
    was, now = {n.name for n in before.saved}, {n.name for n in after.saved}
    there = {n.name for n in after.early}
    rebuilt = {value.name: move for value, move in after.plan.rebuilt.items()}
    per_copy = _copy_seconds(before, after)
    per_copy |= {stay.move.value.name: stay.stalled for stay in after.stays}
    rows = []
    for node in before.saved:
        if node.name in now:
            continue
        other = rebuilt.get(node.name)
        by, how = owner.get(node.name, ("?", "recompute"))
        if other:
            by, how = other.by, other.how
        if node.name not in there:
            how = "loop"
        seconds = per_copy.get(node.name, 0.0)
        row = MoveRow(by, node.name, how, source_line(node), step.bytes(node), seconds)
        rows.append(dataclasses.replace(row, offered=ways(node)))
    for node in after.saved:
        if node.name not in was and step.bytes(node):
            gain = -per_copy.get(node.name, 0.0)
            rows.append(
                MoveRow("planner", node.name, "keep", source_line(node), -step.bytes(node), gain)
            )
    for move in after.late:
        if isinstance(move, Proposal) and move.rebuild and move.value.name not in was:
            value, on_host = move.value, move.rebuild.host is not None
            size = 0 if on_host else sum(step.bytes(node) for node in move.rebuild.stored)
            seconds = per_copy.get(value.name, 0.0)
            rows.append(MoveRow(move.by, value.name, move.how, source_line(value), -size, seconds))
    return rows


def _copy_seconds(before: Drafted, after: Drafted) -> dict[str, float]:
    """Predicted seconds of each op that one backward computes itself."""
    seconds: dict[str, float] = {}
    for line in (before.backward, after.backward):
        for place, op in enumerate(line.ops):
            if op.kind != Kind.SOURCE:
                seconds[op.node.name] = max(line.real.seconds[place], op.seconds)
    return seconds


def _largest(step: Step, drafted: Drafted) -> list[ValueRow]:
    line = max((drafted.forward, drafted.backward), key=lambda t: t.peak)
    if not line.ops:
        return []
    kinds = _Kinds(step, drafted, line is drafted.forward)
    alive = [j for j in line.alive(line.at) if line.ops[j].bytes]
    rows = []
    for j in heapq.nlargest(LARGEST, alive, key=lambda j: line.ops[j].bytes):
        op = line.ops[j]
        shape, dtype = _shape(op.node)
        rows.append(
            ValueRow(
                op.node.name,
                op_name(op.node),
                source_line(op.node),
                shape,
                dtype,
                op.bytes,
                kinds.of(line, j),
            )
        )
    return rows


def _shape(node: fx.Node) -> tuple[tuple[int | str, ...], str]:
    found = tensors(node)
    if not found:
        return (), ""
    shape = tuple(s if isinstance(s, int) else str(s) for s in found[0].shape)
    return shape, str(found[0].dtype).removeprefix("torch.")


class _Kinds:
    """Which of the report's kinds an op's bytes belong to."""

    def __init__(self, step: Step, drafted: Drafted, forward: bool) -> None:
        self.step, self.forward = step, forward
        self.saved = set(drafted.saved) | set(drafted.stored)
        self.outputs = {step.roots[n] for n in step.node_outputs()}

    def of(self, line: Timeline, place: int) -> str:
        op = line.ops[place]
        if op.node in self.saved:
            return "saved"
        if op.moves:
            return "saved"  # on its way back from the host
        if self.forward:
            return "outputs" if op.node in self.outputs else "temporaries"
        if op.keep:
            return "gradients"
        return "inputs" if op.kind == Kind.SOURCE else "temporaries"


def _points(step: Step, drafted: Drafted) -> tuple[Point, ...]:
    static = step.static_bytes()
    fixed = {"parameters": static, "inputs": step.input_bytes() - static}
    points: list[Point] = []
    for side, line in (("forward", drafted.forward), ("backward", drafted.backward)):
        kinds = _Kinds(step, drafted, side == "forward")
        points.extend(_side_points(side, line, kinds, fixed))
    return tuple(points)


def _settle(live: dict[str, int], gap: int, kind: str | None) -> None:
    """Agree with the timeline: an output written over a dying input takes no room, and
    what the forward returned is alive through the backward."""
    if gap < 0 and kind is not None:
        live[kind] += gap
    elif gap > 0:
        live["outputs"] = live.get("outputs", 0) + gap


def _side_points(side: str, line: Timeline, kinds: _Kinds, fixed: dict[str, int]) -> list[Point]:
    """Sweep one side: a running total by kind, and the largest alive at each real op."""
    ops, n = line.ops, len(line.ops)
    dies: list[list[int]] = [[] for _ in range(n + 1)]
    early: dict[int, list[int]] = {}  # taken before their own op runs
    alive: dict[int, None] = {}
    total = dict(fixed)
    kind = {}
    for j, op in enumerate(ops):
        if not line.real.real[j] or not op.bytes:
            continue
        kind[j] = kinds.of(line, j)
        if op.kind == Kind.SOURCE:
            alive[j] = None
            total[kind[j]] = total.get(kind[j], 0) + op.bytes
        elif j in line.since:
            early.setdefault(line.since[j], []).append(j)
        if line.last[j] < n:
            dies[max(line.last[j], 0)].append(j)
    points = []
    for j, op in enumerate(ops):
        for taken in early.get(j, ()):
            alive[taken] = None
            total[kind[taken]] = total.get(kind[taken], 0) + ops[taken].bytes
        if op.kind != Kind.SOURCE and line.real.real[j]:
            if op.bytes and j not in line.since:
                alive[j] = None
                total[kind[j]] = total.get(kind[j], 0) + op.bytes
            top = heapq.nlargest(5, alive, key=lambda i: ops[i].bytes)
            largest = tuple((ops[i].node.name, ops[i].bytes) for i in top)
            live = {k: b for k, b in total.items() if b}
            if op.work:  # a loop's own
                live["temporaries"] = live.get("temporaries", 0) + op.work - line.over.get(j, 0)
            _settle(live, line.live[j] - sum(live.values()), kind.get(j))
            points.append(Point(op.node.name, source_line(op.node), side, live, largest))
        for dead in dies[j]:
            if dead in alive:
                del alive[dead]
                total[kind[dead]] -= ops[dead].bytes
    return points
