"""Chunk: run a region around a large value as a loop over one of its dimensions.

Neither the value nor what hangs on it, forward or backward, is ever whole. Cf. AutoChunk
(Zhao et al. 2024), for inference; the backward is looped here too.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import ClassVar

import torch

from memcompile.contract import Context, Exactness, Loop, Proposer
from memcompile.step import Step

#: Chunk counts offered, as far as ``max_chunks`` goes.
COUNTS = (4, 12, 64)


@dataclasses.dataclass(frozen=True)
class Chunk(Proposer):
    """Offer loops over every dimension of every value that owns memory."""

    name: ClassVar[str] = "chunk"
    by_default: ClassVar[bool] = False

    max_chunks: int = 64  #: at most so many trips
    least: float = 0.02  #: only values of at least this share of the largest one's bytes

    @property
    def exactness(self) -> Exactness:
        """Sums over the chunked dimension are added in another order."""
        return "rounding"

    def propose(self, step: Step, context: Context) -> Iterable[Loop]:
        """Every dimension long enough, with several chunk counts."""
        values = [
            n
            for n in step.nodes
            if n.op == "call_function" and isinstance(n.meta.get("val"), torch.Tensor)
        ]
        largest = max((step.bytes(n) for n in values), default=0)
        for value in values:
            if step.roots[value] is not value or step.bytes(value) < self.least * largest:
                continue
            for dim, length in enumerate(value.meta["val"].shape):
                for chunks in COUNTS:
                    if isinstance(length, int) and chunks <= min(length, self.max_chunks):
                        yield Loop(value, dim, chunks)
