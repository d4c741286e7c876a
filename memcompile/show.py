"""How a report looks: text for a terminal, one HTML page with the picture of the timeline.

Both are made of the same tables, so they say the same figures in the same words.
"""

from __future__ import annotations

import collections
import dataclasses
import importlib.resources
import io
import itertools
import json
import math
import re
from collections.abc import Iterable, Sequence

import rich.box
import rich.console
import rich.table

from memcompile.report import KINDS, MoveRow, Point, Report

#: How many moves, and how many values at the peak, are shown one by one.
BIGGEST = 10
#: How many points of a timeline one panel of the picture draws.
POINTS = 1000

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


def _plain(text: str) -> str:
    """``text`` with what a terminal would act on, and what is no character, replaced."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


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


def _loops(report: Report) -> Table:
    """The regions that run chunk by chunk."""
    rows = tuple(
        (
            loop.value,
            loop.by,
            f"{loop.dim} of {loop.length:,}",
            f"{loop.chunks:,}",
            f"{loop.nodes:,}",
            size(loop.bytes),
            f"{size(loop.peak_before)} to {size(loop.peak_after)}",
            loop.source,
        )
        for loop in report.loops
    )
    columns = ("value", "pass", "dimension", "chunks", "ops", "bytes", "least peak", "source")
    return Table("Loops", columns, rows, columns[3:7])


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
    found += [_loops(report), _biggest(report.moves), _largest(report), _passes(report)]
    return [table for table in found if table.rows]


# --- the sentences -----------------------------------------------------------------------


def title(report: Report) -> str:
    """The name of the graph, and which one it is."""
    return f"{report.name or 'graph'} #{report.index}"


def subtitle(report: Report) -> str:
    """What was compiled, for what."""
    return f"{report.kind} · {report.device} · torch {report.torch} · lowered by {report.lower}"


def sentences(report: Report) -> list[str]:
    """What the figures come to, a line each."""
    lines = [_verdict(report), _time(report), *_moved(report.moves)]
    if report.peak_expression:
        lines.append(f"Predicted peak = {report.peak_expression}")
    origin = "Read back from disk; planned" if report.cached else "Planned"
    scheduled = _count(report.schedulings, "scheduling")
    lines.append(f"{origin} in {duration(report.planning_seconds)} with {scheduled}.")
    return lines


def _verdict(report: Report) -> str:
    """Whether the best known peak keeps the promise."""
    if report.budget is None and report.budget_text == "min":
        return "Budget min: the least peak found, whatever it costs in time."
    if report.budget is None:
        return "No budget: Inductor's own split, as it is."
    known = {
        "measured": report.measured,
        "lowered": report.lowered,
        "predicted": report.predicted,
    }
    word, peak = next((word, peak) for word, peak in known.items() if peak is not None)
    spare = report.budget - peak
    if spare < 0:
        return f"OVER the budget: the {word} peak is {size(-spare)} above it."
    return f"Fits the budget: the {word} peak leaves {size(spare)} to spare."


def _time(report: Report) -> str:
    """The predicted change of the step's time."""
    line = f"Predicted time: {change(report.seconds)}"
    if report.step_seconds > 0:
        share = 100 * report.seconds / report.step_seconds
        line += f" ({share:+.1f} %) on Inductor's {duration(report.step_seconds)}"
    return f"{line}."


def _moved(moves: Sequence[MoveRow]) -> Iterable[str]:
    """How many values are rebuilt, how many kept, and what that is worth."""
    if not moves:
        yield "No move taken."
    kept = [move for move in moves if move.how == "keep"]
    rebuilt = [move for move in moves if move.how != "keep"]
    for group, verb, effect in (
        (rebuilt, "rebuilt late", "not kept"),
        (kept, "kept instead of rebuilt", "kept"),
    ):
        if group:
            total = size(sum(move.bytes for move in group))
            seconds = change(math.fsum(move.seconds for move in group))
            yield f"{_count(len(group), 'value')} {verb}: {total} {effect}, {seconds}."


def _lists(report: Report) -> list[tuple[str, tuple[str, ...]]]:
    """The titled lists of a report that are not empty."""
    lists = [("Outside the promise", report.outside), ("Notes", report.notes)]
    return [(name, items) for name, items in lists if items]


# --- text --------------------------------------------------------------------------------


def text(report: Report, width: int = 100) -> str:
    """The report for a terminal ``width`` columns wide."""
    out = io.StringIO()
    console = rich.console.Console(
        file=out, width=width, markup=False, highlight=False, emoji=False, color_system=None
    )
    console.print(_plain(f"{title(report)}  ({subtitle(report)})"))
    for line in sentences(report):
        console.print(_plain(f"  {line}"))
    for table in tables(report):
        console.print(f"\n{table.title}")
        console.print(_rich(table))
    for name, items in _lists(report):
        console.print(f"\n{name}")
        for item in items:
            console.print(_plain(f"  - {item}"))
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines()) + "\n"


def _rich(table: Table) -> rich.table.Table:
    """A table as rich draws it: figures are never broken, words fold."""
    drawn = rich.table.Table(box=rich.box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for column in table.columns:
        figure = column in table.right
        drawn.add_column(
            column,
            justify="right" if figure else "left",
            no_wrap=figure,
            overflow="fold",
        )
    for row in table.rows:
        drawn.add_row(*map(_plain, row))
    return drawn


# --- the picture -------------------------------------------------------------------------


def html(report: Report) -> str:
    """The report as one standalone HTML page, the picture of the timeline in it."""
    page = importlib.resources.files("memcompile").joinpath("show.html").read_text("utf-8")
    return page.replace("/*DATA*/", _embed(_page(report)), 1)


def _page(report: Report) -> dict[str, object]:
    """Everything the page shows, as JSON-able data."""
    return {
        "title": title(report),
        "subtitle": subtitle(report),
        "sentences": sentences(report),
        "tables": [dataclasses.asdict(table) for table in tables(report)],
        "lists": _lists(report),
        "texts": [
            (name, graph)
            for name, graph in (
                ("Graph before", report.graph_before),
                ("Forward after", report.forward),
                ("Backward after", report.backward),
            )
            if graph
        ],
        "kinds": KINDS,
        "budget": report.budget,
        "panels": [
            _panel("Before: Inductor's own", report.timeline_before),
            _panel("After: the plan", report.timeline_after),
        ],
    }


def _embed(data: object) -> str:
    """JSON that can stand inside a ``<script>``: no text in it can end the element."""
    plain = json.dumps(data, separators=(",", ":"))
    return plain.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def _panel(name: str, points: Sequence[Point]) -> dict[str, object]:
    """One timeline, as the page draws it."""
    kept = sample(points, POINTS)
    return {
        "title": name,
        "nodes": len(points),
        "boundary": _boundary(points),
        "peak": max(range(len(kept)), key=lambda at: points[kept[at]].bytes, default=None),
        "points": [
            {
                "at": at,
                "node": points[at].node,
                "source": points[at].source,
                "side": points[at].side,
                "live": [points[at].live.get(kind, 0) for kind in KINDS],
                "largest": points[at].largest,
            }
            for at in kept
        ],
    }


def _boundary(points: Sequence[Point]) -> int | None:
    """Where the backward begins; ``None`` where all is forward, or all backward."""
    first = next((at for at, point in enumerate(points) if point.side == "backward"), None)
    return first or None


def sample(points: Sequence[Point], limit: int) -> list[int]:
    """At most about ``limit`` positions that show the timeline.

    The highest point of each of ``limit`` equal stretches, so no peak is lost, and
    both ends and the first of the backward, so the shape keeps its corners.
    """
    count = len(points)
    if count <= limit:
        return list(range(count))
    edges = [count * part // limit for part in range(limit + 1)]
    kept = {
        max(range(start, end), key=lambda at: points[at].bytes)
        for start, end in itertools.pairwise(edges)
    }
    return sorted(kept | {0, _boundary(points) or 0, count - 1})
