"""The report of one compiled graph, as plain data.

Everything here is JSON-able and holds no tensor and no graph, so a report can be
stored beside torch's cache entry and read by a second process. Bytes are ``int``,
seconds ``float``. How a report looks is :mod:`memcompile.show`'s business.
"""

from __future__ import annotations

import dataclasses
import json
from typing import Any

#: What a byte is alive for, in the order a picture stacks them.
KINDS = ("parameters", "inputs", "saved", "temporaries", "gradients", "outputs")


@dataclasses.dataclass(frozen=True)
class ValueRow:
    """One value: a tensor a node of the step produces."""

    name: str
    op: str
    source: str  #: "model.py:41 in forward", or "" when unknown
    shape: tuple[int | str, ...]
    dtype: str
    bytes: int
    kind: str  #: one of :data:`KINDS`


@dataclasses.dataclass(frozen=True)
class MoveRow:
    """One move of the plan: ``value`` is rebuilt late instead of kept."""

    by: str  #: the pass that offered it, as a pipeline spells it
    value: str
    how: str  #: "recompute", "keep", or the name a pass gave its rebuild
    source: str
    bytes: int  #: bytes the value would have kept from forward to backward
    seconds: float  #: predicted seconds added to the step (negative: saved)
    offered: tuple[tuple[str, float], ...] = ()  #: the ways there were, and likely seconds


@dataclasses.dataclass(frozen=True)
class StayRow:
    """What one value leaves on the host from the forward to the backward."""

    value: str
    how: str  #: as in its move
    source: str
    bytes: int  #: copied each way
    landed: str  #: the forward's node after which its copy is over, or waited for
    begins: str  #: the backward's node before which the copy back begins
    seconds: float  #: that kernels wait for its copies


@dataclasses.dataclass(frozen=True)
class LoopRow:
    """One region of the step that runs as loops."""

    by: str  #: the pass that offered it, as a pipeline spells it
    value: str  #: the value it grew from, never whole
    source: str
    dim: int  #: of ``value``, the dimension that is sliced
    length: int  #: of the region's shortest sliced dimension
    chunks: int
    nodes: int  #: ops inside, forward and backward
    bytes: int  #: of ``value``, were it whole
    peak_before: int  #: predicted total bytes of the least-peak plan without this loop
    peak_after: int  #: and with it
    at: tuple[str, ...] = ()  #: the nodes of the planned graph that are its loops


@dataclasses.dataclass(frozen=True)
class Point:
    """The bytes alive while one node runs."""

    node: str
    source: str
    side: str  #: "forward" or "backward"
    live: dict[str, int]  #: bytes by kind; absent kinds are zero
    largest: tuple[tuple[str, int], ...] = ()  #: names and bytes of the largest values alive

    @property
    def bytes(self) -> int:
        return sum(self.live.values())


@dataclasses.dataclass(frozen=True)
class Ran:
    """What one pass did to this graph."""

    by: str
    exactness: str
    changed: bool
    note: str = ""  #: why it left the graph alone, or how many moves it offered


@dataclasses.dataclass
class Report:
    """What was done to one graph, and what that costs.

    Peaks are totals in bytes, what lives before the step (``before``) included;
    subtract ``before`` for the *step peak*.
    """

    name: str
    index: int
    kind: str  #: "training", "inference"
    torch: str
    device: str
    lower: str  #: "inductor" or "eager"
    budget: int | None  #: total bytes, the reserve already taken off
    budget_text: str  #: as the user wrote it
    reserve: int
    before: int  #: parameters, buffers and inputs
    floor: int | None  #: least predicted peak found
    inductor: int | None  #: lowered peak of Inductor's own split
    predicted: int  #: the draft's peak of the plan
    lowered: int | None  #: the lowered peak of the plan
    measured: int | None = None  #: total bytes; the caller's to set, from ``measure_peak``
    seconds: float = 0.0  #: predicted seconds added to Inductor's step
    step_seconds: float = 0.0  #: predicted seconds of Inductor's step
    peak_expression: str = ""  #: symbolic predicted peak, e.g. "48*s0**2 + 1024"
    symbols: dict[str, int] = dataclasses.field(default_factory=dict)  #: as traced
    moves: tuple[MoveRow, ...] = ()
    loops: tuple[LoopRow, ...] = ()  #: regions that run chunk by chunk
    stays: tuple[StayRow, ...] = ()  #: what lies on the host from forward to backward
    host: int = 0  #: their bytes, of the host's memory
    link_seconds: float = 0.0  #: predicted seconds of their copies, both ways
    passes: tuple[Ran, ...] = ()
    largest: tuple[ValueRow, ...] = ()
    timeline_before: tuple[Point, ...] = ()
    timeline_after: tuple[Point, ...] = ()
    graph_before: str = ""  #: the joint graph, as readable text
    forward: str = ""
    backward: str = ""
    outside: tuple[str, ...] = ()  #: what the promise does not cover
    notes: tuple[str, ...] = ()
    held_before: int = 0  #: held by earlier graphs of the same step (graph breaks)
    held_after: int = 0  #: alive between forward and backward, inputs included
    planning_seconds: float = 0.0  #: dry runs of Inductor not included
    lowering_seconds: float = 0.0  #: those dry runs
    schedulings: int = 0
    fidelity: str = ""  #: of passes that may change numbers: what is known of the error
    cached: bool = False  #: read back from disk rather than planned in this process

    def to_json(self) -> str:
        """The report as JSON text; :meth:`from_json` reads it back."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Report:
        """Read what :meth:`to_json` wrote. Raises ``ValueError`` on anything else."""
        try:
            data: dict[str, Any] = json.loads(text)
            data["moves"] = tuple(
                MoveRow(**{**row, "offered": tuple((h, s) for h, s in row["offered"])})
                for row in data["moves"]
            )
            data["loops"] = tuple(
                LoopRow(**{**row, "at": tuple(row["at"])}) for row in data["loops"]
            )
            data["stays"] = tuple(StayRow(**row) for row in data["stays"])
            data["passes"] = tuple(Ran(**row) for row in data["passes"])
            data["largest"] = tuple(
                ValueRow(**{**row, "shape": tuple(row["shape"])}) for row in data["largest"]
            )
            for key in ("timeline_before", "timeline_after"):
                data[key] = tuple(
                    Point(**{**row, "largest": tuple((n, b) for n, b in row["largest"])})
                    for row in data[key]
                )
            for key in ("outside", "notes"):
                data[key] = tuple(data[key])
            return cls(**data)
        except (TypeError, KeyError, json.JSONDecodeError) as error:
            raise ValueError(f"not a memcompile report: {error}") from error

    def __str__(self) -> str:
        from memcompile.show import text

        return text(self)

    def html(self, path: str) -> None:
        """Write the standalone picture of the timeline, before and after, to ``path``."""
        from memcompile.show import html

        with open(path, "w", encoding="utf-8") as file:
            file.write(html(self))
