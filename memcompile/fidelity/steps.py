"""The step compiled by memopt and seen from outside, and its graphs walked over."""

from __future__ import annotations

import collections
from collections.abc import Mapping, Sequence
from typing import Any

from torch import fx

from memcompile import _torch
from memcompile.analysis.ops import op_name
from memcompile.contract import Pass
from memcompile.fidelity.data import NodeError
from memcompile.fidelity.sensitivity import Candidate, candidates, measure, trace
from memcompile.fidelity.subject import Ran, Subject
from memcompile.fidelity.walk import Walk, arguments_of, fed_by, walk
from memcompile.registry import spell
from memcompile.step import module_names, source_line
from memcompile.watch import Seen, Watch, dtypes, watching

#: By the key of a graph: the names of its nodes that stay exact.
Exact = Mapping[str, frozenset[str]]


def compiled(
    subject: Subject,
    options: Mapping[str, Any],
    exact: Exact | None = None,
    decompositions: dict[Any, Any] | None = None,
) -> tuple[Ran, list[Seen]]:
    """One step under memopt, and its graphs.

    Args:
        subject: the step.
        options: memopt's.
        exact: nodes that stay exact; ``None``: those that were decided before.
        decompositions: to trace with; ``None``: Inductor's choice.
    """
    with (
        watching(Watch(exact, decompositions)) as watch,
        _torch.functorch_config.patch(enable_autograd_cache=False),
    ):
        ran = subject.compiled("memopt", options=dict(options))
    return ran, [seen for seen in watch.graphs if seen.forward is not None]


def recorded(
    subject: Subject, decompositions: dict[Any, Any] | None = None
) -> tuple[Ran, list[Seen]]:
    """The step without any pass, op by op: with what each graph is called."""
    return compiled(subject, {"lower": "eager", "passes": []}, {}, decompositions)


def inexact(passes: Sequence[Pass]) -> list[Pass]:
    """Those that may change numbers."""
    return [each for each in passes if each.exactness == "no"]


class Walked:
    """The candidates of a step's graphs, measured, and as rows.

    Args:
        graphs: of the step as it is run.
        recorded: of the same step, with what they are called with.
        passes: the step's.
        all_nodes: whether nodes that no inexact pass changed are candidates, too.
    """

    def __init__(
        self,
        graphs: Sequence[Seen],
        recorded: Sequence[Seen],
        passes: Sequence[Pass],
        all_nodes: bool = False,
    ) -> None:
        names = {spell(each) for each in inexact(passes)}
        self.rewrites = [{n: by for n, by in s.by.items() if by in names} for s in graphs]
        self.graphs = graphs
        self.found: list[tuple[int, Candidate]] = []
        self.walks: dict[int, Walk] = {}
        self.notes: list[str] = []
        known: dict[str, list[Seen]] = collections.defaultdict(list)
        for each in recorded:
            known[each.code].append(each)
        for place, seen in enumerate(graphs):
            if not known[seen.code]:
                self.notes.append(f"graph {place} was captured otherwise when run without passes")
                continue
            same = known[seen.code].pop(0) if len(known[seen.code]) > 1 else known[seen.code][0]
            walked = self.walks[place] = walk(seen, arguments_of(seen, same.arguments))
            found = candidates(walked, inexact=not all_nodes)
            self.found += [(place, one) for one in measure(walked, found)]

    def row(self, place: int, one: Candidate) -> NodeError:
        """A candidate as data."""
        trace(self.walks[place], one)
        added = one.culprit
        node = added.node
        cast = fed_by(node)
        moves = {move.value: move.by for move in self.graphs[place].moves}
        owners = {**self.rewrites[place], **moves}
        by = next((owners[name] for name in one.names if name in owners), "")
        grown = one.amplified
        return NodeError(
            node=node.name,
            op=op_name(node),
            source=_source(node, one),
            dtype=", ".join(str(d).removeprefix("torch.") for d in dtypes(node)),
            local=added.local,
            total=added.total,
            error=one.error,
            grad_error=one.grad_error,
            names=one.names,
            by=by,
            fed_by=_at(cast) if cast is not None else "",
            amplified=f"{one.factor:.2g}x at {_at(grown)}" if grown is not None else "",
            bytes=one.bytes,
            seconds=one.seconds,
            graph=place,
        )


def _at(node: fx.Node) -> str:
    where = source_line(node)
    return f"{node.name} ({where})" if where else node.name


def _source(node: fx.Node, one: Candidate) -> str:
    """The node's own source line, or that of what it stands for; else their module."""
    nodes = [node, *(old for old, _ in one.gaps)]
    modules = [module_names(each) for each in nodes]
    lines = [*map(source_line, nodes), *(f"module {names[-2]}" for names in modules if names[1:])]
    return next((line for line in lines if line), "")
