"""The best of all plans of a small step, without drafting those that cannot be it."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor, fx

from memcompile.analysis.timeline import Kind, Timeline
from memcompile.draft import Draft
from memcompile.plan import Plan


class Exhaustive:
    """Every set of kept candidates at once: an entry of a tensor is a plan.

    For a draft in which nothing fuses and only the candidates may run twice. Then each
    dropped candidate costs its own seconds and no others, and the peak of every backward
    follows from when a copy is made and when it is last read. Both leave few plans in the
    running. Those are drafted, and only what the draft says of them counts.
    """

    def __init__(self, draft: Draft, candidates: list[fx.Node]) -> None:
        self.draft, self.candidates = draft, candidates
        self.drafted: dict[int, tuple[int, float]] = {}
        number = len(candidates)
        bits = torch.arange(2**number)[:, None] >> torch.arange(number) & 1
        whole = draft.under(Plan(frozenset(candidates)))
        self.least = backward_peaks(draft, candidates, whole.backward, bits.bool())
        self.least += whole.backward.peak - self.least[0]
        alone = [self._try(1 << place)[1] - whole.seconds for place in range(number)]
        self.seconds = whole.seconds + bits.double() @ torch.tensor(alone, dtype=torch.float64)

    def _try(self, dropped: int) -> tuple[int, float]:
        """Peak and seconds of the plan that drops the candidates at the bits of ``dropped``."""
        if dropped not in self.drafted:
            kept = frozenset(v for n, v in enumerate(self.candidates) if not dropped >> n & 1)
            drafted = self.draft.under(Plan(kept))
            self.drafted[dropped] = drafted.peak, drafted.seconds
        return self.drafted[dropped]

    def floor(self) -> int:
        """The least peak of all plans."""
        least = self._try(0)[0]
        for plan in self.least.argsort().tolist():
            if self.least[plan] >= least:
                break
            least = min(least, self._try(plan)[0])
        return least

    def cheapest(self, budget: int) -> float:
        """The fewest seconds of all plans within ``budget``."""
        for plan in self.seconds.argsort().tolist():
            if self.least[plan] <= budget and self._try(plan)[0] <= budget:
                return self._try(plan)[1]
        raise AssertionError("no plan is within the budget")

    def budgets(self) -> list[int]:
        """Five, from the floor to the peak of keeping everything."""
        low, high = self.floor(), self._try(0)[0]
        return [low + (high - low) * place // 4 for place in range(5)]


def every_plan(draft: Draft, candidates: list[fx.Node]) -> list[tuple[int, float]]:
    """Peak and seconds of every set of kept candidates, each drafted."""
    found = []
    for size in range(len(candidates) + 1):
        for kept in itertools.combinations(candidates, size):
            drafted = draft.under(Plan(frozenset(kept)))
            found.append((drafted.peak, drafted.seconds))
    return found


def backward_peaks(
    draft: Draft, candidates: list[fx.Node], line: Timeline, dropped: Tensor
) -> Tensor:
    """The peak of each plan's backward, up to what is alive throughout.

    A copy is made just before the first op that needs it. So an op of the backward takes
    ``span`` moments: one for a copy of each candidate, in the order of the step, and its own.

    Args:
        line: the backward that keeps every candidate.
        dropped: a row for each plan, a column for each candidate.
    """
    plans, number = dropped.shape
    span = number + 1
    runs = [j for j, op in enumerate(line.ops) if op.kind != Kind.SOURCE]
    moment = {j: place * span + number for place, j in enumerate(runs)}
    end = len(runs) * span
    at = {op.node: j for j, op in enumerate(line.ops)}
    column = {value: n for n, value in enumerate(candidates)}
    inputs = {value: draft.info[value].inputs for value in candidates}
    read = [i for value in candidates for i in inputs[value] if draft.info[i].kind != Kind.SOURCE]
    needed: dict[fx.Node, Tensor] = {}  # the place among ``runs`` that each plan needs it at
    born: dict[fx.Node, Tensor] = {}
    dies: dict[fx.Node, Tensor] = {}
    for value in sorted({*candidates, *read}, key=draft.step.order.__getitem__, reverse=True):
        readers = [p for p, j in enumerate(runs) if at.get(value) in line.ops[j].inputs]
        first = torch.full((plans,), min(readers, default=len(runs)))
        last = torch.full((plans,), max(readers, default=-1) * span + number)
        for copy in [v for v in candidates if value in inputs[v]]:
            again = dropped[:, column[copy]]
            first = torch.where(again, first.minimum(needed[copy]), first)
            last = torch.where(again, last.maximum(born[copy]), last)
        needed[value], dies[value], born[value] = first, last, torch.zeros_like(first)
        if value in column:
            copied = first * span + column[value]
            born[value] = torch.where(dropped[:, column[value]], copied, 0)

    others = torch.zeros(end, dtype=torch.int64)  # alive at each moment, whatever the plan
    for j, op in enumerate(line.ops):
        if op.node not in born:
            others[moment.get(j, 0) : moment.get(line.last[j], end) + 1] += op.bytes

    def alive(when: Tensor) -> Tensor:
        return others[when] + sum(
            draft.info[v].bytes * ((born[v] <= when) & (when <= dies[v])) for v in born
        )

    own = [alive(torch.full((plans,), when)) for when in moment.values()]
    copies = [alive(torch.where(dropped[:, n], born[v], number)) for v, n in column.items()]
    return torch.stack([*own, *copies]).amax(0)
