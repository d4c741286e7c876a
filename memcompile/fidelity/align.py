"""Which node of a changed graph stands for which of the graph it was made of.

Names tell most of it. Where a pass put other nodes in the place of some, their readers tell:
what a node reads at a place where its namesake reads ``x`` stands for ``x``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import fx

from memcompile.analysis.ops import op_name
from memcompile.split import STANDS_FOR
from memcompile.step import tensors
from memcompile.watch import TAG, Seen

#: Ops that change a dtype and nothing else.
CASTS = frozenset({"convert_element_type", "_to_copy", "clone", "to"})

Pairs = dict[fx.Node, fx.Node]


def align(seeds: Iterable[tuple[fx.Node, fx.Node]]) -> Pairs:
    """From pairs (new node, old node) to all pairs that their arguments tell of."""
    found: Pairs = {}
    todo = []
    for new, old in seeds:
        if new not in found:
            found[new] = old
            todo.append((new, old))
    while todo:
        new, old = todo.pop()
        if new.target == old.target:
            pairs = _arguments(new, old)
        elif is_cast(new):
            pairs = [(new.all_input_nodes[0], old)]
        else:
            pairs = []
        for one, other in pairs:
            if one not in found and shapes(one) == shapes(other):
                found[one] = other
                todo.append((one, other))
    return found


def through_rewrites(seen: Seen) -> Pairs:
    """From nodes of the rewritten joint graph to those of the graph before."""
    old, new = _by_name(seen.joint.graph), list(seen.rewritten.graph.nodes)
    seeds = [(n, old[n.name]) for n in new if n.name in old and alike(n, old[n.name])]
    outputs = [next(iter(m.graph.find_nodes(op="output"))) for m in (seen.rewritten, seen.joint)]
    return align([*seeds, *_arguments(*outputs)])


def through_split(seen: Seen) -> Pairs:
    """From nodes of the forward and the backward to those of the rewritten joint graph."""
    assert seen.forward is not None
    names = _by_name(seen.rewritten.graph)
    sides = [m.graph for m in (seen.forward, seen.backward) if m is not None]
    nodes = [node for graph in sides for node in graph.nodes]
    seeds = []
    for node in nodes:
        stands = names.get(node.meta.get(STANDS_FOR, ""))
        tagged = names.get(node.meta.get(TAG, ""))
        if stands is not None and shapes(stands) == shapes(node):
            seeds.append((node, stands))
        elif tagged is not None and alike(node, tagged):
            seeds.append((node, tagged))
    found = align(seeds)
    if seen.backward is not None:  # what the backward is given stands for what the forward made
        made = _by_name(seen.forward.graph)
        for node in seen.backward.graph.find_nodes(op="placeholder"):
            source = made.get(node.name)
            if source is not None and source in found:
                found[node] = found[source]
    return found


def composed(first: Pairs, then: Mapping[fx.Node, fx.Node]) -> Pairs:
    """Pairs through two steps."""
    return {new: then[middle] for new, middle in first.items() if middle in then}


def alike(one: fx.Node, other: fx.Node) -> bool:
    """Whether two nodes run the same op on the same shapes."""
    return one.op == other.op and _target(one) == _target(other) and shapes(one) == shapes(other)


def _target(node: fx.Node) -> object:
    return "" if node.op in ("placeholder", "get_attr") else node.target


def is_cast(node: fx.Node) -> bool:
    """Whether the node changes a dtype and nothing else."""
    return op_name(node) in CASTS and len(node.all_input_nodes) == 1


def shapes(node: fx.Node) -> list[tuple[str, ...]]:
    """The shapes of the tensors a node gives."""
    return [tuple(map(str, tensor.shape)) for tensor in tensors(node)]


def _by_name(graph: fx.Graph) -> dict[str, fx.Node]:
    return {node.name: node for node in graph.nodes}


def _arguments(new: fx.Node, old: fx.Node) -> list[tuple[fx.Node, fx.Node]]:
    """The nodes that two nodes read at the same places."""
    one, other = _read(new), _read(old)
    return list(zip(one, other, strict=True)) if len(one) == len(other) else []


def _read(node: fx.Node) -> list[fx.Node]:
    found: list[fx.Node] = []

    def note(arg: fx.Node) -> fx.Node:
        found.append(arg)
        return arg

    fx.node.map_arg((node.args, node.kwargs), note)
    return found
