"""The ladder: monotone, deterministic, and near the best that exhaustive search finds."""

import dataclasses
import random
import statistics

import pytest
import torch
from exhaustive import Exhaustive, every_plan
from helpers import planned, stack, tensor
from hypothesis import given, strategies as st
from torch import fx
from torch.fx.experimental.proxy_tensor import make_fx

from memcompile import Proposal, Step, rebuild
from memcompile.analysis.cost import FIXED
from memcompile.draft import Draft
from memcompile.plan import Plan
from memcompile.planner import Ladder, Planner, Rung

# ---------------------------------------------------------------- small random steps


def random_step(seed: int) -> Step:
    """A joint graph traced from a random chain of products, maps and skips of odd widths."""
    draw = random.Random(seed)
    widths = [draw.choice((16, 64, 256, 512)) for _ in range(draw.randint(4, 8))]
    rows = draw.choice((128, 512))
    maps = [torch.exp, torch.tanh, torch.sin, torch.sigmoid, lambda v: v * v]
    chosen = [draw.sample(maps, draw.randint(1, 2)) for _ in widths]
    skips = {n: draw.randrange(n) for n in range(1, len(widths)) if draw.random() < 0.4}

    def forward(x: torch.Tensor, *weights: torch.Tensor) -> torch.Tensor:
        values = []
        for place, weight in enumerate(weights):
            x = x @ weight
            for each in chosen[place]:
                x = each(x)
            if place in skips:
                other = values[skips[place]]
                x = x + other.sum(1, keepdim=True) * x
            values.append(x)
        return x.sum(1)

    def joint(primals: list[torch.Tensor], tangents: list[torch.Tensor]) -> list[torch.Tensor]:
        out = forward(*primals)
        return [out, *torch.autograd.grad([out], primals, tangents)]

    shapes = [(rows, 32), *zip([32, *widths], widths, strict=False)]
    primals = [torch.zeros(shape, requires_grad=True) for shape in shapes]
    module = make_fx(joint, tracing_mode="fake")(primals, [torch.zeros(rows)])
    module.graph.eliminate_dead_code()
    for node in module.graph.find_nodes(op="placeholder"):
        node.target = str(node.target)
    return Step(module, 1)


@dataclasses.dataclass
class Problem:
    """A step, and the values the planner may drop."""

    step: Step
    again: frozenset[fx.Node]
    candidates: list[fx.Node]

    def draft(self) -> Draft:
        return Draft(self.step, FIXED, self.again, fused=False)

    def planner(self) -> Planner:
        draft = self.draft()
        kept = frozenset(n for n in draft.needed_late if n.op == "call_function")
        proposals = [Proposal(value) for value in self.candidates]
        return Planner(draft, Plan(kept), proposals)


def problem(seed: int, most: int = 9) -> Problem:
    """At most ``most`` candidates; the rest of what a backward reads is always kept."""
    step = random_step(seed)
    values = Draft(step, FIXED, fused=False).needed_late
    free = [v for v in step.early_values() if v in values]
    chosen = random.Random(seed).sample(free, min(most, len(free)))
    return Problem(step, frozenset(chosen), sorted(chosen, key=step.order.__getitem__))


# ---------------------------------------------------------------- near the best plan


def costs_beside_the_best(given: Problem) -> list[float]:
    """Seconds over the best possible, at five budgets from the optimal floor to keep-all."""
    best, ladder = Exhaustive(given.draft(), given.candidates), given.planner().build()
    ratios = []
    for budget in best.budgets():
        rung = ladder.fit(budget)
        assert rung is not None, f"a plan exists at {budget} and none was found"
        assert rung.peak <= budget
        ratios.append(rung.seconds / best.cheapest(budget))
    return ratios


@pytest.mark.parametrize("seed", range(8))
def test_the_quick_search_for_the_best_plan_misses_none(seed: int) -> None:
    """What it finds is what drafting every plan finds, with fewer drafts."""
    given = problem(seed, most=8)
    plans = every_plan(given.draft(), given.candidates)
    quick = Exhaustive(given.draft(), given.candidates)
    assert quick.floor() == min(peak for peak, _ in plans)
    for budget in quick.budgets():
        best = min(seconds for peak, seconds in plans if peak <= budget)
        assert quick.cheapest(budget) == pytest.approx(best, rel=1e-12)
    assert len(quick.drafted) < len(plans)


@pytest.mark.slow
def test_against_the_best_of_all_plans() -> None:
    """Fifty graphs of 6 to 14 candidates, most of them of 13 or 14, at five budgets each."""
    problems = [problem(seed, most=14) for seed in range(50)]
    sizes = [len(given.candidates) for given in problems]
    assert min(sizes) == 6 and sum(size >= 13 for size in sizes) >= 25
    ratios = [ratio for given in problems for ratio in costs_beside_the_best(given)]
    assert len(ratios) == 250
    assert statistics.mean(ratios) <= 1.05
    assert max(ratios) <= 1.15
    assert min(ratios) >= 1 - 1e-9, "nothing beats the best of all plans"


def test_moves_that_pay_only_together_are_found() -> None:
    """Two readers of one cheap value: keeping it instead of both pays, instead of one does not."""
    assert costs_beside_the_best(problem(210, most=14))


# ---------------------------------------------------------------- the ladder


rungs = st.lists(st.tuples(st.integers(0, 8), st.integers(0, 8)), max_size=30)


@given(rungs)
def test_a_ladder_keeps_exactly_the_plans_no_other_beats(pairs: list[tuple[int, int]]) -> None:
    ladder = Ladder()
    for peak, seconds in pairs:
        ladder.offer(Rung(peak, float(seconds), Plan(frozenset())))
    beaten_by_none = {
        (p, s)
        for p, s in pairs
        if not any((q, t) != (p, s) and q <= p and t <= s for q, t in pairs)
    }
    assert [(rung.peak, rung.seconds) for rung in ladder.rungs] == sorted(beaten_by_none)


@given(rungs, st.integers(0, 8))
def test_the_rung_for_a_budget_is_the_cheapest_that_fits(pairs, budget: int) -> None:
    ladder = Ladder()
    for peak, seconds in pairs:
        ladder.offer(Rung(peak, float(seconds), Plan(frozenset())))
    fitting = [seconds for peak, seconds in pairs if peak <= budget]
    rung = ladder.fit(budget)
    assert (rung.seconds if rung else None) == min(fitting, default=None)


def test_a_rung_costs_what_its_plan_costs_when_drafted_again() -> None:
    given = problem(3)
    draft = given.draft()
    for rung in given.planner().build().rungs:
        again = draft.under(rung.plan)
        assert (again.peak, again.seconds) == (rung.peak, rung.seconds)


def test_one_step_has_one_ladder() -> None:
    def names(seed: int) -> list[tuple[int, float, list[str]]]:
        ladder = problem(seed).planner().build()
        return [(r.peak, r.seconds, sorted(v.name for v in r.plan.kept)) for r in ladder.rungs]

    for seed in range(5):
        assert names(seed) == names(seed)


def test_planning_stops_at_a_number_of_drafts_not_at_a_time() -> None:
    planner = problem(2).planner()
    planner.limit = 20
    planner.build()
    assert planner.drafts <= 20
    assert planner.ladder.fit(planner.ground_draft.peak) is not None


def test_where_the_lowest_rung_is_all_that_is_asked_for_half_the_drafts_do() -> None:
    for seed in range(8):
        whole, lowest = problem(seed, 40).planner(), problem(seed, 40).planner()
        whole.limit = lowest.limit = 120
        whole.build()
        lowest.build(floor=True)
        assert lowest.drafts <= 60
        assert lowest.ladder.floor.peak <= 1.02 * whole.ladder.floor.peak
        left = lowest.drafts
        lowest.polish()  # what was left may be asked for later
        assert left <= lowest.drafts <= 120
        assert lowest.limit == 120


def test_every_smaller_budget_has_a_smaller_peak_and_no_less_time() -> None:
    for seed in range(5):
        planner = problem(seed).planner()
        ladder = planner.build()
        high, low = planner.ground_draft.peak, ladder.floor.peak
        chosen = [ladder.fit(low + (high - low) * place // 19) for place in range(20)]
        peaks, seconds = [r.peak for r in chosen], [r.seconds for r in chosen]
        assert peaks == sorted(peaks)
        assert seconds == sorted(seconds, reverse=True)


@pytest.mark.slow
def test_twenty_budgets_of_a_compiled_step_are_monotone() -> None:
    model, x = stack(2), [tensor(32, 8)]
    _, (least,) = planned(model, x, "min")
    reports = []
    for place in range(20):
        budget = least.lowered + (least.inductor - least.lowered) * place // 19
        _, (report,) = planned(model, x, budget)
        assert report.predicted <= budget
        reports.append(report)
    peaks, seconds = [r.predicted for r in reports], [r.seconds for r in reports]
    assert peaks == sorted(peaks)
    assert seconds == sorted(seconds, reverse=True)


# ---------------------------------------------------------------- other passes' moves


def test_the_planner_works_with_a_strangers_proposals_only() -> None:
    """It knows no pass by name: storing half the bytes is a move like any other."""
    given = problem(1)
    draft = Draft(given.step, FIXED, frozenset(), fused=False)
    kept = frozenset(n for n in draft.needed_late if n.op == "call_function")
    proposals = [
        Proposal(
            value,
            "halved",
            rebuild(value, lambda x: x.to(torch.float32), lambda x: x.to(torch.bfloat16)),
            by="stranger",
        )
        for value in given.candidates
    ]
    planner = Planner(draft, Plan(kept), proposals)
    ladder = planner.build()
    assert ladder.floor.peak < planner.ground_draft.peak
    assert {p.by for p in ladder.floor.plan.rebuilt.values()} == {"stranger"}


def test_values_bound_to_be_recomputed_are_never_kept() -> None:
    given = problem(4)
    draft = given.draft()
    bound = frozenset(given.candidates[::2])
    proposals = [Proposal(value) for value in given.candidates]
    kept = frozenset(n for n in draft.needed_late if n.op == "call_function") - bound
    for rung in Planner(draft, Plan(kept), proposals, bound).build().rungs:
        assert not rung.plan.kept & bound


def test_a_step_with_nothing_to_drop_has_one_rung() -> None:
    given = problem(5)
    draft = Draft(given.step, FIXED, frozenset(), fused=False)
    kept = frozenset(n for n in draft.needed_late if n.op == "call_function")
    assert len(Planner(draft, Plan(kept), []).build().rungs) == 1
