"""What the benchmark finds out, as plain data. Bytes are step peaks unless named otherwise."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Sequence
from typing import Literal

Kind = Literal["eager", "inductor", "peer", "free", "min", "share", "budget", "level"]


@dataclasses.dataclass(frozen=True)
class Ratio:
    """Step times of one side over another's, from alternated pairs."""

    median: float
    low: float  #: first quartile
    high: float  #: third quartile
    pairs: int
    seconds: float  #: median step of the first side

    @classmethod
    def of(cls, ours: Sequence[float], theirs: Sequence[float]) -> Ratio:
        """Pair by pair."""
        ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
        return cls(middle, low, high, len(ratios), statistics.median(ours))

    @property
    def margin(self) -> float:
        """Half the width of the median's 95 % interval (McGill's notch)."""
        return 1.57 * (self.high - self.low) / math.sqrt(self.pairs)

    def __str__(self) -> str:
        return f"{self.median:.3f} [{self.low:.2f}–{self.high:.2f}]"


@dataclasses.dataclass
class Numbers:
    """How a side's loss and gradients compare with Inductor's, same seed and inputs."""

    loss_equal: bool  #: bit for bit
    loss_difference: float  #: over Inductor's
    difference: float  #: norm of the gradients' difference over the norm of Inductor's
    error: float | None = None  #: error against float64 over Inductor's own, all parameters
    relative: float | None = None  #: error against float64 over the gradients' norm
    worst: float | None = None  #: the same as ``error``, for the worst of the parameters judged
    worst_name: str = ""
    unjudged: tuple[str, ...] = ()  #: gradients under 1e-4 of the largest


@dataclasses.dataclass
class Row:
    """One way of running the subject's step."""

    label: str
    kind: Kind
    budget: int | None = None
    peak: int | None = None  #: measured; None where it did not run
    reserved: int | None = None  #: CUDA: most bytes the caching allocator held
    predicted: int | None = None
    lowered: int | None = None
    floor: int | None = None  #: of the BudgetError, where one was raised
    added: float | None = None  #: predicted seconds on top of Inductor's
    planning: float | None = None  #: seconds
    compiling: float | None = None  #: seconds of the first step, no kernel on disk
    loops: int | None = None
    schedulings: int | None = None
    moves: int | None = None
    time: Ratio | None = None  #: over Inductor's
    numbers: Numbers | None = None
    note: str = ""
    refused: bool = False  #: a BudgetError
    failed: bool = False  #: any other error
    passes: str = ""  #: as the user names them; "" stands for the defaults

    @property
    def lowered_error(self) -> float | None:
        if self.lowered is None or not self.peak:
            return None
        return self.lowered / self.peak - 1


@dataclasses.dataclass
class Duel:
    """A peer, and ours at a budget equal to the peak that the peer reaches."""

    peer: str
    ours: str
    time: Ratio | None  #: ours over the peer's; None where ours did not run


@dataclasses.dataclass
class Found:
    """All of one subject."""

    subject: str
    scale: str
    random: bool  #: its loss depends on the seed
    before: int = 0  #: bytes of parameters, buffers and inputs
    noise: Ratio | None = None  #: Inductor over a second copy of itself
    rows: list[Row] = dataclasses.field(default_factory=list)
    duels: list[Duel] = dataclasses.field(default_factory=list)

    def row(self, label: str) -> Row:
        return next(row for row in self.rows if row.label == label)

    def of_kind(self, *kinds: Kind) -> list[Row]:
        return [row for row in self.rows if row.kind in kinds]

    @property
    def inductor(self) -> Row:
        return self.of_kind("inductor")[0]

    @property
    def noise_margin(self) -> float:
        """How far a time ratio may be from the truth: noise seen on equal sides."""
        return abs(self.noise.median - 1) + self.noise.margin if self.noise else 0.0


@dataclasses.dataclass(frozen=True)
class Where:
    """The place a run happened in."""

    device: str
    name: str
    torch: str
    threads: int
    date: str
