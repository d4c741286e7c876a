"""The order in which the late nodes of a step run."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

from torch import fx

from memcompile.analysis.ops import runs_twice
from memcompile.analysis.timeline import Kind
from memcompile.info import Info
from memcompile.step import Step

#: Library calls that a late op may be moved up past: what it reads may have to be
#: recomputed, and is then not torn from where it is needed next.
NEAR = 4


def late_order(
    step: Step, info: Mapping[fx.Node, Info], gradients: Sequence[fx.Node]
) -> list[fx.Node]:
    """Late nodes the gradients need, from the first reader of a tangent on.

    Autograd's engine starts there too; what stands before it is pulled in when
    a later node needs it, so that recomputation is never dragged forward.
    """
    late = step.sides.late
    effects = [n for n in step.nodes if n in late and n.op == "call_function" and n.is_impure()]
    needed: set[fx.Node] = set()
    stack = [g for g in gradients if g in late] + [step.roots[e] for e in effects]
    while stack:
        node = stack.pop()
        if node in needed or node not in late:
            continue
        needed.add(node)
        stack.extend(info[node].inputs)
    nodes = [n for n in step.nodes if n in needed and n.op == "call_function"]
    tangents = set(step.tangents)
    order = _freeing_first(nodes, info, gradients, frozenset(nodes) | tangents)
    for place, node in enumerate(order):
        if any(i in tangents for i in info[node].inputs):
            return order[place:] + order[:place]
    return order


def _freeing_first(
    order: list[fx.Node],
    info: Mapping[fx.Node, Info],
    gradients: Sequence[fx.Node],
    late: frozenset[fx.Node],
) -> list[fx.Node]:
    """What frees more than it makes runs as soon as it can, the rest in step order.

    Autograd computes the gradient of a product's input before that of its weight; the
    other way round, what the weight's gradient reads is gone before the former is made.
    """
    kernel = _kernels(order, info, gradients)
    last = {i: kernel[node] for node in order for i in info[node].inputs}
    reads: dict[fx.Node, dict[fx.Node, None]] = {}
    for node in order:
        outer = (i for i in info[node].inputs if kernel.get(i) is not kernel[node])
        reads.setdefault(kernel[node], {}).update(dict.fromkeys(outer))
    calls = list(itertools.accumulate(info[node].kind >= Kind.EXTERN for node in order))
    place: dict[fx.Node, int] = {}
    for number, root in enumerate(order):
        if kernel[root] is not root:
            continue
        place[root] = number
        freed = sum(
            info[i].bytes for i in reads[root] if last[i] is root and info[i].kind != Kind.SOURCE
        )
        given = [place[kernel[i]] if i in kernel else -1 for i in reads[root] if i in late]
        if not given or freed <= info[root].bytes or not runs_twice(root):
            continue
        ready = max(given)
        if calls[number] - (calls[ready] if ready >= 0 else 0) <= NEAR:
            place[root] = ready
    return sorted(order, key=lambda node: place[kernel[node]])


def _kernels(
    order: list[fx.Node], info: Mapping[fx.Node, Info], gradients: Sequence[fx.Node]
) -> dict[fx.Node, fx.Node]:
    """For each late node the one at the end of the chain of fusible ops it only feeds."""
    users: dict[fx.Node, dict[fx.Node, None]] = {}
    kernel: dict[fx.Node, fx.Node] = {}
    returned = frozenset(gradients)
    for node in reversed(order):
        for i in info[node].inputs:
            users.setdefault(i, {})[node] = None
        ends = {kernel[user] for user in users.get(node, ())}
        end = ends.pop() if len(ends) == 1 else node
        inner = info[node].kind == Kind.POINTWISE and node not in returned
        kernel[node] = end if inner and info[end].kind < Kind.EXTERN else node
    return kernel
