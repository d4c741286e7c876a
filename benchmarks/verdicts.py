"""What was found, held against the project's limits."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import Literal

from records import Found, Ratio, Row

Status = Literal["met", "within noise", "missed", "not measured"]

#: Step time over Inductor's at a share of its step peak, by subject.
TIME_AT_SHARE: dict[str, dict[int, float]] = {
    "llama": {60: 1.05, 30: 1.20},
    "bert": {60: 1.05, 30: 1.20},
}
FEASIBLE = 6 / 8  #: of the budgets between Inductor's peak and the checkpointing's
LOWERED = 0.02
GRADIENTS = 1.5  #: error over Inductor's own
SAME_MASKS = 1e-3  #: gradients of another mask are tens of percent away
SCHEDULINGS = 3
TOO_NOISY = 0.10  #: equal sides this far apart say nothing about limits on time
CHECKPOINTED = "checkpointed, Inductor"


@dataclasses.dataclass(frozen=True)
class Verdict:
    """One limit, and how it was met or missed."""

    subject: str
    limit: str
    status: Status
    figure: str


def judge(found: Found) -> list[Verdict]:
    """All limits of one subject."""
    verdicts = [
        within_budget(found),
        lowered_right(found),
        _feasible(found),
        _floor(found),
        *_unplanned(found),
        *_shares(found),
        *_duels(found),
        *numbers_right(found),
        _monotone(found),
        _schedulings(found),
    ]
    return [dataclasses.replace(verdict, subject=found.subject) for verdict in verdicts]


def decide(limit: str, good: bool | None, figure: str) -> Verdict:
    """Met or missed; ``good=None`` is not measured."""
    status: Status = "not measured" if good is None else "met" if good else "missed"
    return Verdict("", limit, status, figure)


def decide_time(limit: str, ratio: Ratio | None, bound: float, noise: float) -> Verdict:
    """A limit on time is missed only beyond the noise of equal sides."""
    if ratio is None:
        return decide(limit, None, "–")
    if noise > TOO_NOISY:
        return decide(limit, None, f"{ratio}, noise ±{noise:.3f}: too much to tell")
    status: Status = "met"
    if ratio.median > bound:
        status = "within noise" if ratio.median <= bound + noise else "missed"
    return Verdict("", limit, status, f"{ratio}, noise ±{noise:.3f}")


def _ran(found: Found) -> list[Row]:
    """Rows of ours with a budget in bytes that was met."""
    rows = found.of_kind("budget", "share", "level")
    return [row for row in rows if row.budget is not None and row.peak is not None]


def _mb(count: int | None) -> str:
    return "–" if count is None else f"{count / 1e6:.2f} MB"


def within_budget(found: Found) -> Verdict:
    """No step of ours measured above its budget."""
    rows = _ran(found)
    limit = "measured ≤ budget"
    if not rows:
        return decide(limit, None, "no budget was met")
    worst = max(rows, key=lambda row: row.peak / row.budget)  # type: ignore[operator]
    over = [row for row in rows if row.peak > row.budget]  # type: ignore[operator]
    text = f"{len(over)} of {len(rows)} over; worst {_mb(worst.peak)} of {_mb(worst.budget)}"
    return decide(limit, not over, text)


def lowered_right(found: Found) -> Verdict:
    """Lowered peaks of ours beside measured ones."""
    limit = f"|lowered/measured − 1| ≤ {LOWERED:.0%}"
    rows = found.of_kind("free", "min", "budget", "share", "level")
    errors = [row.lowered_error for row in rows if row.lowered_error is not None]
    if not errors:
        return decide(limit, None, "–")
    worst = max(errors, key=abs)
    return decide(limit, abs(worst) <= LOWERED, f"worst {worst:+.2%} of {len(errors)}")


def _feasible(found: Found) -> Verdict:
    rows = found.of_kind("budget")
    needed = max(1, math.floor(FEASIBLE * len(rows)))
    met = sum(row.peak is not None for row in rows)
    failed = [row for row in found.rows if row.failed]
    text = f"{met} of {len(rows)}"
    if failed:
        text += f"; other errors: {', '.join(row.label for row in failed)}"
    limit = f"≥ {needed} of {len(rows)} budgets feasible, the rest BudgetError"
    return decide(limit, met >= needed and not failed, text)


def _floor(found: Found) -> Verdict:
    ours, theirs = found.of_kind("min")[0].peak, found.row(CHECKPOINTED).peak
    good = None if ours is None or theirs is None else ours <= theirs
    return decide("floor ≤ compiled checkpointing", good, f"{_mb(ours)}, {_mb(theirs)}")


def _unplanned(found: Found) -> list[Verdict]:
    (free,), theirs = found.of_kind("free"), found.inductor.peak
    good = None if free.peak is None or theirs is None else free.peak <= theirs
    return [
        decide("no budget: peak ≤ Inductor's", good, f"{_mb(free.peak)}, {_mb(theirs)}"),
        decide_time("no budget: time ≤ 1.0x", free.time, 1.0, found.noise_margin),
    ]


def _shares(found: Found) -> list[Verdict]:
    verdicts = []
    for share, bound in TIME_AT_SHARE.get(found.subject, {}).items():
        limit = f"time ≤ {bound:.2f}x at {share} % of Inductor's step peak"
        row = next((r for r in found.of_kind("share") if r.label == share_label(share)), None)
        if row is not None and row.peak is None:
            verdicts.append(decide(limit, False, row.note))
        else:
            verdicts.append(
                decide_time(limit, row.time if row else None, bound, found.noise_margin)
            )
    return verdicts


def share_label(share: int) -> str:
    return f"memopt at {share} %"


def _duels(found: Found) -> list[Verdict]:
    verdicts = []
    for duel in found.duels:
        limit = f"time ≤ that of {duel.peer}, at its peak"
        ours = found.row(duel.ours)
        if ours.peak is None:
            verdicts.append(decide(limit, False, ours.note))
        else:
            verdicts.append(decide_time(limit, duel.time, 1.0, found.noise_margin))
    return verdicts


def numbers_right(found: Found) -> list[Verdict]:
    """Gradients of ours, against float64 or, with random ops, beside Inductor's."""
    ours = found.of_kind("free", "min", "budget", "share", "level")
    rows = [row for row in ours if row.numbers is not None]
    if not rows:
        return []
    numbers = {row.label: row.numbers for row in rows if row.numbers is not None}
    if found.random:
        far = max(numbers, key=lambda label: numbers[label].difference)
        equal = sum(n.loss_equal for n in numbers.values())
        same = numbers[far].difference <= SAME_MASKS
        text = f"gradients differ by at most {numbers[far].difference:.1e} ({far})"
        return [
            decide("same seed: the masks of Inductor", same, text),
            decide(
                "same seed: the loss of Inductor, bit for bit",
                equal == len(numbers),
                f"{equal} of {len(numbers)}",
            ),
        ]
    judged = {label: n for label, n in numbers.items() if n.error is not None}
    if not judged:
        return []
    norm = max(judged, key=lambda label: judged[label].error or 0)
    each = max(judged, key=lambda label: judged[label].worst or 0)
    whole, worst = judged[norm].error or 0, judged[each].worst or 0
    limit = f"error against float64 ≤ {GRADIENTS}x Inductor's"
    text = f"{worst:.2f}x: {judged[each].worst_name} ({each})"
    unjudged = judged[each].unjudged
    if unjudged:
        text += f"; {len(unjudged)} under 1e-4 of the largest: {', '.join(unjudged[:4])}"
    return [
        decide(f"{limit}, all parameters", whole <= GRADIENTS, f"{whole:.2f}x ({norm})"),
        decide(f"{limit}, each parameter", worst <= GRADIENTS, text),
    ]


def _monotone(found: Found) -> Verdict:
    limit = "predicted peak and time monotone in the budget, lowered peak to 2 %"
    rows = sorted(_ran(found), key=lambda row: -(row.budget or 0))
    falls: list[str] = []
    for looser, tighter in itertools.pairwise(rows):
        if (tighter.predicted or 0) > (looser.predicted or 0):
            falls.append(f"predicted peak at {tighter.label}")
        if (tighter.added or 0) < (looser.added or 0):
            falls.append(f"predicted time at {tighter.label}")
        if (tighter.lowered or 0) > (1 + LOWERED) * (looser.lowered or 0):
            falls.append(f"lowered peak at {tighter.label}")
    text = "; ".join(falls) if falls else f"{len(rows)} budgets"
    return decide(limit, not falls if len(rows) > 1 else None, text)


def _schedulings(found: Found) -> Verdict:
    rows = [row for row in found.rows if row.schedulings is not None]
    most = max((row.schedulings or 0 for row in rows), default=0)
    longest = max((row.planning or 0 for row in rows), default=0)
    good = most <= SCHEDULINGS if rows else None
    return decide(f"≤ {SCHEDULINGS} schedulings", good, f"{most}; longest planning {longest:.1f} s")


def tally(verdicts: Sequence[Verdict]) -> str:
    """How many limits fared how."""
    names: tuple[Status, ...] = ("met", "within noise", "missed", "not measured")
    counts = {name: sum(v.status == name for v in verdicts) for name in names}
    return ", ".join(f"{count} {name}" for name, count in counts.items() if count)
