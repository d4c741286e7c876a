"""The tables of a report, and figures as text; :mod:`memcompile.show` draws them."""

from __future__ import annotations

import collections
import dataclasses
import math
import re
from collections.abc import Sequence

from memcompile.report import LoopRow, MoveRow, Report

#: How many moves, and how many values at the peak, are shown one by one.
BIGGEST = 10

_MISSING = "-"


@dataclasses.dataclass(frozen=True)
class Table:
    """A titled table of texts; the columns named in ``right`` hold figures."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    right: tuple[str, ...] = ()


# --- figures as text ---------------------------------------------------------------------


def size(count: int | None) -> str:
    """Bytes for people, in powers of 1024: ``size(1536)`` is ``"1.50 KiB"``."""
    if count is None:
        return _MISSING
    value, unit = float(count), "B"
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if abs(value) < 1000 or unit == "TiB":
            break
        value /= 1024
    if unit == "B":
        return f"{count} B"
    return f"{value:.2f} {unit}" if abs(value) < 10 else f"{value:.1f} {unit}"


def duration(seconds: float) -> str:
    """Seconds for people: ``duration(0.0021)`` is ``"2.10 ms"``."""
    if not math.isfinite(seconds):
        return _MISSING
    for scale, unit in ((1.0, "s"), (1e-3, "ms")):
        if abs(seconds) >= scale:
            return f"{seconds / scale:.2f} {unit}"
    return f"{seconds / 1e-6:.1f} us" if seconds else "0 s"


def change(seconds: float) -> str:
    """A difference in seconds, with its sign."""
    return f"+{duration(seconds)}" if seconds > 0 else duration(seconds)


# --- the tables --------------------------------------------------------------------------


def _peaks(report: Report) -> Table:
    """The headline: every peak as a total, a step peak, and a share of Inductor's."""
    whole = None if report.inductor is None else report.inductor - report.before
    label = f"budget ({report.budget_text})" if report.budget_text else "budget"
    totals = {
        "Inductor's peak": report.inductor,
        label: report.budget,
        "floor": report.floor,
        "predicted": report.predicted,
        "lowered": report.lowered,
        "measured": report.measured,
    }
    rows = [_peak(name, total, report.before, whole) for name, total in totals.items()]
    for name, total in (("before the step", report.before), ("reserve", report.reserve)):
        rows.append((name, size(total), f"{total:,}", _MISSING, _MISSING))
    columns = ("", "total", "bytes", "step peak", "of Inductor's")
    return Table("Peaks", columns, tuple(rows), columns[1:])


def _peak(name: str, total: int | None, before: int, whole: int | None) -> tuple[str, ...]:
    """One row of :func:`_peaks`; ``whole`` is Inductor's step peak."""
    if total is None:
        return (name, *[_MISSING] * 4)
    share = f"{100 * (total - before) / whole:.1f} %" if whole and whole > 0 else _MISSING
    return (name, size(total), f"{total:,}", size(total - before), share)


def _groups(moves: Sequence[MoveRow]) -> Table:
    """Moves that do the same to the same kind of value, such as one in every layer."""
    groups: dict[tuple[str, str, str], list[MoveRow]] = collections.defaultdict(list)
    for move in moves:
        groups[move.by, move.how, _stem(move.value)].append(move)
    rows = [
        (
            *key,
            f"{len(group):,}",
            size(sum(move.bytes for move in group)),
            change(math.fsum(move.seconds for move in group)),
        )
        for key, group in sorted(
            groups.items(), key=lambda item: (-sum(m.bytes for m in item[1]), item[0])
        )
    ]
    columns = ("pass", "how", "op", "count", "bytes", "seconds")
    return Table("Moves, grouped", columns, tuple(rows), columns[3:])


def _stem(value: str) -> str:
    """A node's name without its number: ``mul_12`` is one of the ``mul``."""
    return re.sub(r"(_\d+)+$", "", value) or value


def _biggest(moves: Sequence[MoveRow]) -> Table:
    """The moves of most bytes, one by one."""
    chosen = sorted(moves, key=lambda move: -move.bytes)[:BIGGEST]
    rows = tuple(
        (move.value, move.by, move.how, size(move.bytes), change(move.seconds), move.source)
        for move in chosen
    )
    columns = ("value", "pass", "how", "bytes", "seconds", "source")
    title = "Moves" if len(chosen) == len(moves) else f"The {BIGGEST} biggest moves"
    return Table(title, columns, rows, columns[3:5])


def _offered(moves: Sequence[MoveRow]) -> Table:
    """For the biggest moves what was taken, and what the other ways were likely to cost."""
    chosen = sorted((m for m in moves if len(m.offered) > 1), key=lambda move: -move.bytes)
    rows = tuple(
        (
            move.value,
            move.how,
            ", ".join(change(cost) for how, cost in move.offered if how == move.how),
            ", ".join(f"{how} {change(cost)}" for how, cost in move.offered if how != move.how),
        )
        for move in chosen[:BIGGEST]
    )
    return Table("Why", ("value", "taken", "it costs about", "the others"), rows)


def _stays(report: Report) -> Table:
    """What lies on the host, and between which nodes it is away."""
    rows = tuple(
        (
            stay.value,
            stay.how,
            size(stay.bytes),
            stay.landed,
            stay.begins,
            duration(stay.seconds),
            stay.source,
        )
        for stay in report.stays
    )
    columns = ("value", "how", "bytes", "there after", "back from", "waited", "source")
    return Table("On the host", columns, rows, ("bytes", "waited"))


def chunk_bytes(loop: LoopRow) -> int:
    """Bytes of the loop's value that one trip makes."""
    return -(-loop.bytes // loop.chunks)


def _loops(report: Report) -> Table:
    """The regions that run chunk by chunk, in the order in which they were found."""
    rows = tuple(
        (
            loop.value,
            loop.by,
            f"{loop.dim}",
            f"{loop.length:,}",
            f"{loop.chunks:,}",
            size(loop.bytes),
            size(loop.peak_before),
            size(loop.peak_after),
            loop.source,
        )
        for loop in report.loops
    )
    columns = (
        "value",
        "pass",
        "dim",
        "length",
        "chunks",
        "bytes",
        "peak before",
        "after",
        "source",
    )
    return Table("Loops", columns, rows, columns[2:8])


def _largest(report: Report) -> Table:
    """The largest values alive at the peak."""
    rows = tuple(
        (
            value.name,
            size(value.bytes),
            value.kind,
            f"{value.dtype.removeprefix('torch.')}[{', '.join(map(str, value.shape))}]",
            value.op,
            value.source,
        )
        for value in report.largest[:BIGGEST]
    )
    columns = ("value", "bytes", "kind", "type", "op", "source")
    return Table("Largest values at the peak", columns, rows, ("bytes",))


def _passes(report: Report) -> Table:
    """What each pass did."""
    rows = tuple(
        (ran.by, ran.exactness, "yes" if ran.changed else "no", ran.note) for ran in report.passes
    )
    return Table("Passes", ("pass", "exact", "changed", "note"), rows)


def tables(report: Report) -> list[Table]:
    """Every table that has something to say, the headline first."""
    found = [_peaks(report)]
    grouped = _groups(report.moves)
    if len(grouped.rows) < len(report.moves):
        found.append(grouped)
    found += [_stays(report), _loops(report), _biggest(report.moves), _offered(report.moves)]
    found += [_largest(report), _passes(report)]
    return [table for table in found if table.rows]
