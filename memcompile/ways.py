"""The ways of a draft's values to the host and back."""

from __future__ import annotations

import bisect
from collections.abc import Mapping, Sequence
from typing import Any

from torch import fx

from memcompile._torch import transfers as copies
from memcompile.analysis.cost import Rates
from memcompile.analysis.timeline import Kind, Op, kernel_seconds, last_needs, materialise
from memcompile.analysis.transfers import Copy, Schedule, back, out
from memcompile.contract import Proposal
from memcompile.plan import Drafted, Link, Stay
from memcompile.step import Step


def hosted_bytes(step: Step, move: Proposal) -> int:
    """Bytes that a move stores on the host; 0 for one that stores on the device."""
    how = move.rebuild
    if how is None or how.host is None:
        return 0
    return sum(step.bytes(node) for node in how.stored)


def pinned_bytes(step: Step, move: Proposal) -> int:
    """The same as torch's allocator of pinned memory takes it: powers of two."""
    how = move.rebuild
    if how is None or how.host is None:
        return 0
    return sum(1 << max(0, step.bytes(node) - 1).bit_length() for node in how.stored)


def has_room(step: Step, pinned: Mapping[fx.Node, int], move: Proposal) -> bool:
    """Whether the host has room for what a move stores, beside what other values' moves do."""
    how = move.rebuild
    if how is None or how.host is None:
        return True
    taken = sum(pinned.values()) - pinned.get(move.value, 0)
    return taken + pinned_bytes(step, move) <= how.host.limit


def marks(move: Proposal) -> list[fx.Node]:
    """Nodes of which one is alive where the move itself takes memory of the device."""
    stored = move.rebuild.stored if move.rebuild is not None else ()
    if move.rebuild is None or move.rebuild.host is None:
        return list(stored)
    ways = [copy for node in stored for copy in node.meta.get("copies", {}).values()]
    return [move.value, *stored, *ways]


def kept_bytes(step: Step, move: Proposal) -> int:
    """Bytes of the device that a move takes from forward to backward.

    Those that it takes until a copy is over count as one: more than with a copy waited for.
    """
    how = move.rebuild
    if how is not None and how.host is not None:
        return 0 if how.host.waits else 1
    return sum(step.bytes(out) for out in how.stored) if how is not None else 0


def freed_bytes(step: Step, move: Proposal) -> int:
    """Bytes of the device that another move of the same value may free."""
    kept = kept_bytes(step, move)
    return kept and (hosted_bytes(step, move) or kept)


def copy_seconds(step: Step, rates: Rates, now: Drafted, move: Proposal) -> float:
    """Seconds that a move's copies to the host and back are likely to add to a draft's."""
    size = hosted_bytes(step, move)
    if not size or move.rebuild is None or move.rebuild.host is None:
        return 0.0
    both = size / rates.to_host + size / rates.from_host
    idle = 0.0 if move.rebuild.host.waits else max(0.0, now.seconds - now.link.busy)
    return 4 * rates.launch + max(0.0, both - idle)


class Ways:
    """Collects the copies of one draft while its sides are laid out, then schedules them.

    Args:
        step: the step.
        rates: of the device and its link.
        ops: the backward's.
        coming: each move that is stored on the host, with the places in ``ops`` of its copies.
        starts: for each item of the backward's order, where in ``ops`` it starts.
    """

    def __init__(
        self,
        step: Step,
        rates: Rates,
        ops: list[Op],
        coming: Sequence[tuple[Proposal, list[int]]],
        starts: list[int],
    ) -> None:
        self.step, self.rates, self.ops = step, rates, ops
        self.coming, self.starts = coming, starts
        self.values = {move.value for move, _ in coming}
        self.leaving: list[tuple[Proposal, int, list[int]]] = []
        self.passed: list[fx.Node] = []  #: nodes of the forward, and where the ops of each end
        self.ends: list[int] = []
        self.away, self.home = Schedule(()), Schedule(())

    # -- while the forward is laid out ------------------------------------------------------

    def leave(self, ops: list[Op], move: Proposal, sources: list[int]) -> None:
        """Lay out the copies of what was stored at ``sources``, if it is read late at all."""
        if move.value not in self.values:
            return
        assert move.rebuild is not None
        for stored, place in zip(move.rebuild.stored, sources, strict=True):
            node, size = copy_node(move, stored, copies.offload), self.step.bytes(stored)
            ops.append(Op(node, Kind.EXTERN, (place,), 0, moves=size))
        self.leaving.append((move, len(ops) - 1, sources))

    def pass_by(self, ops: list[Op], node: fx.Node) -> None:
        """The node is laid out, with all that is written after it."""
        self.passed.append(node)
        self.ends.append(len(ops))

    # -- when both are ----------------------------------------------------------------------

    def out(self, ops: list[Op]) -> dict[str, Any]:
        """What :func:`simulate` is to know of the forward: sources are held until a wait."""
        real = materialise(ops)
        last = last_needs(ops, real)
        given = [
            Copy(
                place,
                hosted_bytes(self.step, move),
                _waits(move),
                max(min(last[source], len(ops) - 1) for source in sources),
            )
            for move, place, sources in self.leaving
        ]
        seconds = kernel_seconds(ops, real, self.rates.memory, self.rates.launch)
        self.away = out(given, seconds, self.rates.to_host)
        held: dict[int, int] = {}
        for (_, _, sources), place in zip(self.leaving, self.away.places, strict=True):
            for source in sources:
                held[source] = max(place, held.get(source, 0))
        return {"real": real, "held": held}

    def back(self) -> dict[str, Any]:
        """And of the backward: buffers are taken where copies into them begin."""
        real = materialise(self.ops)
        seconds = kernel_seconds(self.ops, real, self.rates.memory, self.rates.launch)
        given = [
            Copy(places[0], hosted_bytes(self.step, move), _waits(move))
            for move, places in self.coming
        ]
        self.home = back(given, seconds, self.rates.from_host)
        self.items = [
            max(0, bisect.bisect_right(self.starts, place) - 1) for place in self.home.places
        ]
        since: dict[int, int] = {}
        for (_, places), item in zip(self.coming, self.items, strict=True):
            for place in places:
                since[place] = min(self.starts[item], place)
        return {"real": real, "since": since}

    @property
    def link(self) -> Link:
        """Seconds of both ways."""
        stalled = sum(self.away.stalls) + sum(self.home.stalls)
        return Link(self.away.busy + self.home.busy, stalled)

    def stays(self) -> tuple[Stay, ...]:
        """Where each stay on the host begins and ends."""
        left = [move.value for move, _, _ in self.leaving]
        places = [
            min(bisect.bisect_right(self.ends, p), len(self.ends) - 1) for p in self.away.places
        ]
        landed = dict(zip(left, (self.passed[place] for place in places), strict=True))
        waited = dict(zip(left, self.away.stalls, strict=True))
        return tuple(
            Stay(
                move, hosted_bytes(self.step, move), landed[move.value], item,
                waited[move.value] + stalled,
            )
            for (move, _), item, stalled in zip(
                self.coming, self.items, self.home.stalls, strict=True
            )
        )  # fmt: skip


def _waits(move: Proposal) -> bool:
    return move.rebuild is not None and move.rebuild.host is not None and move.rebuild.host.waits


def copy_node(move: Proposal, stored: fx.Node, target: Any) -> fx.Node:
    """What stands for a copy in drafts: a node of its own, the same each time."""
    known: dict[Any, fx.Node] = stored.meta.setdefault("copies", {})
    if target not in known:
        word = "offload" if target is copies.offload else "reload"
        node = fx.Graph().create_node("call_function", target, name=f"{word}_{move.value.name}")
        node.meta = {
            "val": stored.meta["val"],
            "stack_trace": move.value.meta.get("stack_trace"),
        }
        known[target] = node
    return known[target]
