"""Which values of a step are alike: the same place in blocks that repeat.

Colour refinement (Weisfeiler and Leman 1968): values start out coloured by their op and
size, and are told apart by the colours around them, a few steps far.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping

from torch import fx

from memcompile.info import Info
from memcompile.step import Step

#: How far two values' surroundings must agree, in ops.
FAR = 4


def families(
    step: Step, info: Mapping[fx.Node, Info], values: Iterable[fx.Node]
) -> dict[fx.Node, tuple[fx.Node, ...]]:
    """For each of ``values`` all that are alike, itself included, in the step's order."""
    colour = _number({n: (_op(n), info[n].bytes, n in step.sides.early) for n in info})
    users: dict[fx.Node, list[fx.Node]] = {}
    for node, what in info.items():
        for read in what.inputs:
            users.setdefault(read, []).append(node)
    for _ in range(FAR):
        colour = _number(
            {
                node: (
                    colour[node],
                    tuple(colour[i] for i in what.inputs),
                    tuple(sorted(colour[u] for u in users.get(node, ()))),
                )
                for node, what in info.items()
            }
        )
    by_colour: dict[int, list[fx.Node]] = {}
    for value in sorted(values, key=step.order.__getitem__):
        by_colour.setdefault(colour[value], []).append(value)
    return {value: tuple(same) for same in by_colour.values() for value in same}


def _number(described: Mapping[fx.Node, Hashable]) -> dict[fx.Node, int]:
    """The same number for what is described alike."""
    numbers: dict[Hashable, int] = {}
    return {node: numbers.setdefault(what, len(numbers)) for node, what in described.items()}


def _op(node: fx.Node) -> str:
    return str(node.target) if node.op == "call_function" else node.op
