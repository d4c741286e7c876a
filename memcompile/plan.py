"""A plan, and the step drafted under it.

A plan is a set of *kept* roots (early values stored for the backward) plus the
rebuilds chosen for some others; every early value that a late reader needs and
that is neither is computed again, as late as possible.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping

from torch import fx

from memcompile.analysis.timeline import Timeline
from memcompile.contract import Proposal


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is kept from forward to backward, and what is rebuilt in another way."""

    kept: frozenset[fx.Node]
    rebuilt: Mapping[fx.Node, Proposal] = dataclasses.field(default_factory=dict)

    def key(self) -> tuple[frozenset[fx.Node], frozenset[tuple[fx.Node, int]]]:
        """Equal plans have equal keys."""
        moves = frozenset((v, id(p.rebuild)) for v, p in self.rebuilt.items())
        return self.kept, moves

    def keeping(self, values: Collection[fx.Node]) -> Plan:
        """The plan with more values kept."""
        rebuilt = {v: p for v, p in self.rebuilt.items() if v not in values}
        return Plan(self.kept | frozenset(values), rebuilt)


@dataclasses.dataclass(slots=True)
class Late:
    """One node of the backward: the step's own, or a copy of an early one."""

    node: fx.Node
    copy: bool


@dataclasses.dataclass(frozen=True, slots=True)
class Stay:
    """What one move stores on the host, and when it is copied there and back."""

    move: Proposal
    bytes: int  #: copied each way
    landed: fx.Node  #: the early node after which the copy out is waited for
    begins: int  #: before which item of the backward's order the copy back begins
    stalled: float  #: seconds that kernels wait for its copies


@dataclasses.dataclass(frozen=True, slots=True)
class Link:
    """Seconds of all copies between device and host, in both directions."""

    busy: float = 0.0  #: that the link copies
    stalled: float = 0.0  #: that kernels wait for it


@dataclasses.dataclass
class Drafted:
    """A draft under one plan: what runs, what it costs."""

    plan: Plan
    forward: Timeline
    backward: Timeline
    saved: list[fx.Node]  #: early roots stored for the backward
    stored: list[fx.Node]  #: encoded outputs stored on the device (rebuild graphs' nodes)
    early: list[fx.Node]  #: the forward's order, views and unneeded nodes included
    late: list[Late | Proposal]  #: the backward's order, views left out
    seconds: float
    stays: tuple[Stay, ...] = ()  #: on the host, in the order of the copies back
    link: Link = Link()

    @property
    def hosted(self) -> int:
        """Bytes on the host between forward and backward."""
        return sum(stay.bytes for stay in self.stays)

    @property
    def peak(self) -> int:
        """Bytes, what lives before the step included."""
        return max(self.forward.peak, self.backward.peak)

    @property
    def copies(self) -> list[fx.Node]:
        """The early nodes that run again."""
        return [item.node for item in self.late if isinstance(item, Late) and item.copy]
