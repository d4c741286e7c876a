"""The longest sequence whose training step fits: peers, ours, and loops written by hand.

Lengths lie 10 % apart. Each trial compiles, runs and measures one step; from what was needed
at the lengths tried the next one is guessed, so that few are.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence

import sides
from by_hand import attention_by_hand, evoformer_by_hand
from chunk_limits import ALONE, CHUNK
from layers import distance_attention
from measuring import released
from records import Where
from rich.console import Console
from sides import DoesNotApply, Side
from subjects import Scale, Subject, checkpointed, evoformer
from tables import grid, mb

import memcompile
from memcompile import BudgetError
from memcompile.measure import tensor_bytes

STEP = 1.1  #: between lengths
LEAP = 2.0  #: at most so much longer than what is known to fit
LEAST = 8  #: no shorter length is tried

#: A step compiled one way, given the subject and the memory in bytes.
Way = Callable[[Subject, int], Side]


@dataclasses.dataclass(frozen=True)
class Trial:
    """One length, one way."""

    length: int
    total: int  #: bytes measured, what lives before included; of a refusal the floor
    needed: int | None  #: the least bytes known to do; None where no less was looked for
    fits: bool


@dataclasses.dataclass
class Longest:
    """How far one way goes."""

    subject: str
    way: str
    length: int | None = None  #: None: not one of the lengths tried fits
    total: int | None = None  #: bytes measured at that length
    refused: int | None = None  #: the next length, which was tried and does not fit
    trials: list[Trial] = dataclasses.field(default_factory=list)
    note: str = ""


@dataclasses.dataclass(frozen=True)
class Task:
    """A subject of any length, and the ways it is run."""

    name: str
    build: Callable[[int], Subject]
    first: int  #: the length that all lengths tried lie 10 % apart from
    ways: dict[str, Way]


def tasks(scale: Scale) -> list[Task]:
    """Attention by its length, the Evoformer by its residues."""
    length, residues = (2048, 64) if scale == "default" else (64, 12)
    hand = {
        "by hand, eager": by_hand(functools.partial(attention_by_hand, unrolled=False), False),
        "by hand, Inductor": by_hand(functools.partial(attention_by_hand, unrolled=True), True),
    }
    return [
        Task(
            "attention",
            lambda n: distance_attention(scale, length=n),
            length,
            {**WAYS, **hand},
        ),
        # Compiled, its loops by hand are some hundred checkpointed regions: left out.
        Task(
            "evoformer",
            lambda n: evoformer(scale, residues=n),
            residues,
            {**WAYS, "by hand, eager": by_hand(evoformer_by_hand, False)},
        ),
    ]


def eager(subject: Subject, memory: int) -> Side:
    """Nothing compiled."""
    return sides.eager(subject, "eager")


def inductor(subject: Subject, memory: int) -> Side:
    """Plain ``torch.compile``."""
    return sides.compiled(subject, "Inductor")


def per_block(subject: Subject, memory: int) -> Side:
    """Every block under a checkpoint, compiled by Inductor."""
    return sides.compiled(checkpointed(subject), "checkpointed, Inductor")


def auto_chunker(subject: Subject, memory: int) -> Side:
    """Inductor's own chunking."""
    return sides.auto_chunked(subject, "auto_chunker")


def memopt(passes: str) -> Way:
    """Ours, the memory as its budget."""

    def build(subject: Subject, memory: int) -> Side:
        options = {"budget": memory, "passes": passes, "name": LABEL}
        return sides.compiled(subject, passes, "memopt", options)

    return build


def by_hand(rewrite: Callable[[Subject], Subject], compiled: bool) -> Way:
    """Chunks in the model's own code."""

    def build(subject: Subject, memory: int) -> Side:
        chunked = rewrite(subject)
        return sides.compiled(chunked, "by hand") if compiled else sides.eager(chunked, "by hand")

    return build


LABEL = "longest"
WAYS: dict[str, Way] = {
    "eager": eager,
    "Inductor": inductor,
    "auto_chunker": auto_chunker,
    "checkpointed, Inductor": per_block,
    "recompute alone": memopt(ALONE),
    "chunk": memopt(CHUNK),
}


def longest(task: Task, way: str, memory: int, start: int, tell: Callable[[str], None]) -> Longest:
    """The longest length of the task's that fits ``memory`` bytes; ``start`` is tried first."""
    found = Longest(task.name, way)
    lengths = Lengths(task.first)
    place: int | None = lengths.place(start)
    while place is not None:
        length = lengths.at(place)
        tell(f"{task.name}, {way}: {length}")
        try:
            trial = measured(task, way, length, memory)
        except DoesNotApply as reason:
            found.note = f"does not apply at {length}: {reason}"
            break
        except Exception as error:  # the other ways are still worth trying
            found.note = f"failed at {length}: {type(error).__name__}: {str(error)[:80]}"
            break
        found.trials.append(trial)
        lengths.learn(place, trial.fits)
        place = lengths.next(found.trials, memory)
    best = max((t for t in found.trials if t.fits), key=lambda t: t.length, default=None)
    if best is not None:
        found.length, found.total = best.length, best.total
    found.refused = min((t.length for t in found.trials if not t.fits), default=None)
    return found


class Lengths:
    """The lengths 10 % apart from a first one, and between which of them the answer lies."""

    def __init__(self, first: int) -> None:
        self.first = first
        self.fits: int | None = None  #: the highest place known to fit
        self.over: int | None = None  #: the lowest known not to

    def at(self, place: int) -> int:
        """The length at ``place``; the first one is at 0."""
        return max(1, round(self.first * STEP**place))

    def place(self, length: float) -> int:
        """Where ``length`` is, or the next lower place."""
        place = math.ceil(math.log(length / self.first, STEP))
        while self.at(place) > length:
            place -= 1
        return place

    def learn(self, place: int, fits: bool) -> None:
        """What was found at ``place``."""
        if fits:
            self.fits = place
        else:
            self.over = place

    def next(self, trials: Sequence[Trial], memory: int) -> int | None:
        """The place to try next, ``None`` when the answer is known."""
        fits, over = self.fits, self.over
        if over is not None and (self.at(over) <= LEAST or over - 1 == fits):
            return None
        known = max(trials, key=lambda t: t.length).length
        length = guess(trials, memory) or known * LEAP
        place = self.place(max(LEAST, length))
        if fits is not None:
            place = min(max(place, fits + 1), self.place(LEAP * self.at(fits)))
        return place if over is None else min(place, over - 1)


def guess(trials: Sequence[Trial], memory: int) -> float | None:
    """The length that needs ``memory``, by the power law through the two trials nearest to it.

    ``None`` where not one trial says what is needed.
    """
    points = [(t.length, t.needed) for t in trials if t.needed is not None]
    near = sorted(points, key=lambda point: abs(math.log(point[1] / memory)))[:2]
    if not near:
        return None
    (length, needed), power = near[0], 2.0
    if len(near) == 2:
        rise, run = math.log(near[1][1] / needed), math.log(near[1][0] / length)
        power = min(3.0, max(1.0, rise / run))
    return length * (memory / needed) ** (1 / power)


def measured(task: Task, way: str, length: int, memory: int) -> Trial:
    """Compile, run and measure one step."""
    with sides.planned_anew(), released():
        subject = task.build(length)
        before = tensor_bytes([subject.module, subject.inputs])
        seen = len(memcompile.reports())
        try:
            side = task.ways[way](subject, memory)
        except BudgetError as error:
            return Trial(length, error.floor, error.floor, False)
        total = before + side.peak().bytes
        report = next((r for r in memcompile.reports()[seen:] if r.name == LABEL), None)
        needed = total if report is None else report.floor
        return Trial(length, total, needed, total <= memory)


HEADS = (
    "subject", "way", "longest", "over Inductor's", "total MB there", "does not fit", "trials",
    "note",
)  # fmt: skip


def lines(found: Sequence[Longest]) -> list[list[str]]:
    """The table's rows, under :data:`HEADS`."""
    base = {f.subject: f.length for f in found if f.way == "Inductor"}
    rows = []
    for one in found:
        known = base.get(one.subject)
        over = f"{one.length / known:.2f}x" if one.length and known else ""
        rows.append(
            [
                one.subject,
                one.way,
                str(one.length or ""),
                over,
                mb(one.total),
                str(one.refused or ""),
                str(len(one.trials)),
                one.note,
            ]
        )
    return rows


def show(console: Console, found: Sequence[Longest]) -> None:
    """One line each; long notes wrap."""
    for row in lines(found):
        console.print("  ".join(cell for cell in row if cell), highlight=False, markup=False)


def markdown(where: Where, memory: int, found: Sequence[Longest]) -> str:
    """The table as a page."""
    head = [
        f"# Longest sequences, {where.date}, {where.name}, torch {where.torch}",
        "",
        f"Training steps within {memory / 2**20:g} MiB in all: parameters and inputs, and the "
        f"step peak as the allocator saw it. Lengths lie {STEP - 1:.0%} apart.",
        "",
    ]
    return "\n".join([*head, *grid(HEADS, lines(found))]) + "\n"
