"""What chunking is held against, and whether it holds."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Literal

from records import Found, Row
from verdicts import Verdict, decide, decide_time, lowered_right, numbers_right, within_budget

#: Pipelines, as the user names them: recomputation alone, and with loops.
ALONE, CHUNK = "default", "default,chunk"


@dataclasses.dataclass(frozen=True)
class Limit:
    """Of one subject. ``peak`` and ``time`` are shares of the step peak and time of a peer."""

    peak: float
    time: float | None  #: at that peak; None is no limit
    of: Literal["Inductor", "eager"] = "Inductor"  #: whose peak; times are over Inductor's
    below_alone: float | None = None  #: least peak over that of recomputation alone
    time_at_alone: float | None = None  #: at the least peak that recomputation alone reaches
    beside: str | None = None  #: subject whose least share of the peak it comes near
    near: float = 1.05  #: how near: its own share over that one's
    amplify: int | None = None  #: of Inductor's auto_chunker, where it can be made to apply


#: By the name the command line has for the subject.
LIMITS: dict[str, Limit] = {
    "triangle": Limit(0.20, 0.9),
    "attention": Limit(0.12, 0.8),
    "attention-beside": Limit(0.12, 0.8),
    "attention-prime": Limit(0.12, 0.8, beside="attention-beside"),
    "outer-product": Limit(0.30, 0.9),
    "transition": Limit(0.50, 0.9),
    "transition-gelu": Limit(0.50, 0.9),
    "vocabulary": Limit(0.30, 1.15, amplify=2),
    "esmfold": Limit(0.30, None, "eager", below_alone=0.75, time_at_alone=1.2),
    "esmfold-long": Limit(0.30, None, "eager", below_alone=0.75, time_at_alone=1.2),
    "evoformer": Limit(0.30, 1.3, "eager"),
    "inference": Limit(0.20, 1.1),
}


def judge(found: Found, limit: Limit, others: dict[str, Found]) -> list[Verdict]:
    """All limits of one subject; ``others`` have been measured, by their names."""
    verdicts = [
        _peak(found, limit),
        *_time(found, limit),
        *_beside_alone(found, limit),
        *_beside(found, limit, others),
        within_budget(found),
        lowered_right(found),
        *numbers_right(found),
    ]
    return [dataclasses.replace(verdict, subject=found.subject) for verdict in verdicts]


def least(found: Found, passes: str) -> Row:
    """The row at the budget "min"."""
    return next(row for row in found.of_kind("min") if row.passes == passes)


def at_the_limit(found: Found) -> Row:
    """Loops, at a budget equal to the limit on the peak."""
    return next(row for row in found.of_kind("budget") if row.passes == CHUNK)


def least_share(found: Found) -> float | None:
    """The least peak with loops over Inductor's."""
    ours, theirs = least(found, CHUNK).peak, found.inductor.peak
    return ours / theirs if ours and theirs else None


def _peak(found: Found, limit: Limit) -> Verdict:
    """The budget was met; refused, the floor says by how much it was missed."""
    row, lowest = at_the_limit(found), least(found, CHUNK)
    whole = found.row(limit.of).peak
    text = f"peak ≤ {limit.peak:.2f}x {limit.of}'s"
    if whole is None:
        return decide(text, None, "–")
    parts = []
    for name, peak in (("at the limit", row.peak), ("floor", row.floor), ("least", lowest.peak)):
        if peak is not None:
            parts.append(f"{name} {peak / whole:.3f}x")
    met = row.peak is not None and row.peak <= limit.peak * whole
    return decide(text, met, ", ".join(parts) or row.note)


def _time(found: Found, limit: Limit) -> list[Verdict]:
    if limit.time is None:
        return []
    row = at_the_limit(found)
    text = f"time ≤ {limit.time:.2f}x Inductor's at {limit.peak:.2f}x {limit.of}'s peak"
    if row.peak is None:
        return [decide(text, False, row.note)]
    return [decide_time(text, row.time, limit.time, found.noise_margin)]


def _beside_alone(found: Found, limit: Limit) -> list[Verdict]:
    """What loops add to recomputation."""
    verdicts = []
    ours, alone = least(found, CHUNK).peak, least(found, ALONE).peak
    if limit.below_alone is not None:
        text = f"least peak ≤ {limit.below_alone:.2f}x that of recomputation alone"
        share = ours / alone if ours and alone else None
        good = None if share is None else share <= limit.below_alone
        verdicts.append(decide(text, good, "–" if share is None else f"{share:.3f}x"))
    if limit.time_at_alone is not None:
        text = f"time ≤ {limit.time_at_alone:.2f}x at the least peak of recomputation alone"
        rows = found.of_kind("level")
        if rows and rows[0].peak is None:
            verdicts.append(decide(text, False, rows[0].note))
        else:
            ratio = rows[0].time if rows else None
            verdicts.append(decide_time(text, ratio, limit.time_at_alone, found.noise_margin))
    return verdicts


def _beside(found: Found, limit: Limit, others: dict[str, Found]) -> list[Verdict]:
    """A length that no chunk divides does nearly as well as one that all divide."""
    if limit.beside is None:
        return []
    other = others.get(limit.beside)
    name = limit.beside if other is None else other.subject
    ours, theirs = least_share(found), least_share(other) if other else None
    text = f"least share of the peak ≤ {limit.near:.2f}x that of {name}"
    if ours is None or theirs is None:
        return [decide(text, None, "–")]
    figure = f"{ours:.4f} and {theirs:.4f}: {ours / theirs:.3f}x"
    return [decide(text, ours <= limit.near * theirs, figure)]


def in_order(names: Sequence[str]) -> list[str]:
    """``names``, each after the one it is compared with."""
    beside = {LIMITS[name].beside for name in names}
    return sorted(names, key=lambda name: name not in beside)
