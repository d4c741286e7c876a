"""What the trips of a loop cost: bytes inside one, seconds of all."""

from __future__ import annotations

import dataclasses

import sympy
from torch import fx

from memcompile.access import access
from memcompile.analysis import ops as op_kinds
from memcompile.analysis.cost import Rates, node_seconds
from memcompile.analysis.merged import VIEWS
from memcompile.analysis.rules import Merged, is_sliced
from memcompile.analysis.timeline import Kind, Op, simulate
from memcompile.body import Trips, adds_in_place, given
from memcompile.lengths import size_expr
from memcompile.region import Part, Region
from memcompile.step import Step, hint
from memcompile.symbolic import bound

#: Seconds to call the body once, beside its kernels.
TRIP = 5e-5
#: Bytes that caches hold, and how much longer a trip takes that makes more: measured on one CPU
#: (triangle attention, N = 192: trips of 9 MB take 1.2 times as long in all as of 5 MB or 2 MB).
CACHE, SPILLS = 6 * 2**20, 1.2


@dataclasses.dataclass(frozen=True)
class LoopCost:
    """What a loop node costs."""

    bytes: int  #: alive inside it beside its inputs, at most: its buffers and one trip
    seconds: float  #: of all its trips
    expression: sympy.Expr | None = None  #: of ``bytes``, where sizes are symbolic


def cost(step: Step, region: Region, part: Part, run: Trips, rates: Rates) -> LoopCost:
    """Bytes one trip needs beside the buffers, and the seconds of all of them.

    Args:
        step: the step.
        region: what the loops hold.
        part: the side of it that is looped.
        run: how its dimension is cut.
        rates: what the device can do.
    """
    share = hint(run.size) / region.length
    chunk = run.most / size_expr(region.size)
    sizes: dict[fx.Node, sympy.Expr] = {}
    place: dict[fx.Node, int] = {}
    ops: list[Op] = []
    written = set(part.outputs)
    for node in (*given(part), *part.nodes):
        root, copied = step.roots[node], _copied(region, part, node)
        if root is not node and root in place and not copied:
            place[node] = place[root]
            continue
        inside = node in region.reads and node not in part.inputs
        sliced = is_sliced(region.places.get(node)) or (
            not inside and None not in part.inputs.get(node, {None})
        )
        size = int(step.bytes(node) * (share if sliced else 1.0))
        if step.dynamic:
            sizes[node] = step.bytes_expr(node) * (chunk if sliced else 1)
        place[node] = len(ops)
        if not inside:
            ops.append(Op(node, Kind.SOURCE, (), 0, owned=False, traffic=size))
            if any(isinstance(p, Merged) for p in part.inputs.get(node, ())):
                place[node] = len(ops)
                ops.append(Op(node, Kind.POINTWISE, (len(ops) - 1,), size))
            continue
        reads = tuple(dict.fromkeys(place[a] for a in node.all_input_nodes if a in place))
        seconds = node_seconds(node, rates, materialised=False) * share
        several = isinstance(node.meta.get("val"), (list, tuple))
        own = 0 if several or (node in written and sliced) else size
        if node in written and adds_in_place(node, region.places[node]):
            own, seconds = 0, max(seconds, 2 * size / rates.memory)
        name, kind = op_kinds.op_name(node), op_kinds.classify(node)
        kind = Kind.POINTWISE if copied else kind
        heavy, drawn = name in op_kinds.HEAVY, name in op_kinds.DRAWN
        walk = access(node)
        moved = tuple(place[a] for a in walk.moved if a in place)
        ops.append(
            Op(node, kind, reads, own, seconds, heavy, drawn, moved=moved, breaks=walk.breaks)
        )
    line = simulate(ops, grouped=step.device.type == "cpu", parted=True)
    buffers = sum(step.bytes(n) for n in part.outputs)
    trip = line.seconds(rates.memory, rates.launch) * (SPILLS if line.peak > CACHE else 1) + TRIP
    expression = None
    if step.dynamic:
        written_to = sympy.Add(*(step.bytes_expr(n) for n in part.outputs))
        expression = written_to + bound(step, line, sizes.__getitem__)
    return LoopCost(buffers + line.peak, trip * hint(run.count), expression)


def _copied(region: Region, part: Part, node: fx.Node) -> bool:
    """Whether a view copies its part of what the loop reads: there rows are apart."""
    if node not in region.reads or op_kinds.op_name(node) not in VIEWS:
        return False
    merged = isinstance(region.places[node], Merged)
    return merged and any(a in part.inputs for a in node.all_input_nodes)
