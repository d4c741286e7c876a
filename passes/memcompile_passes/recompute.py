"""Recompute: run a value's own op again instead of keeping the value.

The move of Chen et al., "Training Deep Nets with Sublinear Memory Cost" (2016), offered
value by value; which to take is the planner's choice.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import ClassVar

from memcompile.analysis.ops import runs_twice
from memcompile.contract import Context, Proposal, Proposer
from memcompile.step import Step, must_save


@dataclasses.dataclass(frozen=True)
class Recompute(Proposer):
    """Offer every early value that gives the same bits when its op runs twice."""

    name: ClassVar[str] = "recompute"

    def propose(self, step: Step, context: Context) -> Iterable[Proposal]:
        """One proposal a recomputable value; random draws and tagged values are left kept."""
        return [
            Proposal(value)
            for value in step.early_values()
            if runs_twice(value) and not must_save(value)
        ]
