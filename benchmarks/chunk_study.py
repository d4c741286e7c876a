"""Loops over chunks beside recomputation alone, on one subject and as one table."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import sides
import torch
from chunk_limits import ALONE, CHUNK, Limit
from measuring import Measuring, Plan, Progress, released
from records import Found, Row, Where
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from sides import Side
from subjects import Subject
from tables import grid, mb, show_verdicts
from torch._inductor.utils import fresh_cache
from verdicts import Verdict, tally

HEADS = (
    "subject", "side", "budget MB", "peak MB", "of Inductor's", "of eager's", "time / Inductor's",
    "noise", "lowered/measured", "predicted/lowered", "loops", "compile", "of Inductor's",
    "planning", "error against float64", "over Inductor's",
)  # fmt: skip
LEFT = ("subject", "side")


def study(
    subject: Subject, limit: Limit, scale: str, plan: Plan, progress: Progress, cached: bool
) -> Found:
    """All sides of one subject. ``cached`` kernels make compile times say nothing."""
    with sides.planned_anew(), released():
        return Study(subject, limit, scale, plan, progress, cached).run()


class Study(Measuring):
    """Inductor, recomputation alone, and loops: each of ours at "min" and at the limit."""

    def __init__(
        self,
        subject: Subject,
        limit: Limit,
        scale: str,
        plan: Plan,
        progress: Progress,
        cached: bool,
    ) -> None:
        super().__init__(subject, scale, plan, progress)
        self.limit, self.cached = limit, cached
        self.to_build = 7

    def _add(self, row: Row, build: Callable[[], Side]) -> Row:
        """Compiled with nothing cached, so that compile times can be compared."""
        if self.cached:
            return super()._add(row, build)

        def timed() -> Side:
            with cold():
                start = time.perf_counter()
                side = build()
                row.compiling = None if row.kind == "eager" else time.perf_counter() - start
            return side

        return super()._add(row, timed)

    def _peers(self) -> None:
        self._add(Row("eager", "eager"), lambda: sides.eager(self.subject, "eager"))
        warm_compiler()
        self._inductor()
        if self.truth is not None:
            inductor = self.sides["Inductor"]
            self.found.inductor.numbers = sides.compare(inductor, inductor, self.truth)
        if (amplify := self.limit.amplify) is not None:
            label = f"Inductor's auto_chunker from {amplify}x on"
            self._add(Row(label, "peer"), lambda: sides.auto_chunked(self.subject, label, amplify))

    def _ours(self) -> None:
        alone = self._memopt("recompute alone, least peak", "min", "min", ALONE)
        if alone.failed:
            raise RuntimeError(f"{self.subject.name}: recomputing failed: {alone.note}")
        self._memopt("chunk, least peak", "min", "min", CHUNK)
        whole = self.found.row(self.limit.of).peak
        if whole is None:
            raise RuntimeError(f"{self.subject.name}: {self.limit.of} was not measured")
        budget, share = int(self.limit.peak * whole), f"{self.limit.peak:.0%}"
        self._memopt(f"chunk at {share} of {self.limit.of}'s", "budget", budget, CHUNK)
        self._memopt(f"recompute alone at {share}", "budget", budget, ALONE)
        if self.limit.time_at_alone is not None and alone.peak is not None:
            label = "chunk at the least peak of recompute alone"
            self._memopt(label, "level", alone.peak, CHUNK)


@contextmanager
def cold() -> Iterator[None]:
    """No kernel on disk or in memory. Rates and scratch sizes stay where they are kept."""
    caught: Exception | None = None
    with fresh_cache():
        try:
            yield
        except Exception as error:  # it would keep the folder
            caught = error
    if caught is not None:
        raise caught


def warm_compiler() -> None:
    """Headers and compile workers are made on first use, which is no side's to pay for."""
    logging.getLogger("torch._inductor").setLevel(logging.ERROR)
    x = torch.ones(64, requires_grad=True)
    torch.compile(lambda x: x.sin().sum(), fullgraph=True)(x).backward()


def cells(row: Row, found: Found) -> list[str]:
    """One row as text, under :data:`HEADS`."""
    inductor, eager = found.inductor, found.row("eager")
    numbers = row.numbers
    short = row.refused or row.failed
    if numbers is not None and found.random:
        error = f"random; {numbers.difference:.0e} from Inductor's"
    else:
        error = scientific(numbers.relative if numbers else None)
    ours = row.kind != "eager"
    return [
        found.subject,
        row.label,
        mb(row.budget),
        row.note if short else mb(row.peak),
        over(row.floor if row.refused else row.peak, inductor.peak),
        over(row.floor if row.refused else row.peak, eager.peak),
        "" if row.time is None or row is inductor else str(row.time),
        f"±{found.noise_margin:.3f}" if row is inductor and found.noise else "",
        "" if row.lowered_error is None else f"{row.lowered_error:+.2%}",
        "" if not row.lowered else f"{row.predicted / row.lowered - 1:+.1%}",  # type: ignore[operator]
        "" if row.loops is None else str(row.loops),
        "" if row.compiling is None else f"{row.compiling:.1f} s",
        over(row.compiling, inductor.compiling) if ours else "",
        "" if row.planning is None else f"{row.planning:.1f} s",
        error,
        "" if numbers is None or numbers.error is None else f"{numbers.error:.2f}x",
    ]


def over(ours: float | None, theirs: float | None) -> str:
    """A ratio, where both are known."""
    return "" if ours is None or not theirs else f"{ours / theirs:.3f}x"


def scientific(figure: float | None) -> str:
    return "" if figure is None else f"{figure:.1e}"


def show(console: Console, found: Found, verdicts: Sequence[Verdict]) -> None:
    """One subject on the terminal; of the columns those that say something."""
    table = Table(title=title(found), title_justify="left")
    lines = [cells(row, found) for row in found.rows]
    used = [i for i in range(1, len(HEADS)) if any(line[i] for line in lines)]
    for i in used:
        table.add_column(HEADS[i], justify="left" if HEADS[i] in LEFT else "right")
    for line in lines:
        table.add_row(*(escape(line[i]) for i in used))
    console.print(table)
    show_verdicts(console, verdicts)


def title(found: Found) -> str:
    """The subject, what lives before its step, and Inductor's time."""
    text = f"{found.subject} ({found.scale}): {found.before / 1e6:.1f} MB live before the step"
    if found.noise is None:
        return text
    return f"{text}; Inductor's takes {found.noise.seconds * 1e3:.1f} ms, itself {found.noise}"


def markdown(where: Where, results: Sequence[Found], verdicts: Sequence[Verdict]) -> str:
    """The whole study as a page: one table of all subjects, and the limits."""
    lines = [
        f"# Chunking, {where.date}, {where.name}, torch {where.torch}",
        "",
        f"Device {where.device} ({where.name}), torch {where.torch}, {where.threads} threads. "
        f'`passes="{CHUNK}"` beside `passes="{ALONE}"`. Peaks are step peaks; the ratios of a '
        "refused budget are those of its floor. Times are medians of alternated pairs, with "
        "their quartiles. Compile times include the first step; no kernel was cached. Errors "
        "are of all gradients (in inference, outputs) against float64, over their norm.",
        "",
    ]
    rows = [cells(row, found) for found in results for row in found.rows]
    lines += grid(HEADS, rows)
    lines += ["", *(f"- {title(found)}" for found in results)]
    lines += ["", "## Limits", "", tally(verdicts), ""]
    heads = ("subject", "limit", "", "figure")
    lines += grid(heads, [[v.subject, v.limit, v.status, v.figure] for v in verdicts])
    return "\n".join(lines) + "\n"
