"""Bits: eight booleans in a byte, sixteen numbers below four in four, or eight below sixteen.

PyTorch keeps a boolean in a whole byte. Masks as bits: Jain et al., "Gist: Efficient Data
Encoding for Deep Neural Network Training" (2018), §4.

A word holds neighbours along one dimension, the outermost in memory that words divide: the same
place in eight rows, or sixteen. So rows are read and written as they lie in memory, and those that
share their words one after the other. Where they divide none a word is a byte, of fewer neighbours.

Numbers are moved in the dtypes that CPUs have vectors of: as floats into bytes, else as int32.
Inductor's C++ shifts bytes, and makes bytes of masks, far slower.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import ClassVar

import torch
from torch import fx
from torch.nn.functional import pad

from memcompile.analysis.ranges import Ranges
from memcompile.contract import Codec, Coding
from memcompile.step import Step, hint

#: Bits of one number.
WIDTHS = (1, 2, 4)


class Bits(Codec):
    """Booleans, and integers that the graph proves to be small and not below zero."""

    name: ClassVar[str] = "bits"

    def coding(self, value: fx.Node, step: Step) -> Coding | None:
        """Whatever has a bound below sixteen."""
        tensor = value.meta["val"]
        if tensor.dtype.is_floating_point or tensor.dtype.is_complex or not tensor.dim():
            return None
        bounds = Ranges.of(step).bounds(value)
        if bounds is None or bounds[0] < 0:
            return None
        width = next((w for w in WIDTHS if bounds[1] < 2**w), None)
        return None if width is None else coded(tensor, width)


def coded(tensor: torch.Tensor, width: int) -> Coding:
    """Numbers of ``width`` bits, along the dimension that wastes least."""
    rows = Rows.of(tensor, width)
    return Coding(rows.pack, functools.partial(rows.unpack, like=tensor), rows.bytes)


#: The bits of a word, by those of its numbers: such that so many rows are added up in a loop.
WORDS = {1: 8, 2: 32, 4: 32}


@dataclasses.dataclass(frozen=True)
class Rows:
    """How neighbours share a word."""

    dim: int  #: along which they are
    count: int  #: of them in a word
    width: int  #: bits of each

    @classmethod
    def of(cls, tensor: torch.Tensor, width: int) -> Rows:
        """Along the outermost dimension in memory that words divide; else what wastes least."""
        outer = sorted(range(tensor.dim()), key=lambda dim: -hint(tensor.stride(dim)))
        known = [d for d in outer if isinstance(tensor.shape[d], int)]
        for count in (WORDS[width] // width, 8 // width):
            for dim in known:
                if tensor.shape[dim] and tensor.shape[dim] % count == 0:
                    return cls(dim, count, width)
        return cls(max(known or outer, key=lambda d: hint(tensor.shape[d])), 8 // width, width)

    @property
    def dtype(self) -> torch.dtype:
        """That of a word."""
        return torch.uint8 if self.count * self.width == 8 else torch.int32

    def bytes(self, x: torch.Tensor) -> int:
        """What ``x`` takes packed."""
        words = (x.shape[self.dim] + self.count - 1) // self.count
        return x.numel() // x.shape[self.dim] * words * self.dtype.itemsize

    def pack(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """``x`` in words.

        A symbolic length is stored as that of a tensor without elements.
        """
        dim, count, length = self.dim, self.count, x.shape[self.dim]
        short, numbers = (length + count - 1) // count, x
        if not isinstance(length, int):
            more = [short * count - length if d == dim else n for d, n in enumerate(x.shape)]
            numbers = torch.cat([x.to(torch.uint8), x.new_zeros(more, dtype=torch.uint8)], dim)
        elif length % count:
            rest = [0, 0] * (x.dim() - dim - 1) + [0, short * count - length]
            numbers = pad(x.to(torch.uint8), rest)
        apart = numbers.unflatten(dim, (short, count))
        if self.dtype is torch.uint8:
            moved = apart.float() * torch.bitwise_left_shift(1, self.places(x)).float()
            packed = moved.to(torch.uint8).sum(dim + 1, dtype=torch.uint8)
        else:
            moved = apart.int().bitwise_left_shift(self.places(x))
            packed = moved.sum(dim + 1, dtype=torch.int32)
        return (packed,) if isinstance(length, int) else (packed, x.new_empty((length, 0)))

    def unpack(
        self, packed: torch.Tensor, *lengths: torch.Tensor, like: torch.Tensor
    ) -> torch.Tensor:
        """What :meth:`pack` packed, in the dtype of ``like``."""
        moved = packed.unsqueeze(self.dim + 1).int().bitwise_right_shift(self.places(packed))
        numbers = moved.bitwise_and(2**self.width - 1).flatten(self.dim, self.dim + 1)
        length = lengths[0].shape[0] if lengths else like.shape[self.dim]
        if not isinstance(length, int) or length % self.count:
            numbers = numbers.narrow(self.dim, 0, length)
        return numbers.to(like.dtype)

    def places(self, like: torch.Tensor) -> torch.Tensor:
        """How far neighbours are moved up in their word."""
        shifts = self.width * torch.arange(self.count, dtype=torch.int32, device=like.device)
        return shifts.view(-1, *[1] * (like.dim() - 1 - self.dim))
