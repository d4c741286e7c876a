"""What is large at the highest moments of a step: where loops are looked for."""

from __future__ import annotations

from collections.abc import Collection, Iterator

from torch import fx

from memcompile.analysis.ops import classify
from memcompile.analysis.timeline import Kind
from memcompile.draft import Draft
from memcompile.info import Info
from memcompile.plan import Drafted
from memcompile.step import is_loop, is_view

#: Values looked at of each moment.
WIDEST = 4
#: How many nodes after a value what a loop reads of it may be.
AHEAD = 12


def large_at_peak(draft: Draft, drafted: Drafted, moments: int) -> Iterator[fx.Node]:
    """The largest computed values alive at the highest moments, the highest moment's first.

    Of one moment the largest come first, of those products of several values; what is kept
    anyway comes last. After them comes what they are being made into, for a loop to read.

    Args:
        draft: of the step.
        drafted: the step under a plan.
        moments: how many.
    """
    given: set[fx.Node] = set()
    order, info, kept = draft.step.order, draft.info, drafted.plan.kept
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
        nodes.sort(key=lambda n: (-alive[n], n in kept, -classify(n), -_made_of(info[n]), order[n]))
        nodes = nodes[:WIDEST]
        nodes += [n for n in _ahead(draft, nodes, kept) if n not in nodes]
        new = [n for n in nodes if n not in given]
        if new:
            yield from new
            given.update(new)
            moments -= 1
        if not moments:
            return


def _made_of(info: Info) -> int:
    """How many computed values a value is made of: a product of two says most of its layer."""
    return sum(node.op == "call_function" for node in info.inputs)


def _ahead(draft: Draft, nodes: list[fx.Node], kept: Collection[fx.Node]) -> list[fx.Node]:
    """What ``nodes`` are being made into, of their order, that loops read whole.

    With no backward, whose values show them, products of two such values too.
    """
    roots, found, whole = draft.step.roots, [], not draft.step.sides.late
    for node in nodes:
        least, stack = draft.step.bytes(node) // 2, [node]
        for each in stack:  # grows
            readers = [u for v in _views(each) for u in v.users]
            turn = any(is_loop(u) for u in readers) or (whole and _is_product(draft, each, least))
            if each is not node and turn:
                found.append(each)
                break
            if each in kept or len(stack) > AHEAD:
                break
            larger = (u for u in readers if u.op == "call_function" and not is_loop(u))
            new = (roots[u] for u in larger if draft.step.bytes(roots[u]) >= least)
            stack += [u for u in dict.fromkeys(new) if u not in stack]
    return list(dict.fromkeys(found))


def _is_product(draft: Draft, node: fx.Node, least: int) -> bool:
    """Whether a library call makes the node of two values of ``least`` bytes or more."""
    large = [i for i in draft.info[node].inputs if draft.info[i].bytes >= least]
    return classify(node) == Kind.EXTERN and len(large) > 1


def _views(node: fx.Node) -> list[fx.Node]:
    """A value and its views."""
    found = [node]
    for each in found:
        found += [user for user in each.users if is_view(user)]
    return found
