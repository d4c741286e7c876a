"""The figures as tables: on the terminal, and as a page of Markdown."""

from __future__ import annotations

from collections.abc import Sequence

from records import Found, Row, Where
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from verdicts import Verdict, tally

HEADS = (
    "side", "budget MB", "peak MB", "of Inductor's", "lowered", "lowered/measured",
    "predicted", "time / Inductor's", "planning", "schedulings", "numbers",
)  # fmt: skip
COLOURS = {"met": "green", "within noise": "yellow", "missed": "red", "not measured": "dim"}


def show(console: Console, found: Found, verdicts: Sequence[Verdict]) -> None:
    """One subject on the terminal."""
    table = Table(title=title(found), title_justify="left")
    for head in HEADS:
        table.add_column(head, justify="left" if head in ("side", "numbers") else "right")
    for row in found.rows:
        table.add_row(*(escape(cell) for cell in cells(row, found)))
    console.print(table)
    if found.duels:
        duels = Table(title="at the peaks that the peers reach", title_justify="left")
        for head in DUEL_HEADS:
            duels.add_column(head, justify="left" if head == "peer" else "right")
        for line in duel_lines(found):
            duels.add_row(*(escape(cell) for cell in line))
        console.print(duels)
    show_verdicts(console, verdicts)


def show_verdicts(console: Console, verdicts: Sequence[Verdict]) -> None:
    """A line each, its status in colour."""
    for verdict in verdicts:
        colour = COLOURS[verdict.status]
        text = f"{verdict.subject}: {verdict.limit}: {verdict.figure}"
        console.print(f"[{colour}]{verdict.status:>12}[/]  {escape(text)}", highlight=False)


def title(found: Found) -> str:
    """The subject, what lives before its step, and the noise."""
    text = f"{found.subject} ({found.scale}): {found.before / 1e6:.1f} MB live before the step"
    if found.noise is None:
        return text
    return (
        f"{text}; Inductor's takes {found.noise.seconds * 1e3:.1f} ms, against itself "
        f"{found.noise}, noise ±{found.noise_margin:.3f}"
    )


def cells(row: Row, found: Found) -> list[str]:
    """One row as text, under :data:`HEADS`."""
    inductor = found.inductor.peak
    share = row.peak / inductor if row.peak is not None and inductor else None
    error = row.lowered_error
    peak = mb(row.peak)
    if row.reserved is not None:
        peak += f" (reserved {mb(row.reserved)})"
    return [
        row.label,
        mb(row.budget),
        row.note if row.refused or row.failed else peak,
        "" if share is None else f"{share:.0%}",
        mb(row.lowered),
        "" if error is None else f"{error:+.2%}",
        mb(row.predicted),
        "" if row.time is None else str(row.time),
        "" if row.planning is None else f"{row.planning:.1f} s",
        "" if row.schedulings is None else str(row.schedulings),
        numbers(row),
    ]


def numbers(row: Row) -> str:
    """What is known of a row's gradients, and its note."""
    parts = []
    if row.numbers is not None:
        if row.numbers.error is not None:
            parts.append(f"error {row.numbers.error:.2f}x")
        else:
            equal = "=" if row.numbers.loss_equal else "≠"
            parts.append(f"loss {equal}, gradients {row.numbers.difference:.0e}")
    if row.note and not (row.refused or row.failed):
        parts.append(row.note)
    return "; ".join(parts)


DUEL_HEADS = ("peer", "its peak MB", "its time", "our peak MB", "our time", "ours / its")


def duel_lines(found: Found) -> list[list[str]]:
    """Peers and ours side by side; times are over Inductor's but for the last column."""
    lines = []
    for duel in found.duels:
        peer, ours = found.row(duel.peer), found.row(duel.ours)
        lines.append(
            [
                duel.peer,
                mb(peer.peak),
                str(peer.time or ""),
                mb(ours.peak) or ours.note,
                str(ours.time or ""),
                str(duel.time or ""),
            ]
        )
    return lines


def mb(count: int | None) -> str:
    return "" if count is None else f"{count / 1e6:.2f}"


def markdown(where: Where, results: Sequence[Found], verdicts: Sequence[Verdict]) -> str:
    """The whole run as a page."""
    lines = [
        f"# {where.date}, {where.name}, torch {where.torch}",
        "",
        f"Device {where.device} ({where.name}), torch {where.torch}, {where.threads} threads. "
        "Peaks are step peaks. Times are medians of alternated pairs, with their quartiles.",
    ]
    for found in results:
        lines += ["", f"## {found.subject}", "", title(found), ""]
        lines += grid(HEADS, [cells(row, found) for row in found.rows])
        if found.duels:
            lines += ["", "At the peaks that the peers reach:", ""]
            lines += grid(DUEL_HEADS, duel_lines(found))
    lines += ["", "## Limits", "", tally(verdicts), ""]
    heads = ("subject", "limit", "", "figure")
    lines += grid(heads, [[v.subject, v.limit, v.status, v.figure] for v in verdicts])
    return "\n".join(lines) + "\n"


def grid(heads: Sequence[str], lines: Sequence[Sequence[str]]) -> list[str]:
    """A Markdown table."""

    def line(parts: Sequence[str]) -> str:
        return "| " + " | ".join(part.replace("|", "\\|") for part in parts) + " |"

    return [line(heads), line(["---"] * len(heads)), *(line(parts) for parts in lines)]
