"""Run passes in order, check what each did to the graph, and record it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import torch
from torch import fx

from memcompile import _torch
from memcompile.analysis.ops import runs_twice
from memcompile.contract import Context, Loop, Pass, Proposal, Proposer, Rewrite
from memcompile.errors import PassError
from memcompile.registry import source_key, spell
from memcompile.report import Ran
from memcompile.shared import fingerprint
from memcompile.step import Step, must_save


class Pipeline:
    """The user's passes, as configured."""

    def __init__(self, passes: Sequence[Pass], context: Context) -> None:
        self.passes, self.context = list(passes), context
        self.ran: list[Ran] = []

    def key(self) -> str:
        """Covers each pass's options and source."""
        return ";".join(source_key(each) for each in self.passes)

    def rewrite(
        self,
        module: fx.GraphModule,
        between: Callable[[Pass, fx.GraphModule], None] | None = None,
    ) -> bool:
        """Run every rewrite on ``module``. One that fails leaves the graph as it was.

        ``between`` is told of each that has changed it.

        Raises:
            PassError: under ``strict``, what otherwise becomes a note in the report.
        """
        changed = False
        for each in self.passes:
            if isinstance(each, Rewrite) and self._rewrite(each, module):
                changed = True
                if between is not None:
                    between(each, module)
        return changed

    def _rewrite(self, each: Rewrite, module: fx.GraphModule) -> bool:
        original = module.graph
        before = fingerprint(original)
        outputs = output_types(original)
        inputs = placeholder_names(original)
        module.graph = _torch.copy_graph(module).graph
        cause: Exception | None = None
        try:
            claimed = each.rewrite(module, self.context)
            module.graph.lint()
            module.recompile()
            changed = fingerprint(module.graph) != before
            problem = _broken(module.graph, inputs, outputs, claimed, changed)
        except Exception as error:  # a stranger's code may raise anything
            problem, changed, cause = _said(error), False, error
        if problem is None and changed:
            self._record(each, True)
            return True
        module.graph = original
        module.recompile()
        self._record(each, False, problem or "", cause)
        return False

    def propose(self, step: Step) -> list[Proposal]:
        """Every proposer's moves of single values, those of an inexact pass included."""
        return [move for move in self.offers(step) if isinstance(move, Proposal)]

    def offers(self, step: Step, again: bool = False) -> list[Proposal | Loop]:
        """Every proposer's moves on ``step``; recorded, unless they are asked for ``again``."""
        found: list[Proposal | Loop] = []
        context = self.context
        if again:  # what there is to say was said: modules may by now be inside of loops
            context = dataclasses.replace(context, strict=False, remarks=[])
        for each in self.passes:
            if not isinstance(each, Proposer):
                continue
            offered: list[Proposal | Loop] = []
            context.remarks.clear()
            by = spell(each)
            try:
                for proposal in each.propose(step, context):
                    _check(proposal, step)
                    _bar(proposal)
                    offered.append(dataclasses.replace(proposal, by=by))
            except Exception as error:  # a stranger's code may raise anything
                self._record(each, False, _said(error), error)
                continue
            found.extend(offered)
            if not again:
                notes = [f"offered {len(offered)} moves", *context.remarks]
                self._record(each, False, "; ".join(notes))
        return [*found, *self._upon(found, step, context, again)]

    def _upon(
        self, found: list[Proposal | Loop], step: Step, context: Context, again: bool
    ) -> list[Proposal]:
        """What passes make of each other's moves."""
        first = [move for move in found if isinstance(move, Proposal)]
        more: list[Proposal] = []
        for each in self.passes:
            if not isinstance(each, Proposer):
                continue
            context.remarks.clear()
            offered = []
            try:
                for proposal in each.upon(first, step, context):
                    _check(proposal, step)
                    offered.append(dataclasses.replace(proposal, by=proposal.by or spell(each)))
            except Exception as error:  # a stranger's code may raise anything
                self._record(each, False, _said(error), error)
                continue
            more += offered
            if (offered or context.remarks) and not again:
                notes = [f"offered {len(offered)} moves upon others'", *context.remarks]
                self._record(each, False, "; ".join(notes))
        return more

    def _record(
        self, each: Pass, changed: bool, note: str = "", cause: Exception | None = None
    ) -> None:
        self.ran.append(Ran(spell(each), each.exactness, changed, note))
        failed = note and not note.startswith("offered")
        if failed and self.context.strict:
            raise PassError(f"pass {spell(each)} {note}") from cause


def _said(error: Exception) -> str:
    """The error's first line: a failed lint quotes the whole graph."""
    first = next(iter(str(error).splitlines()), "")
    return f"raised {type(error).__name__}: {first}"


def _check(proposal: Proposal | Loop, step: Step) -> None:
    """Refuse a move that would compute something else."""
    value = proposal.value
    if isinstance(proposal, Loop):
        shape = value.meta["val"].shape if isinstance(value.meta.get("val"), torch.Tensor) else ()
        if proposal.chunks < 2 or not 0 <= proposal.dim < len(shape):
            raise PassError(
                f"offers a loop of {proposal.chunks} chunks over dimension {proposal.dim} of node "
                f"{value.name}, of shape {list(shape)}; offer 2 or more over one of its own"
            )
        return
    owns = value.op == "call_function" and step.roots[value] is value
    if value not in step.sides.early or not owns:
        raise PassError(
            f"proposes node {value.name}, which is not an early value that owns its memory; "
            "offer nodes of step.early_values()"
        )
    if must_save(value):
        raise PassError(f"proposes node {value.name}, which the user has bound to be saved")
    if proposal.rebuild is None and not runs_twice(value):
        raise PassError(
            f"offers to run node {value.name} again, which draws new random numbers, has an "
            "effect, or is an op nothing is known of; offer values that memcompile.runs_twice"
        )


def _bar(proposal: Proposal | Loop) -> None:
    """Mark the nodes that loops are to leave alone."""
    if isinstance(proposal, Loop):
        for node in proposal.without:
            node.meta["no_loop"] = True


def placeholder_names(graph: fx.Graph) -> list[str]:
    """The graph's inputs, in order."""
    return [str(node.target) for node in graph.find_nodes(op="placeholder")]


def output_types(graph: fx.Graph) -> list[object]:
    """Dtype and shape of each output, ``None`` for what is no tensor."""
    (output,) = graph.find_nodes(op="output")
    leaves = _torch.tree_leaves(output.args)
    types: list[object] = []
    for leaf in leaves:
        value = leaf.meta.get("val") if isinstance(leaf, fx.Node) else None
        if isinstance(value, torch.Tensor):
            types.append((value.dtype, tuple(map(str, value.shape))))
        else:
            types.append(None)
    return types


def _broken(
    graph: fx.Graph, inputs: list[str], outputs: list[object], claimed: bool, changed: bool
) -> str | None:
    """What a rewrite did wrong, or ``None``."""
    if claimed is not True and claimed is not False:
        return f"returned {claimed!r}; a rewrite returns True when it changed the graph, else False"
    if changed and not claimed:
        return "changed the graph and returned False; return True when anything changed"
    if claimed and not changed:
        return "returned True and changed nothing; return False when nothing changed"
    for node in graph.nodes:
        if node.op == "call_function" and "val" not in node.meta and node.users:
            return f"left node {node.name} without meta['val']; give each new node its fake value"
    if placeholder_names(graph) != inputs:
        return "changed the graph's inputs or their order; leave the placeholders as they are"
    if output_types(graph) != outputs:
        return "changed the number, dtype or shape of the graph's outputs"
    return None
