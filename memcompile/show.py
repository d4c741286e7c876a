"""How a report looks: text for a terminal, one HTML page with the picture of the timeline.

Both are made of the same tables, so they say the same figures in the same words.
"""

from __future__ import annotations

import dataclasses
import importlib.resources
import io
import itertools
import json
import math
from collections.abc import Iterable, Sequence

import rich.box
import rich.console
import rich.table

from memcompile.report import KINDS, LoopRow, MoveRow, Point, Report
from memcompile.tables import Table, change, chunk_bytes, duration, size, tables

#: How many points of a timeline one panel of the picture draws.
POINTS = 1000


def _plain(text: str) -> str:
    """``text`` with what a terminal would act on, and what is no character, replaced."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


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
    lines += _hosted(report)
    lines += _looped(report.loops)
    if report.fidelity:
        lines.append(f"{report.fidelity[0].upper()}{report.fidelity[1:]}.")
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


def _hosted(report: Report) -> Iterable[str]:
    """How much lies on the host, and how well its copies are hidden."""
    if report.stays:
        waited = math.fsum(stay.seconds for stay in report.stays)
        hidden = duration(max(0.0, report.link_seconds - waited))
        yield (
            f"{_count(len(report.stays), 'value')} on the host: {size(report.host)}, copied there "
            f"and back in {duration(report.link_seconds)}, {hidden} of it beside the kernels."
        )


def _looped(loops: Sequence[LoopRow]) -> Iterable[str]:
    """How many regions are loops, and what that does to the least peak."""
    if loops:
        before, after = size(loops[0].peak_before), size(loops[-1].peak_after)
        verb = "runs" if len(loops) == 1 else "run"
        yield (
            f"{_count(len(loops), 'region')} {verb} chunk by chunk: "
            f"the least peak falls from {before} to {after}."
        )


def _lists(report: Report) -> list[tuple[str, tuple[str, ...]]]:
    """The titled lists of a report that are not empty."""
    lists = [("Outside the promise", report.outside), ("Notes", report.notes)]
    return [(name, items) for name, items in lists if items]


# --- text --------------------------------------------------------------------------------


def text(report: Report, width: int = 100) -> str:
    """The report for a terminal ``width`` columns wide."""
    heading = f"{title(report)}  ({subtitle(report)})"
    return page(heading, sentences(report), tables(report), _lists(report), width)


def page(
    heading: str,
    lines: Iterable[str],
    tables: Iterable[Table],
    lists: Iterable[tuple[str, Sequence[str]]],
    width: int = 100,
) -> str:
    """A heading, what it comes to in a line each, tables, and titled lists, as text."""
    out = io.StringIO()
    console = rich.console.Console(
        file=out, width=width, markup=False, highlight=False, emoji=False, color_system=None
    )
    console.print(_plain(heading))
    for line in lines:
        console.print(_plain(f"  {line}"))
    for table in tables:
        console.print(f"\n{table.title}")
        console.print(_rich(table))
    for name, items in lists:
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
        "loops": [_loop_lines(loop) for loop in report.loops],
        "panels": [
            _panel("Before: Inductor's own", report.timeline_before),
            _panel("After: the plan", report.timeline_after, report.loops),
        ],
    }


def _embed(data: object) -> str:
    """JSON that can stand inside a ``<script>``: no text in it can end the element."""
    plain = json.dumps(data, separators=(",", ":"))
    return plain.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def _loop_lines(loop: LoopRow) -> list[str]:
    """What the picture says of one loop: what it is, then what it does, then where from."""
    ops = f"{_count(loop.nodes, 'op')} in {_count(loop.chunks, 'chunk')}"
    return [
        f"loop around {loop.value}",
        f"{ops} of dimension {loop.dim}, {loop.length:,} long",
        f"{size(loop.bytes)} whole, {size(chunk_bytes(loop))} a chunk",
        f"least peak {size(loop.peak_before)} → {size(loop.peak_after)}",
        *filter(None, [loop.source]),
    ]


def _panel(name: str, points: Sequence[Point], loops: Sequence[LoopRow] = ()) -> dict[str, object]:
    """One timeline, as the page draws it; its points know their loop's number."""
    number = {node: at for at, loop in enumerate(loops) for node in loop.at}
    looped = {at for at, point in enumerate(points) if point.node in number}
    kept = sorted({*sample(points, POINTS), *looped})
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
                "loop": number.get(points[at].node),
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
