"""All sides of one subject: compiled, measured, compared, timed."""

from __future__ import annotations

import dataclasses
import functools
import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import sides
import torch
from records import Duel, Found, Kind, Numbers, Row
from sides import Side
from subjects import Subject, checkpointed
from torch import Tensor
from verdicts import CHECKPOINTED, SAME_MASKS, TIME_AT_SHARE, share_label

import memcompile
from memcompile import BudgetError, Report


@dataclasses.dataclass(frozen=True)
class Plan:
    """What to measure, and how often."""

    budgets: int = 8  #: evenly from Inductor's peak down to the compiled checkpointing's
    pairs: int = 20  #: alternated pairs of each time ratio; 0 leaves times out
    activation_budgets: tuple[float, ...] = (0.5, 0.3, 0.1)
    every_time: bool = True  #: time every side, not only what a limit is held against
    float64: bool = True  #: gradients against float64, where the loss takes no seed


#: Told what is being done and how far it is, from 0 to 1.
Progress = Callable[[str, float], None]


def measure(subject: Subject, scale: str, plan: Plan, progress: Progress) -> Found:
    """Everything ``plan`` asks of one subject."""
    with sides.planned_anew(), released():
        return Measuring(subject, scale, plan, progress).run()


@contextmanager
def released() -> Iterator[None]:
    """What was compiled inside is dropped at the end."""
    try:
        yield
    finally:
        torch._dynamo.reset()
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


class Measuring:
    """The sides of one subject, by the label of their row."""

    def __init__(self, subject: Subject, scale: str, plan: Plan, progress: Progress) -> None:
        self.subject, self.plan, self.progress = subject, plan, progress
        self.sides: dict[str, Side] = {}
        self.found = Found(subject.name, scale, random=False)
        self.truth: tuple[Tensor, list[Tensor]] | None = None
        shares = len(TIME_AT_SHARE.get(subject.name, {}))
        activation = len(plan.activation_budgets)
        self.to_build = 7 + shares + 2 * activation + plan.budgets
        self.built = 0

    def run(self) -> Found:
        self._peers()
        self._ours()
        if self.plan.pairs:
            self._times()
        return self.found

    # -- building and measuring sides ---------------------------------------------------

    def _tell(self, doing: str) -> None:
        self.progress(f"{self.subject.name}: {doing}", 0.7 * min(1, self.built / self.to_build))

    def _add(self, row: Row, build: Callable[[], Side]) -> Row:
        """Build a side, measure its peak and compare its numbers; errors go into the row."""
        self._tell(row.label)
        self.built += 1
        self.found.rows.append(row)
        try:
            side = build()
            peak = side.peak()
            row.peak, row.reserved = peak.bytes, peak.reserved
            if row.kind != "eager" and "Inductor" in self.sides:
                row.numbers = sides.compare(side, self.sides["Inductor"], self.truth)
        except BudgetError as error:
            row.refused, row.floor = True, error.floor - self.found.before
            row.note = f"BudgetError: floor {row.floor / 1e6:.2f}"
        except Exception as error:  # the other sides are still worth measuring
            row.failed, row.note = True, f"{type(error).__name__}: {str(error)[:80]}"
        else:
            self.sides[row.label] = side
        return row

    def _peers(self) -> None:
        subject, split = self.subject, checkpointed(self.subject)
        self._add(Row("eager", "eager"), lambda: sides.eager(subject, "eager"))
        label = "checkpointed, eager"
        self._add(Row(label, "eager"), lambda: sides.eager(split, label))
        self._inductor()
        self._add(Row(CHECKPOINTED, "peer"), lambda: sides.compiled(split, CHECKPOINTED))
        for budget in self.plan.activation_budgets:
            label = f"activation_memory_budget {budget:g}"
            build = functools.partial(
                sides.compiled, subject, label, activation_memory_budget=budget
            )
            row = self._add(Row(label, "peer"), build)
            if row.numbers is not None and gradients_wrong(row.numbers):
                del self.sides[label]
                off = row.numbers.difference
                row.note = f"WRONG gradients, off by {off:.0%} (pytorch #190758): no peer here"

    def _inductor(self) -> None:
        """Plain Inductor, which the others are compared with; and the exact gradients."""
        subject = self.subject
        row = self._add(Row("Inductor", "inductor"), lambda: sides.compiled(subject, "Inductor"))
        if row.failed:
            raise RuntimeError(f"{subject.name}: Inductor itself failed: {row.note}")
        self.found.random = sides.is_random(self.sides["Inductor"])
        if self.plan.float64 and not self.found.random:
            self.truth = sides.float64(subject)

    def _ours(self) -> None:
        found = self.found
        self._memopt("memopt, no budget", "free", None)
        if found.of_kind("free")[0].failed:
            raise RuntimeError(f"{found.subject}: memopt failed: {found.of_kind('free')[0].note}")
        self._memopt("memopt, least peak", "min", "min")
        inductor, least = found.inductor.peak, found.row(CHECKPOINTED).peak
        assert inductor is not None
        for share in TIME_AT_SHARE.get(found.subject, {}):
            self._memopt(share_label(share), "share", inductor * share // 100)
        if least is not None:
            for number, budget in enumerate(evenly(inductor, least, self.plan.budgets), 1):
                label = f"memopt, budget {number} of {self.plan.budgets}"
                self._memopt(label, "budget", budget)
        for peer in found.of_kind("peer"):
            if peer.peak is None or peer.label not in self.sides:
                continue
            rows = found.of_kind("budget", "share", "level")
            same = next((row for row in rows if row.budget == peer.peak), None)
            if same is None:
                same = self._memopt(f"memopt at the peak of {peer.label}", "level", peer.peak)
            found.duels.append(Duel(peer.label, same.label, None))

    def _memopt(self, label: str, kind: Kind, budget: int | str | None, passes: str = "") -> Row:
        """One of ours; a ``budget`` in bytes is a step peak."""
        name = f"{self.subject.name} {self.found.scale}: {label}"
        options: dict[str, int | str] = {"name": name}
        row = Row(label, kind, passes=passes)
        if passes:
            options["passes"] = passes
        if isinstance(budget, int):
            row.budget = budget
            options["budget"] = self.found.before + budget
        elif budget is not None:
            options["budget"] = budget
        seen = len(memcompile.reports())
        self._add(row, lambda: sides.compiled(self.subject, label, "memopt", options))
        report = next((r for r in memcompile.reports()[seen:] if r.name == name), None)
        if report is not None:
            self.found.before = report.before
            read(report, row)
        return row

    # -- times ----------------------------------------------------------------------------

    def _times(self) -> None:
        """Every side against Inductor, ours against the peers, and Inductor against itself."""
        self._tell("Inductor again")
        again = sides.compiled(self.subject, "Inductor again")
        inductor = self.sides["Inductor"]
        rows = [row for row in self.found.rows if row.label in self.sides]
        judged = ("free", "share")
        rows = [
            r for r in rows if r.kind != "inductor" and (self.plan.every_time or r.kind in judged)
        ]
        duels = [duel for duel in self.found.duels if duel.ours in self.sides]
        pairs = [(inductor, again)]
        pairs += [(self.sides[row.label], inductor) for row in rows]
        pairs += [(self.sides[duel.ours], self.sides[duel.peer]) for duel in duels]

        rounds = 0

        def after_round() -> None:
            nonlocal rounds
            rounds += 1
            share = 0.7 + 0.3 * rounds / self.plan.pairs
            self.progress(f"{self.subject.name}: round {rounds} of {self.plan.pairs}", share)

        ratios = iter(sides.time_pairs(pairs, self.plan.pairs, after_round))
        self.found.noise = self.found.inductor.time = next(ratios)
        for row in rows:
            row.time = next(ratios)
        for duel in duels:
            duel.time = next(ratios)


def read(report: Report, row: Row) -> None:
    """Copy what the benchmark shows of a report. Peaks become step peaks."""
    row.predicted = report.predicted - report.before
    row.lowered = None if report.lowered is None else report.lowered - report.before
    row.added, row.moves = report.seconds, len(report.moves)
    row.planning, row.schedulings = report.planning_seconds, report.schedulings
    row.loops = len(report.loops)


def evenly(highest: int, least: int, count: int) -> list[int]:
    """``count`` budgets from ``highest`` down to ``least``, both included."""
    if count == 1:
        return [least]
    return [highest - round(i * (highest - least) / (count - 1)) for i in range(count)]


def gradients_wrong(numbers: Numbers) -> bool:
    """The forward drew Inductor's masks, so the gradients should agree, and they do not."""
    return numbers.loss_difference < SAME_MASKS / 10 and numbers.difference > SAME_MASKS
