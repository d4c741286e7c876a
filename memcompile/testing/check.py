"""The check itself: one pass, every graph, every promise of the contract."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from memcompile import _torch
from memcompile.analysis.cost import FIXED
from memcompile.analysis.ops import runs_twice
from memcompile.contract import Context, Exactness, Loop, Pass, Proposal, Proposer, Rewrite
from memcompile.draft import Draft
from memcompile.errors import PassError
from memcompile.loop import Looped
from memcompile.pipeline import Pipeline
from memcompile.plan import Drafted, Plan
from memcompile.region import find
from memcompile.registry import spell
from memcompile.shared import fingerprint
from memcompile.split import inductor_split, split
from memcompile.step import Step, must_save, source_line
from memcompile.testing.numbers import Result, difference, epsilon, norms, relative, same
from memcompile.testing.running import (
    Captured,
    Float64,
    capture,
    interpret,
    run_joint,
    run_split,
)

#: A rewrite that says it is ``"rounding"`` may have this much of the error there was.
TOLERANCE = 1.5


@dataclasses.dataclass(frozen=True)
class Checked:
    """What :func:`check_pass` found; that it returned at all means the pass is sound."""

    by: str  #: the pass, as a pipeline spells it
    exactness: Exactness
    graphs: int  #: how many were captured
    changed: bool  #: whether a rewrite changed any of them
    moves: int  #: how many a proposer offered, each of them tried on its own
    before: int  #: predicted bytes: a rewrite's peak; what a proposer's step stores
    after: int  #: the same once rewritten, or with every move taken
    error: float  #: largest relative difference of an output or gradient; 0.0: bit-equal
    unsteady: int = 0  #: outputs and gradients left out: the step itself never repeats them


def check_pass(
    configured: Pass,
    function: Callable[..., Any],
    *inputs: Any,
    dynamic: bool | None = None,
    tolerance: float = TOLERANCE,
) -> Checked:
    """Hold ``configured`` to the contract on every step of ``function(*inputs)``.

    A rewrite must leave a valid graph, say truthfully whether it changed it, change nothing
    a second time if its class says ``idempotent = True``, and not raise the predicted peak.
    Every move of a proposer is taken on its own, then all at once; none may store more than
    it frees. Outputs, gradients and mutated inputs must be as exact as the pass says:
    ``"bits"`` equal; ``"rounding"``: their error against float64 at most ``tolerance`` times
    what it was; ``"no"``: reported, in :attr:`Checked.error`.

    Raises:
        PassError: naming the pass, the node, its source line, and what to do.
    """
    _check_class(configured)
    graphs = capture(function, *inputs, dynamic=dynamic)
    checks = [_Check(configured, graph, tolerance).run() for graph in graphs]
    return Checked(
        by=spell(configured),
        exactness=configured.exactness,
        graphs=len(graphs),
        changed=any(each.changed for each in checks),
        moves=sum(each.moves for each in checks),
        before=max(each.before for each in checks),
        after=max(each.after for each in checks),
        error=max(each.error for each in checks),
        unsteady=sum(each.unsteady for each in checks),
    )


# -- what a pass is, before it runs ---------------------------------------------------------


def _check_class(configured: Pass) -> None:
    cls = type(configured)
    if not isinstance(configured, (Rewrite, Proposer)):
        raise PassError(f"{configured!r} is no pass; derive it from Rewrite or Proposer")
    if not isinstance(getattr(cls, "name", None), str):
        raise PassError(f"{cls.__qualname__} has no name; write name: ClassVar[str] = ...")
    if not (dataclasses.is_dataclass(cls) and cls.__dataclass_params__.frozen):
        raise PassError(f"pass {cls.name} is not @dataclasses.dataclass(frozen=True)")
    if configured.exactness not in ("bits", "rounding", "no"):
        raise PassError(
            f"pass {spell(configured)} has exactness {configured.exactness!r}; "
            'say "bits", "rounding" or "no"'
        )


# -- one pass on one graph ------------------------------------------------------------------


class _Check:
    """One pass on one captured graph."""

    def __init__(self, configured: Pass, graph: Captured, tolerance: float) -> None:
        self.configured, self.graph, self.tolerance = configured, graph, tolerance
        self.by, self.exactness = spell(configured), configured.exactness
        devices = [v.device.type for v in graph.inputs or [] if isinstance(v, torch.Tensor)]
        device = next((kind for kind in devices if kind != "cpu"), "cpu")
        self.pipeline = Pipeline([configured], Context(strict=True, device=device))
        self.changed, self.moves, self.before, self.after = False, 0, 0, 0
        self.error, self.unsteady = 0.0, 0

    def run(self) -> _Check:
        if isinstance(self.configured, Rewrite):
            self.rewrite()
        else:
            self.propose()
        return self

    def fail(self, what: str, node: fx.Node | None = None) -> PassError:
        line = source_line(node) if node is not None else ""
        return PassError(f"pass {self.by}: {what}" + (f" [{line}]" if line else ""))

    def rewrite(self) -> None:
        graph = self.graph
        module = _torch.copy_graph(graph.module)
        self.changed = self.pipeline.rewrite(module)
        if getattr(self.configured, "idempotent", False):
            self._once(module)
        without, values = run_joint(graph, graph.module)
        self._steady(without, run_joint(graph, graph.module)[0])
        got, new_values = run_joint(graph, module)
        for node in module.graph.nodes:  # the first node of the same name that differs
            if node.name in values and not same(values[node.name], new_values[node.name]):
                break
        else:
            node = None
        since = f", from node {node.name} on" if node is not None else ""
        self._compare(f"the rewritten graph{since}", node, without, got)
        self.before, _ = _predicted(graph, graph.module)
        self.after, at = _predicted(graph, module)
        if self.after > self.before:
            raise self.fail(
                f"raises the predicted peak from {self.before} to {self.after} bytes, at node "
                f"{at.name}; leave the graph alone where nothing is gained",
                at,
            )

    def _once(self, module: fx.GraphModule) -> None:
        names = {node.name for node in module.graph.nodes}
        if self.pipeline.rewrite(module):
            new = next((n for n in module.graph.nodes if n.name not in names), None)
            made = f" (it made node {new.name})" if new is not None else ""
            raise self.fail(
                f"says idempotent = True and changed its own result again{made}; return False "
                "where there is nothing left to do, or do not claim it",
                new,
            )

    def propose(self) -> None:
        step = self.graph.step
        proposals = self._offered(step)
        self.moves = len(proposals)
        self._loops(step)
        if not step.tangents or not proposals:
            return
        again = frozenset(n for n in step.sides.early if runs_twice(n) and not must_save(n))
        draft, ground = Draft(step, FIXED, again, fused=False), _ground(step)
        base = draft.under(Plan(ground))
        cut = split(step, base)
        without = run_split(self.graph, cut)
        self._steady(without, run_split(self.graph, cut))
        self.before = _stored(step, base)
        values = run_joint(self.graph, step.module)[1]
        first: dict[fx.Node, Proposal] = {}
        for move in proposals:
            first.setdefault(move.value, move)
            label = f"move {move.how!r} of node {move.value.name}"
            if move.rebuild is not None:
                self._roundtrip(label, move, values)
            drafted = draft.under(_plan(ground, [move]))
            kept = draft.under(Plan(ground | {move.value}))
            more = _stored(step, drafted) - _stored(step, kept)
            if more > 0 and move.rebuild is not None and move.rebuild.encode is not None:
                raise self.fail(
                    f"{label} stores {more} bytes more than keeping the value does; offer it "
                    "only where the encoding is smaller",
                    move.value,
                )
            self._try(label, move.value, drafted, without)
        together = draft.under(_plan(ground, list(first.values())))
        self._try("all moves at once", None, together, without)
        self.after = _stored(step, together)

    def _loops(self, step: Step) -> None:
        """Each region that is offered, looped on its own: the same results."""
        loops = [move for move in self.pipeline.offers(step, again=True) if isinstance(move, Loop)]
        self.moves += len(loops)
        without: list[Result] = []
        tried: set[tuple[fx.Node, int]] = set()
        for loop in loops:
            found = (
                find(step, loop.value, loop.dim) if (loop.value, loop.dim) not in tried else None
            )
            tried.add((loop.value, loop.dim))
            if found is None or found.length < loop.chunks:
                continue
            label = f"a loop over dimension {loop.dim} of node {loop.value.name}"
            try:
                got = run_joint(self.graph, Looped(step, found, loop.chunks, FIXED).write())[0]
            except Exception as error:  # an op that does not stand a smaller shape
                raise self.fail(f"{label} cannot run: {error}", loop.value) from error
            if not without:
                without = run_joint(self.graph, step.module)[0]
                self._steady(without, run_joint(self.graph, step.module)[0])
            self._compare(label, loop.value, without, got)

    def _offered(self, step: Step) -> list[Proposal]:
        before = fingerprint(step.graph)
        proposals = self.pipeline.propose(step)
        if fingerprint(step.graph) != before:
            raise self.fail("changed the step; a proposer only reads it")
        offered = [(p.value, p.how) for p in proposals]
        if offered != [(p.value, p.how) for p in self.pipeline.propose(step)]:
            raise self.fail("offered other moves when asked twice; the same step, the same moves")
        for place, (value, how) in enumerate(offered):
            if (value, how) in offered[:place]:
                raise self.fail(
                    f"offers two moves named {how!r} for node {value.name}; name each one", value
                )
        for move in proposals:
            if move.rebuild is None and not runs_twice(move.value):
                raise self.fail(
                    f"offers to run node {move.value.name} ({move.value.target}) again, which "
                    "would draw or do something else; offer what analysis.ops.runs_twice allows",
                    move.value,
                )
        return proposals

    def _roundtrip(self, label: str, move: Proposal, values: Mapping[str, Any]) -> None:
        """What decode gives must be the value itself, to the bit where the pass says so."""
        how, value = move.rebuild, values[move.value.name]
        assert how is not None
        encoded = interpret(how.encode, [value])[0] if how.encode is not None else []
        reads = [values[read.name] for read in how.reads]
        try:
            got = interpret(how.decode, [*encoded, *reads])[0][0]
        except Exception as error:  # a stranger's code may raise anything
            raise self.fail(f"{label}: decode raised {error}", move.value) from error
        if self.exactness == "bits" and not same(value, got):
            raise self.fail(
                f"{label}: decode gives other bits than the value has: {difference(value, got)}; "
                'mend it, or say exactness "rounding" or "no"',
                move.value,
            )

    def _try(
        self, label: str, node: fx.Node | None, drafted: Drafted, without: list[Result]
    ) -> None:
        step = self.graph.step
        try:
            got = run_split(self.graph, split(step, drafted))
        except Exception as error:  # a stranger's graph may raise anything
            raise self.fail(f"{label} cannot run: {error}", node) from error
        self._compare(label, node, without, got)

    # -- numbers --------------------------------------------------------------------------

    def _steady(self, one: list[Result], two: list[Result]) -> None:
        self.skip = {a.label for a, b in zip(one, two, strict=True) if not same(a.value, b.value)}
        self.unsteady = len(self.skip)

    @functools.cached_property
    def exact(self) -> dict[str, Any]:
        """The step's results in float64, by label."""
        results, _ = run_joint(self.graph, self.graph.module, Float64)
        return {result.label: result.value for result in results}

    def _compare(
        self, label: str, node: fx.Node | None, without: list[Result], got: list[Result]
    ) -> None:
        pairs = [p for p in zip(without, got, strict=True) if p[0].label not in self.skip]
        scales = norms(without)
        for old, new in pairs:
            scale = scales[old.group]
            if same(old.value, new.value):
                continue
            differs = f"{label}: {old.label} differs, {difference(old.value, new.value)}"
            if self.exactness == "bits":
                raise self.fail(f'{differs}; mend it, or say exactness "rounding" or "no"', node)
            self.error = max(self.error, relative(new.value, old.value, scale))
            if self.exactness == "no":
                continue
            exact = self.exact[old.label]
            was, now = (relative(r.value, exact, scale) for r in (old, new))
            if now > max(self.tolerance * was, epsilon(old.value)):
                raise self.fail(
                    f"{differs}: its error against float64 is {now:.2g}, without the pass "
                    f'{was:.2g}; that is more than rounding: mend it, or say exactness "no"',
                    node,
                )


# -- bytes ----------------------------------------------------------------------------------


def _ground(step: Step) -> frozenset[fx.Node]:
    """The values that Inductor's own split keeps."""
    names = frozenset(inductor_split(step)[1]) if step.tangents else frozenset()
    roots = (step.roots[node] for node in step.nodes if node.name in names)
    return frozenset(root for root in roots if root.op == "call_function")


def _plan(ground: frozenset[fx.Node], moves: Sequence[Proposal]) -> Plan:
    """The ground with the values of some moves rebuilt."""
    rebuilt = {move.value: move for move in moves if move.rebuild is not None}
    return Plan(ground - {move.value for move in moves}, rebuilt)


def _stored(step: Step, drafted: Drafted) -> int:
    """Bytes a draft holds from forward to backward, inputs left out."""
    return sum(step.bytes(node) for node in (*drafted.saved, *drafted.stored))


def _predicted(graph: Captured, module: fx.GraphModule) -> tuple[int, fx.Node]:
    """The peak under Inductor's own split, and the node it is at."""
    step = Captured(_torch.copy_graph(module), graph.num_outputs, graph.static).step
    drafted = Draft(step, FIXED).under(Plan(_ground(step)))
    line = max((drafted.forward, drafted.backward), key=lambda line: line.peak)
    return line.peak, line.ops[line.at].node if line.ops else step.output
