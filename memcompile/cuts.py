"""Narrow places of a forward: where little is alive, one layer ends and the next begins."""

from __future__ import annotations

from collections.abc import Collection

from torch import fx

from memcompile.analysis.timeline import Kind
from memcompile.draft import Draft
from memcompile.plan import Drafted, Plan
from memcompile.step import Step

#: How many layers make a segment.
SEGMENTS = (1, 2, 3, 4, 6, 8)


def narrow_cuts(
    draft: Draft, allowed: Collection[fx.Node] | None = None
) -> list[frozenset[fx.Node]]:
    """Crossing sets at local minima of the forward's live bytes.

    Args:
        draft: of the step.
        allowed: the values that sets are made of; ``None`` for any.
    """
    nodes = [n for n in draft.step.nodes if n in draft.info and n in draft.forward_always]
    last: dict[fx.Node, int] = {}
    for place, node in enumerate(nodes):
        for used in draft.info[node].inputs:
            last[used] = place
    alive: dict[fx.Node, None] = {}
    sizes, sets = [], []
    for place, node in enumerate(nodes):
        if draft.info[node].bytes and draft.info[node].kind != Kind.SOURCE:
            alive[node] = None
        for used in [n for n in draft.info[node].inputs if last.get(n) == place]:
            alive.pop(used, None)
        alive_now = frozenset(v for v in alive if last.get(v, -1) > place)
        sets.append(alive_now if allowed is None else alive_now & frozenset(allowed))
        sizes.append(sum(draft.info[v].bytes for v in alive_now))
    return _minima(sizes, sets)


def _minima(sizes: list[int], sets: list[frozenset[fx.Node]]) -> list[frozenset[fx.Node]]:
    """The sets at local minima no larger than three quarters of the mean size."""
    if not sizes:
        return []
    mean = sum(sizes) / len(sizes)
    window = max(2, len(sizes) // 200)
    found: dict[frozenset[fx.Node], None] = {}
    for place, size in enumerate(sizes):
        around = sizes[max(0, place - window) : place + window + 1]
        if 0 < size == min(around) and size <= 0.75 * mean:
            found[sets[place]] = None
    found.pop(frozenset(), None)
    return list(found)


def late_from(step: Step, drafted: Drafted) -> fx.Node:
    """The node after the one at the peak, where a graph without a split is cut in two."""
    line = drafted.forward
    return line.ops[min(line.at + 1, len(line.ops) - 1)].node


def segment_seeds(draft: Draft, candidates: frozenset[fx.Node]) -> list[Plan]:
    """Plans that keep only what crosses narrow places of the forward: all, or every so many."""
    cuts = narrow_cuts(draft, candidates)
    seeds = dict.fromkeys(frozenset[fx.Node]().union(*cuts[::every]) for every in SEGMENTS)
    return [Plan(kept) for kept in seeds]
