"""A third-party pass for memcompile: eight booleans in a byte.

PyTorch keeps a boolean in a whole byte, so the masks of dropout, of where and of ReLU
that wait for the backward are eight times as large as what they say (Jain et al.,
"Gist", 2018, §4).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import ClassVar

import torch

from memcompile import Context, Proposal, Proposer, Step, rebuild


@dataclasses.dataclass(frozen=True)
class PackBools(Proposer):
    """Offer to store boolean values of at least ``least`` elements as bits."""

    name: ClassVar[str] = "pack_bools"
    least: int = 64

    def propose(self, step: Step, context: Context) -> Iterable[Proposal]:
        """One proposal a mask whose last dimension is a whole number of bytes."""
        for value in step.early_values():
            mask = value.meta["val"]
            if isinstance(mask, torch.Tensor) and mask.dtype == torch.bool and mask.dim():
                whole = isinstance(mask.shape[-1], int) and mask.shape[-1] % 8 == 0
                if whole and step.bytes(value) >= self.least:
                    yield Proposal(value, "pack", rebuild(value, unpack, pack))


def pack(mask: torch.Tensor) -> torch.Tensor:
    """Eight booleans along the last dimension as the bits of one byte."""
    return (mask.unflatten(-1, (-1, 8)) * places(mask)).sum(-1, dtype=torch.uint8)


def unpack(packed: torch.Tensor) -> torch.Tensor:
    """What :func:`pack` packed."""
    return (packed.unsqueeze(-1) & places(packed)).ne(0).flatten(-2)


def places(like: torch.Tensor) -> torch.Tensor:
    """1, 2, 4 to 128: the bits of a byte."""
    return 2 ** torch.arange(8, dtype=torch.uint8, device=like.device)
