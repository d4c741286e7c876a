"""Groups: a value cut into runs of neighbours, each with a scale of its own.

A lossy codec divides a group by its largest magnitude, so that an outlier spoils one group and not
the whole value; cf. Chen et al., "ActNN: Reducing Training Memory Footprint via 2-Bit Activation
Compressed Training" (2021), §4.1. The scale is kept in 16 bits: rounded up to a bfloat16, which
adds at most 2^-7 to every bound and leaves no number above its scale.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch

from memcompile.step import hint

#: Scales lie between these; what is smaller is divided by the first.
LEAST = 2.0**-126
MOST = float(torch.finfo(torch.bfloat16).max)
#: How much rounding up to a bfloat16 can add to a scale.
UP = 1 + 2.0**-7
#: Bytes of one scale.
SCALE_BYTES = 2


@dataclasses.dataclass(frozen=True)
class Groups:
    """How one tensor is cut."""

    order: tuple[int, ...]  #: its dimensions as they lie in memory, outermost first
    size: int  #: elements of a group
    padded: bool  #: whether the last group may be short, and is filled up with zeros

    @classmethod
    def of(cls, tensor: torch.Tensor, size: int) -> Groups:
        """Groups of at most ``size`` elements, of more than half as many where that divides."""
        strides = [hint(stride) for stride in tensor.stride()]
        order = tuple(sorted(range(tensor.dim()), key=lambda dim: -strides[dim]))
        known = math.prod(n for n in tensor.shape if isinstance(n, int))
        whole = next((n for n in range(size, size // 2, -1) if known % n == 0), None)
        return cls(order, whole or size, whole is None)

    def count(self, tensor: torch.Tensor) -> Any:
        """How many groups there are."""
        return (tensor.numel() + self.size - 1) // self.size

    def turned(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor with its dimensions as they lie in memory."""
        return tensor.permute(self.order)

    def back(self, tensor: torch.Tensor) -> torch.Tensor:
        """What :meth:`turned` turned."""
        return tensor.permute([self.order.index(dim) for dim in range(len(self.order))])

    def cut(self, turned: torch.Tensor) -> torch.Tensor:
        """``turned`` as (groups, size)."""
        flat = turned.reshape(-1)
        if self.padded:
            flat = torch.cat([flat, flat.new_zeros(-flat.shape[0] % self.size)])
        return flat.view(-1, self.size)

    def mend(self, groups: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        """(groups, size) in the shape of the turned tensor ``like``."""
        flat = groups.reshape(-1)
        return (flat.narrow(0, 0, like.numel()) if self.padded else flat).view(like.shape)


def scales(groups: torch.Tensor) -> torch.Tensor:
    """The largest finite magnitude of each group, rounded up: (groups, size) -> (groups, 1).

    A float32 that is a bfloat16's number. Rounded on its bits: a cast there and back may be
    left out when kernels are fused.
    """
    magnitude = groups.abs()
    magnitude = torch.where(magnitude < math.inf, magnitude, 0.0)
    largest = magnitude.amax(1, keepdim=True).clamp(LEAST, MOST)
    return (largest.view(torch.int32) + 0xFFFF).bitwise_and(-0x10000).view(torch.float32)
