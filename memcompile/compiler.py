"""One captured graph: from its joint form to the split that fits the budget.

The closed loop: Inductor's own split is lowered first; where it fits, it is used as it
is. Else the ladder is built, a rung is lowered, and the next one is chosen with the
error that the first one showed.
"""

from __future__ import annotations

import dataclasses
import operator
import time
from collections.abc import Callable

from torch import fx

from memcompile import _torch
from memcompile._torch.fusion import in_order, prompt_kernels
from memcompile._torch.symbols import sizes_from_inputs
from memcompile.analysis.cost import calibrate
from memcompile.analysis.ops import runs_twice
from memcompile.analysis.timeline import HELD
from memcompile.contract import Loop, Proposal
from memcompile.cuts import late_from
from memcompile.draft import Draft
from memcompile.errors import PassError
from memcompile.explain import Explained, explain, number_loops
from memcompile.joint import prepare, reads_stale, redraws
from memcompile.ladder import Ladder, fits_surely, merged
from memcompile.looping import unseeded, with_loops
from memcompile.lowering import Lowering
from memcompile.options import Options, total_budget
from memcompile.pipeline import Pipeline
from memcompile.plan import Drafted, Plan
from memcompile.planner import Planner
from memcompile.planning import planning
from memcompile.refusal import refuse
from memcompile.report import LoopRow
from memcompile.search import Search, Tried
from memcompile.split import Split, inductor_split, split
from memcompile.step import Step, must_recompute, must_save, source_line
from memcompile.symbolic import peak_expressions

#: Of the drafts that a step may cost, one in so many for each search for loops.
SHARE = 2


@dataclasses.dataclass
class Outcome:
    """What was decided for one graph, for the report."""

    split: Split
    explained: Explained


class Compiler:
    """Plans the steps of one captured graph."""

    def __init__(self, options: Options, pipeline: Pipeline, lowering: Lowering, held: int) -> None:
        self.options, self.pipeline, self.lowering = options, pipeline, lowering
        self.held = held
        self.notes: list[str] = []
        self.looped: dict[Step, tuple[LoopRow, ...]] = {}  #: the last step with loops, in forms
        self.pooled = True  #: whether Inductor may hold buffers for later ones of their size
        self.prompt = False  #: whether kernels are kept from waiting for others' calls
        self.ordered = False  #: whether Inductor keeps to the order it is given
        self.planner: Planner | None = None  #: of the last training step, to plan it anew

    @property
    def fused(self) -> bool:
        return self.options.lower == "inductor"

    # -- training steps ---------------------------------------------------------------

    @planning()
    def step(self, module: fx.GraphModule, num_outputs: int, static: tuple[int, ...]) -> Outcome:
        """Plan a joint graph and split it.

        Raises:
            BudgetError: no plan found fits the budget.
        """
        started = time.perf_counter()
        self.notes.clear()
        prepare(module)
        if self.options.limit.kind != "none":
            sizes_from_inputs(module.graph)
        step = Step(module, num_outputs, static)
        own, saved = inductor_split(step)
        recut = redraws(step.module) or reads_stale(step, own)
        proposals, loops = self._offers(step)
        planner = self.planner = self._planner(step, own, saved, proposals)
        ground = planner.ground_draft
        if recut:
            # Stock torch draws anew (pytorch #190758) or reads an input after the step has
            # written to it: Inductor's choice of what to save is cut by us instead.
            own = split(step, ground)
        first = Tried(step, ground, own, *self._lower(step, own, ground))
        budget = self._budget(step, first.peak)
        chosen, ladder = first if budget is None else first.within(budget), None
        if self._is_over(chosen, budget):
            plain = planner.build(floor=bool(loops) and budget is None)
            search = Search(step, plain, self._lower_planned, first, self.held)
            self._with_loops(planner, plain.floor.plan, loops, budget, search, self._looped)
            chosen, ladder = self._search(search, budget, plain), search.ladder
        after = chosen.drafted
        explained = explain(
            step=step,
            before=ground,
            after=after,
            after_step=chosen.step,
            loops=self.looped.get(chosen.step, ()),
            proposals=proposals,
            budget=budget,
            inductor=first.peak,
            lowered=chosen.peak,
            floor=ladder.floor.peak if ladder else None,
            split=chosen.split,
            ways=lambda value: planner.ways(value, ground if chosen.step is not step else after),
        )
        explained.planning_seconds = time.perf_counter() - started
        self._settle(step, chosen, budget)
        return Outcome(chosen.split, explained)

    def _offers(self, step: Step, again: bool = False) -> tuple[list[Proposal], list[Loop]]:
        """Moves of single values, and loops."""
        offers = self.pipeline.offers(step, again)
        proposals = [move for move in offers if isinstance(move, Proposal)]
        rates = calibrate(step.device)
        if not (rates.to_host and rates.from_host):
            able = [p for p in proposals if p.rebuild is None or p.rebuild.host is None]
            if len(able) < len(proposals):
                self._note("nothing is kept on the host: the link's rate is not known")
            proposals = able
        return proposals, [move for move in offers if isinstance(move, Loop)]

    def _planner(
        self, step: Step, own: Split, saved: list[str], proposals: list[Proposal]
    ) -> Planner:
        by_name = {node.name: node for node in step.nodes}
        forward = {node.name for node in own.forward.graph.nodes if node.op == "call_function"}
        assert own.backward is not None
        backward = {node.name for node in own.backward.graph.nodes if node.op == "call_function"}
        twice = {by_name[name] for name in forward & backward if name in by_name}
        roots = {step.roots[by_name[name]] for name in saved if name in by_name}
        kept = frozenset(r for r in roots if r.op == "call_function" and r in step.sides.early)
        offered = frozenset(p.value for p in proposals if p.rebuild is None)
        inductors = frozenset(n for n in twice if runs_twice(n) and not must_save(n))
        unclaimed = frozenset(
            n
            for n in step.early_values()
            if n.name in backward and n.name not in forward and runs_twice(n)
        )
        draft = self._draft(step, offered | inductors | unclaimed)
        bound = frozenset(n for n in step.nodes if must_recompute(n))
        return Planner(draft, Plan(kept), proposals, bound)

    def _with_loops(
        self,
        base: Planner,
        plan: Plan,
        loops: list[Loop],
        budget: int | None,
        search: Search,
        planner_of: Callable[[Planner], Planner],
    ) -> None:
        """Merge the rungs of the step with the loops that lower its peak into a search's ladder.

        Args:
            base: of the step, to look for loops from.
            plan: what they are to lower.
            loops: those offered.
            budget: in total bytes, if there is one.
            search: its ladder is that without any.
            planner_of: the planner of a step with loops, made of the one they were found with.
        """
        if not loops or self._fits(search, base, budget):
            return
        self._note(unseeded(loops))
        self.looped = {}
        room = None if budget is None else budget - base.draft.before - self.held

        def planned(found: Planner, like: Planner | None) -> Planner:
            planner = planner_of(found)
            planner.follow(found)
            if like is None:
                planner.build(floor=budget is None)
            else:
                planner.follow(like)
                planner.polish(floor=budget is None)
            return planner

        found = with_loops(base, plan, loops, self._anew, planned, self._loop_failed, room)
        for planner, rows in found:
            self.looped[planner.draft.step] = rows
            search.ladder = merged(search.ladder, planner.ladder)
            if self._fits(search, base, budget):
                break
        if budget is None and search.ladder is base.ladder:  # no loop helps: half was left
            base.polish()

    def _fits(self, search: Search, base: Planner, budget: int | None) -> bool:
        """Whether what has been found fits, surely or lowered: no more loops are looked for."""
        if budget is None:
            return False
        if fits_surely(search.ladder, base.draft.before, budget, self.held):
            return True
        try:
            return search.fits(budget)
        except Exception:  # met again, and said, when all is found
            if self.options.strict:
                raise
            return False

    def _loop_failed(self, loop: Loop, error: Exception) -> None:
        """A loop that cannot be made is left out, and said to be."""
        where = source_line(loop.value)
        what = f"{loop.by}: no loop over dimension {loop.dim} of node {loop.value.name}"
        note = f"{what}{f' ({where})' if where else ''}: {type(error).__name__}"
        if self.options.strict:
            raise PassError(f"{note}: {error}") from error
        self._note(note)

    def _note(self, note: str | None) -> None:
        if note is not None and note not in self.notes:
            self.notes.append(note)

    def _anew(
        self, module: fx.GraphModule, planner: Planner
    ) -> tuple[Planner, Callable[[], list[Loop]]]:
        """What drafts a step whose graph has got loops, and the loops offered on it.

        What was kept is named alike. Moves of single values are offered when it is planned.
        """
        number_loops(module)
        old = planner.draft.step
        step = old.anew(module)
        known, again = {n.name for n in old.nodes}, {n.name for n in planner.draft.again}
        values, kept = step.early_values(), {n.name for n in planner.ground.kept}
        able = {n for n in values if n.name in again}
        able |= {n for n in values if n.name not in known and runs_twice(n) and not must_save(n)}
        ground = Plan(frozenset(n for n in values if n.name in kept))
        draft = self._draft(step, frozenset(able), planner.draft)
        return Planner(draft, ground, ()), lambda: self._offers(step, again=True)[1]

    def _looped(self, found: Planner) -> Planner:
        """The planner of a step with loops, with the moves of single values offered on it."""
        step = found.draft.step
        proposals, _ = self._offers(step, again=True)
        offered = frozenset(p.value for p in proposals if p.rebuild is None)
        draft = self._draft(step, offered | found.draft.again, found.draft)
        bound = frozenset(n for n in step.nodes if must_recompute(n))
        planner = Planner(draft, found.ground, proposals, bound)
        planner.limit //= SHARE
        return planner

    def _draft(self, step: Step, again: frozenset[fx.Node], like: Draft | None = None) -> Draft:
        """The step's draft, where the values of ``again`` may run twice."""
        # With one output of an op, the op: a tuple itself can never be kept.
        parents = {n.args[0] for n in again if n.target is operator.getitem}
        again |= frozenset(p for p in parents if isinstance(p, fx.Node))
        again -= {n for n in again if step.reads_overwritten(n)}
        return Draft(step, calibrate(step.device), again, self.fused, like)

    def _lower_planned(self, step: Step, cut: Split, drafted: Drafted) -> tuple[int, int]:
        with prompt_kernels(HELD), in_order(cut.keeps_order(drafted)):
            return self._lower(step, cut, drafted)

    def _lower(self, step: Step, cut: Split, drafted: Drafted) -> tuple[int, int]:
        """Total bytes once lowered, buffers pooled and not; what earlier graphs hold included."""
        if not self.fused:
            return drafted.peak + self.held, drafted.peak + self.held
        before = step.input_bytes()
        if cut.backward is None:
            lowered = self.lowering.inference(cut.forward, before)
        else:
            lowered = self.lowering.step(cut.forward, cut.backward, step.num_outputs, before)
        return lowered.peak + self.held, lowered.unpooled + self.held

    def _budget(self, step: Step, inductor: int) -> int | None:
        return total_budget(self.options, step.input_bytes() + self.held, inductor)

    def _is_over(self, first: Tried, budget: int | None) -> bool:
        """Whether less is asked for than Inductor's own split takes."""
        return self.options.limit.kind == "min" if budget is None else first.peak > budget

    def _search(self, search: Search, budget: int | None, plain: Ladder) -> Tried:
        """The closed loop; where Inductor cannot lower a loop, once more without any."""
        try:
            chosen = search.lowest() if budget is None else search.fitting(budget)
        except Exception as error:
            if search.ladder is plain or self.options.strict:
                raise
            self.notes.append(f"loops left out: Inductor raised {type(error).__name__}")
            search.ladder = plain
            return self._search(search, budget, plain)
        if chosen is not None:
            return chosen
        assert budget is not None
        least = search.least
        self._guard_refusal(search.step, least, budget)
        raise refuse(
            self.options, least.step, least.drafted,
            budget=budget, floor=least.unpooled, held=self.held,
        )  # fmt: skip

    def _settle(self, step: Step, chosen: Tried, budget: int | None) -> None:
        """What the choice asks of the lowering, and of later lengths."""
        for expression in dict.fromkeys(
            e for n in chosen.step.nodes for e in n.meta.get("asked", ())
        ):
            _torch.guard_fits(expression)
        self.prompt |= chosen.prompt
        self.ordered |= chosen.split.keeps_order(chosen.drafted)
        if not chosen.pooled:
            self.pooled = False
            self.notes.append("buffers are freed at their last use instead of held for reuse")
        self._guard(step, chosen, budget)

    def _guard(self, step: Step, chosen: Tried, budget: int | None) -> None:
        """Make "the symbolic peak fits" a guard, so that lengths that fit share the plan."""
        if budget is None or not step.dynamic:
            return
        room = budget - self.held
        pairs = peak_expressions(step, chosen.drafted)
        most = max((value for _, value in pairs), default=0)
        for expression, _ in pairs:
            _torch.guard_fits(expression * (chosen.peak - self.held) <= room * most)

    def _guard_refusal(self, step: Step, least: Tried, budget: int) -> None:
        """Make "no plan fits" a guard: the refusal of one length is not another's."""
        if not step.dynamic:
            return
        room = budget - self.held
        expression, value = max(peak_expressions(step, least.drafted), key=lambda pair: pair[1])
        _torch.guard_fits(expression * (least.unpooled - self.held) > room * value)

    # -- graphs that are not split ------------------------------------------------------

    @planning()
    def whole(self, module: fx.GraphModule) -> tuple[fx.GraphModule, Explained]:
        """Plan a graph without a split: inference, a backward inside it, an optimizer.

        What is alive at the peak and read after it plays the part of what is saved.

        Raises:
            BudgetError: no plan found fits the budget.
        """
        started = time.perf_counter()
        self.notes.clear()
        if self.options.limit.kind != "none":
            sizes_from_inputs(module.graph)
        (results,) = next(iter(module.graph.find_nodes(op="output"))).args
        step = Step(module, len(results))
        drafted = Draft(step, calibrate(step.device), fused=self.fused).under(Plan(frozenset()))
        own = Split(module, None)
        first = Tried(step, drafted, own, *self._lower(step, own, drafted))
        budget = self._budget(step, first.peak)
        proposals: list[Proposal] = []
        chosen, floor = first if budget is None else first.within(budget), None
        if drafted.forward.ops and self._is_over(chosen, budget):
            late = Step(module, len(results), late_from=late_from(step, drafted))
            proposals, _ = self._offers(late)
            planner = self._whole_planner(late, proposals)
            plain = planner.build()
            loops = self._offers(step, again=True)[1]
            base = Planner(self._draft(step, frozenset()), Plan(frozenset()), [])
            first = dataclasses.replace(first, step=late, drafted=planner.ground_draft)
            search = Search(late, plain, self._lower_planned, first, self.held)
            self._with_loops(base, base.ground, loops, budget, search, self._whole_looped)
            chosen = self._search(search, budget, plain)
            step, floor = late, search.ladder.floor.peak
        explained = explain(
            step=step,
            before=first.drafted,
            after=chosen.drafted,
            after_step=chosen.step,
            loops=self.looped.get(chosen.step, ()),
            proposals=proposals,
            budget=budget,
            inductor=first.peak,
            lowered=chosen.peak,
            floor=floor,
            split=chosen.split,
        )
        explained.planning_seconds = time.perf_counter() - started
        self._settle(step, chosen, budget)
        return chosen.split.forward, explained

    def _whole_looped(self, found: Planner) -> Planner:
        """The planner of a graph without a split that has got loops."""
        inner = found.draft.step
        from_here = late_from(inner, found.drafted(Plan(frozenset())))
        late = Step(inner.module, inner.num_outputs, late_from=from_here)
        return self._whole_planner(late, self._offers(late, again=True)[0])

    def _whole_planner(self, step: Step, proposals: list[Proposal]) -> Planner:
        draft = self._draft(step, frozenset(p.value for p in proposals if p.rebuild is None))
        kept = frozenset(n for n in draft.needed_late if n.op == "call_function")
        return Planner(draft, Plan(kept), proposals)
