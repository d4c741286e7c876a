"""Bits: eight booleans in a byte, four numbers below four, or two below sixteen.

PyTorch keeps a boolean in a whole byte. Masks as bits: Jain et al., "Gist: Efficient Data
Encoding for Deep Neural Network Training" (2018), §4.

A byte holds neighbours along one dimension, the outermost in memory that eight divides: the same
place in eight rows. So rows are read and written as they lie in memory, and eight that share their
bytes one after the other.

Numbers are moved in the dtypes that CPUs have vectors of: as floats on the way in, as int32 on
the way out. Inductor's C++ shifts bytes, and makes bytes of masks, far slower.
"""

from __future__ import annotations

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
    count, dim = 8 // width, row_dim(tensor, 8 // width)
    return Coding(
        encode=functools.partial(pack, dim=dim, width=width),
        decode=functools.partial(unpack, dim=dim, width=width, like=tensor),
        bytes=lambda x: x.numel() // x.shape[dim] * ((x.shape[dim] + count - 1) // count),
    )


def row_dim(tensor: torch.Tensor, count: int) -> int:
    """The outermost dimension in memory that ``count`` divides, else the longest known one."""
    outer = sorted(range(tensor.dim()), key=lambda dim: -hint(tensor.stride(dim)))
    whole = [d for d in outer if isinstance(n := tensor.shape[d], int) and n and n % count == 0]
    known = [d for d in outer if isinstance(tensor.shape[d], int)]
    return next(iter(whole), max(known or outer, key=lambda d: hint(tensor.shape[d])))


def pack(x: torch.Tensor, dim: int, width: int) -> tuple[torch.Tensor, ...]:
    """``x`` with ``8 / width`` neighbours along dimension ``dim`` in one byte.

    A symbolic length is stored as that of a tensor without elements.
    """
    count, length = 8 // width, x.shape[dim]
    short, numbers = (length + count - 1) // count, x
    if not isinstance(length, int):
        more = [short * count - length if d == dim else n for d, n in enumerate(x.shape)]
        numbers = torch.cat([x.to(torch.uint8), x.new_zeros(more, dtype=torch.uint8)], dim)
    elif length % count:
        rest = [0, 0] * (x.dim() - dim - 1) + [0, short * count - length]
        numbers = pad(x.to(torch.uint8), rest)
    weights = torch.bitwise_left_shift(1, places(x, dim, width)).float()
    moved = numbers.unflatten(dim, (short, count)).float() * weights
    packed = moved.to(torch.uint8).sum(dim + 1, dtype=torch.uint8)
    return (packed,) if isinstance(length, int) else (packed, x.new_empty((length, 0)))


def unpack(
    packed: torch.Tensor, *lengths: torch.Tensor, dim: int, width: int, like: torch.Tensor
) -> torch.Tensor:
    """What :func:`pack` packed, in the dtype of ``like``."""
    moved = packed.unsqueeze(dim + 1).int().bitwise_right_shift(places(packed, dim, width))
    numbers = moved.bitwise_and(2**width - 1).flatten(dim, dim + 1)
    length = lengths[0].shape[0] if lengths else like.shape[dim]
    if not isinstance(length, int) or length % (8 // width):
        numbers = numbers.narrow(dim, 0, length)
    return numbers.to(like.dtype)


def places(like: torch.Tensor, dim: int, width: int) -> torch.Tensor:
    """How far neighbours along ``dim`` are moved up in their byte."""
    shifts = width * torch.arange(8 // width, dtype=torch.int32, device=like.device)
    return shifts.view(-1, *[1] * (like.dim() - 1 - dim))
