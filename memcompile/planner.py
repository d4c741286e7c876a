"""Choose moves under the budget: the ladder.

The planner knows no pass. It has candidates (early values that may be rebuilt late)
and a draft that says what a plan costs. Several walks, from Inductor's own split down
and from segment checkpoints up, leave rungs: plans that no other plan beats in both
peak and seconds. The plan for a budget is the cheapest rung that fits, so a lower
budget never gets a higher peak. Limits are counted in drafts, never in wall clock, so
the same step always gets the same ladder. Segments: Chen et al. 2016, §3; greedy by bytes
a second: cf. Kirisame et al. 2021 (Dynamic Tensor Rematerialization), §3.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import weakref
from collections.abc import Iterable, Sequence

from torch import fx

from memcompile.alike import families
from memcompile.analysis.timeline import Kind
from memcompile.contract import Proposal
from memcompile.cuts import segment_seeds
from memcompile.draft import Draft
from memcompile.ladder import Ladder, Rung
from memcompile.plan import Drafted, Plan
from memcompile.ways import (
    copy_seconds,
    freed_bytes,
    has_room,
    kept_bytes,
    marks,
    pinned_bytes,
)

#: Rungs a walk aims for.
STEPS = 40


def draft_limit(nodes: int) -> int:
    """How many drafts planning may cost: a draft takes about ten microseconds a node."""
    return max(400, min(3000, 60_000 // max(nodes, 1)))


class Planner:
    """Builds the ladder of one step.

    Args:
        draft: what a plan costs.
        ground: the plan to start from (Inductor's own split).
        proposals: the moves that passes offer.
        bound: values the user has tagged to be recomputed; they are never kept.
    """

    def __init__(
        self,
        draft: Draft,
        ground: Plan,
        proposals: Sequence[Proposal],
        bound: frozenset[fx.Node] = frozenset(),
    ) -> None:
        self.draft, self.ground, self.bound = draft, ground, bound
        self.proposals = proposals
        self.limit = draft_limit(len(draft.step.nodes))
        self.offered: dict[fx.Node, list[Proposal]] = {}
        self.again: dict[fx.Node, None] = {}
        self.others: dict[fx.Node, list[Proposal]] = {}
        for proposal in proposals:
            self.offered.setdefault(proposal.value, []).append(proposal)
            if proposal.rebuild is None:
                self.again[proposal.value] = None
            else:
                self.others.setdefault(proposal.value, []).append(proposal)
        self.candidates = [v for v in self.again if draft.info[v].bytes > 0 and v not in bound]
        self.is_candidate = frozenset(self.candidates)
        self.ladder = Ladder()
        self.tried: set[object] = set()
        #: Drafts are as large as the step: those of rungs and the one at hand are held.
        self.held: weakref.WeakValueDictionary[object, Drafted] = weakref.WeakValueDictionary()
        self.drafts = 0

    @functools.cached_property
    def alike(self) -> dict[fx.Node, tuple[fx.Node, ...]]:
        """For each value that may be rebuilt those in the same place of other blocks."""
        return families(self.draft.step, self.draft.info, (*self.again, *self.others))

    # -- the walks ------------------------------------------------------------------

    def build(self, floor: bool = False) -> Ladder:
        """All walks, merged into one ladder.

        Where its lowest rung is all that is asked for (``floor``), half the drafts are left.
        """
        every = self.limit
        if floor:
            self.limit //= 2
        self._try(self.ground)
        self._walk_down(self.ground, self.limit // 3)
        seeds = segment_seeds(self.draft, self.is_candidate)
        for number, seed in enumerate(seeds):
            left = self.limit - self.drafts
            share = left // (2 * (len(seeds) - number) + 1)
            self._walk_down(seed, share // 2)
            self._walk_up(seed, share)
        self.polish(floor)
        self.limit = every
        return self.ladder

    def follow(self, other: Planner) -> None:
        """Try the plans of another planner's ladder, of a step whose values are named alike."""
        named = {node.name: node for node in self.draft.step.nodes}
        moves = {(m.value.name, m.how): m for m in self.proposals if m.rebuild is not None}
        for rung in other.ladder.rungs:
            known = [(v.name, move.how) for v, move in rung.plan.rebuilt.items()]
            if all(what in moves for what in known):
                rebuilt = {moves[what].value: moves[what] for what in known}
                kept = (named[v.name] for v in rung.plan.kept if v.name in named)
                self._try(Plan(frozenset(kept), rebuilt))

    def polish(self, floor: bool = False) -> None:
        """Improve the ladder's own rungs, or its lowest, by one keep or one drop at a time."""
        done: set[object] = set()
        few = len(self.candidates) <= 16
        while self.left:
            rungs = self.ladder.rungs[:1] if floor else self.ladder.rungs
            todo = [r for r in rungs if r.plan.key() not in done]
            if not todo:
                return
            # Spread over the ladder rather than start at one end.
            for rung in todo[:: max(1, len(todo) // 12)]:
                done.add(rung.plan.key())
                self._neighbours(rung, 10_000 if few else 6)
                if not self.left:
                    return

    @property
    def ground_draft(self) -> Drafted:
        """The draft of the plan the planner starts from."""
        return self._try(self.ground)

    def drafted(self, plan: Plan) -> Drafted:
        """The draft of any plan of the ladder."""
        return self._try(plan)

    @property
    def left(self) -> bool:
        """Whether any drafts are left."""
        return self.drafts < self.limit

    def _try(self, plan: Plan) -> Drafted:
        key = plan.key()
        drafted = self.held.get(key)
        if drafted is None:
            drafted = self.held[key] = self.draft.under(plan)
            if key not in self.tried:
                self.tried.add(key)
                self.drafts += 1
                self.ladder.offer(Rung(drafted.peak, drafted.seconds, plan, self, drafted))
        return drafted

    def _walk_down(self, plan: Plan, drafts: int) -> None:
        """Drop what frees most bytes a second at the peak, until nothing lowers it."""
        stop = min(self.limit, self.drafts + drafts)
        now = self._try(plan)
        span = max(1, now.peak - self.draft.before)
        stride = max(1, span // STEPS)
        while self.drafts < stop:
            options = self._drops(now)
            if not options:
                return
            better = self._first_lower(now, options, stride, stop)
            if better is None:
                return
            now = better

    def _first_lower(
        self, now: Drafted, options: list[_Drop], stride: int, stop: int
    ) -> Drafted | None:
        """Accept several drops at once; where that does not lower the peak, fewer."""
        batch, freed = 0, 0
        while batch < len(options) and freed < stride:
            freed += options[batch].bytes
            batch += 1
        while batch >= 1 and self.drafts < stop:
            new = self._try(self._without(now.plan, options[:batch]))
            if new.peak < now.peak:
                return new
            batch //= 2
        for option in options[1:9]:
            if self.drafts >= stop:
                return None
            new = self._try(self._without(now.plan, [option]))
            if new.peak < now.peak:
                return new
        for same in self._families(now, options)[:4]:  # blocks that are alike peak alike
            if self.drafts >= stop:
                return None
            new = self._try(self._without(now.plan, same))
            if new.peak < now.peak:
                return new
        # What is alive at the peak for others' sake: drop everything offered at once.
        if self.drafts < stop and len(options) > 1:
            new = self._try(self._without(now.plan, options))
            if new.peak < now.peak:
                return new
        return None

    def _walk_up(self, plan: Plan, drafts: int) -> None:
        """Keep again what saves most seconds a byte, until nothing runs twice."""
        stop = min(self.limit, self.drafts + drafts)
        now = self._try(plan)
        top = self.ground_draft.peak
        stride = max(1, (top - now.peak) // STEPS)
        while self.drafts < stop and now.peak < top:
            options = self._keeps(now)
            if not options:
                return
            batch, added = 0, 0
            while batch < len(options) and added < stride:
                added += options[batch][0]
                batch += 1
            new = self._try(now.plan.keeping([v for _, v in options[:batch]]))
            if new.plan.key() == now.plan.key():
                return
            now = new

    def _neighbours(self, rung: Rung, most: int) -> None:
        now = self._try(rung.plan)
        drops = self._drops(now, every=most > 100)
        keeps = self._keeps(now)
        again = {value for _, value in keeps}
        for same in [[drop] for drop in drops[:most]] + self._families(now, drops)[:most]:
            if not self.left:
                return
            self._try(self._without(now.plan, same))
        alike = [tuple(v for v in self.alike[k] if v in again) for _, k in keeps]
        several = [same for same in dict.fromkeys(alike) if len(same) > 1]
        for values in [(value,) for _, value in keeps[:most]] + several[:most]:
            if not self.left:
                return
            self._try(now.plan.keeping(values))
        if most > 100:
            for pair in itertools.combinations(drops, 2):  # some pay only together
                if not self.left:
                    return
                self._try(self._without(now.plan, pair))
            for option in drops:
                for _, value in keeps:
                    if not self.left:
                        return
                    self._try(self._without(now.plan, [option]).keeping([value]))

    def _without(self, plan: Plan, drops: Iterable[_Drop]) -> Plan:
        """The plan with values dropped; what the host has no room for stays as it is."""
        kept, rebuilt, pinned = set(plan.kept), dict(plan.rebuilt), self._pinned(plan)
        for drop in drops:
            other = drop.other
            if other is not None and not has_room(self.draft.step, pinned, other):
                continue
            kept.discard(drop.value)
            rebuilt.pop(drop.value, None)
            pinned.pop(drop.value, None)
            if other is not None:
                rebuilt[drop.value] = other
                pinned[drop.value] = pinned_bytes(self.draft.step, other)
        return Plan(frozenset(kept), rebuilt)

    def _pinned(self, plan: Plan) -> dict[fx.Node, int]:
        """Bytes of the host's memory that each move of a plan takes."""
        return {v: pinned_bytes(self.draft.step, move) for v, move in plan.rebuilt.items()}

    # -- options --------------------------------------------------------------------

    def ways(self, value: fx.Node, now: Drafted) -> tuple[tuple[str, float], ...]:
        """The moves offered for a value, with the seconds each is likely to cost in a draft."""
        found = {}
        stored, copies = (frozenset(nodes) - {value} for nodes in (now.saved, now.copies))
        for move in self.offered.get(value, ()):
            if move.rebuild is None:
                seconds = self._chain_seconds(value, stored, copies)
            else:
                seconds = self._rebuilt_seconds(now, move)
            found[move.how] = seconds
        return tuple(found.items())

    def _rebuilt_seconds(self, now: Drafted, move: Proposal) -> float:
        """Seconds to encode and decode a value, and of copies that kernels do not hide."""
        step, rates = self.draft.step, self.draft.rates
        coded = 4 * self.draft.info[move.value].bytes / rates.memory
        return coded + copy_seconds(step, rates, now, move)

    def _drops(self, now: Drafted, every: bool = False) -> list[_Drop]:
        """Ways to free a value stored at the peak, best bytes a second first."""
        stored, copies = frozenset(now.saved), frozenset(now.copies)
        at_peak = self._stored_at_peak(now)
        if every:
            at_peak = stored.union(now.stored, (stay.move.value for stay in now.stays))
        options, pinned = [], self._pinned(now.plan)
        for value in (*now.saved, *now.plan.rebuilt):
            move = now.plan.rebuilt.get(value)  # what is encoded may take less still
            size = freed_bytes(self.draft.step, move) if move else self.draft.info[value].bytes
            if not size or at_peak.isdisjoint(marks(move) if move else [value]):
                continue
            if value in self.again:
                seconds = self._chain_seconds(value, stored, copies)
                options.append(_Drop(value, None, size, seconds))
            for other in self.others.get(value, ()):
                kept = kept_bytes(self.draft.step, other)
                if kept < size and other is not move and has_room(self.draft.step, pinned, other):
                    seconds = self._rebuilt_seconds(now, other)
                    options.append(_Drop(value, other, size - kept, seconds))
        order = self.draft.step.order
        options.sort(key=lambda o: (-o.bytes / (o.seconds + 1e-9), order[o.value]))
        return options

    def _families(self, now: Drafted, drops: list[_Drop]) -> list[list[_Drop]]:
        """For each drop, best first, the same one in all blocks that are alike."""
        every = {(d.value, d.other and d.other.how): d for d in self._drops(now, every=True)}
        found: dict[tuple[object, ...], list[_Drop]] = {}
        for drop in drops:
            how = drop.other and drop.other.how
            same = [every[v, how] for v in self.alike[drop.value] if (v, how) in every]
            if len(same) > 1:
                found.setdefault((how, *(d.value for d in same)), same)
        return list(found.values())

    def _stored_at_peak(self, now: Drafted) -> frozenset[fx.Node]:
        if now.backward.peak >= now.forward.peak:
            line = now.backward
            return frozenset(
                line.ops[j].node
                for j in line.alive(line.at)
                if (line.ops[j].kind == Kind.SOURCE and line.ops[j].bytes) or line.ops[j].moves
            )
        line = now.forward
        leaving = {node for stay in now.stays for node in marks(stay.move)}
        alive = [line.ops[j] for j in line.alive(line.at)]
        return frozenset(op.node for op in alive if op.keep or op.node in leaving)

    def _chain_seconds(
        self, value: fx.Node, stored: frozenset[fx.Node], copies: frozenset[fx.Node]
    ) -> float:
        """Seconds to run ``value`` again, with all on the way that does not run already."""
        info, early = self.draft.info, self.draft.step.sides.early
        memory = self.draft.rates.memory
        total, stack, seen = 0.0, [value], set()
        while stack:
            node = stack.pop()
            if node in seen or node not in early:
                continue
            seen.add(node)
            what = info[node]
            if what.kind == Kind.SOURCE:
                continue
            if node is not value and (node in stored or node in copies):
                continue
            moved = what.bytes if what.kind == Kind.POINTWISE else 2 * what.bytes
            total += max(what.seconds, moved / memory)
            if node is not value and node not in self.again:
                continue  # it would be stored instead
            stack.extend(what.inputs)
        return total

    def _keeps(self, now: Drafted) -> list[tuple[int, fx.Node]]:
        """Values that run twice and could be kept, most seconds saved a byte first."""
        info, memory = self.draft.info, self.draft.rates.memory
        scored = []
        for node in dict.fromkeys((*now.copies, *now.plan.rebuilt)):
            if node not in self.is_candidate and node not in now.plan.rebuilt:
                continue
            what = info[node]
            moved = what.bytes if what.kind == Kind.POINTWISE else 2 * what.bytes
            gain = max(what.seconds, moved / memory) + self.draft.rates.launch
            if now.link.stalled and node in now.plan.rebuilt:
                gain += copy_seconds(self.draft.step, self.draft.rates, now, now.plan.rebuilt[node])
            scored.append((gain / what.bytes, what.bytes, node))
        order = self.draft.step.order
        scored.sort(key=lambda s: (-s[0], order[s[2]]))
        return [(size, node) for _, size, node in scored]


@dataclasses.dataclass(frozen=True, slots=True)
class _Drop:
    """One way to free a stored value."""

    value: fx.Node
    other: Proposal | None  #: ``None``: run its op again
    bytes: int
    seconds: float
