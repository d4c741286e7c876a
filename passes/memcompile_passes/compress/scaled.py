"""Scaled: what lossy codecs share. A group's scale in 16 bits, and a few bits for each number.

No number is stored unscaled. A number that is not finite comes back as NaN, and leaves the others
of its group alone.
"""

from __future__ import annotations

import abc
import math
from collections.abc import Callable
from typing import ClassVar, NamedTuple

import torch
from memcompile_passes.compress.groups import SCALE_BYTES, UP, Groups, scales
from memcompile_passes.compress.sensitive import Read, Readers
from torch import fx

from memcompile.contract import Codec, Coding, Exactness
from memcompile.step import Step

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Packing(NamedTuple):
    """How codes are stored: floats to what is stored, that to numbers, and the bytes of it."""

    pack: Callable[[torch.Tensor], tuple[torch.Tensor, ...]]
    unpack: Callable[..., torch.Tensor]
    bytes: Callable[[torch.Tensor], int]


class Scaled(Codec):
    """Floats divided by the scale of their group.

    Args:
        group: elements that share a scale, at most.
    """

    exactness: ClassVar[Exactness] = "no"
    levels: ClassVar[float]  #: the code of a group's largest number
    away: ClassVar[float]  #: how far from its code a number may be
    keeps_signs: ClassVar[bool] = False  #: whether it can keep the signs of all numbers

    def __init__(self, group: int = 64) -> None:
        if type(group) is not int or not 8 <= group <= 2**16:
            raise ValueError(f"group={group!r}; allowed: 8 to 65536 elements")
        self.group = group
        self.error = UP * self.away / self.levels

    def __repr__(self) -> str:
        return f"{type(self).__name__}(group={self.group})"

    def coding(self, value: fx.Node, step: Step) -> Coding | None:
        """Floats of 16 and 32 bits, unless only their signs are asked for, and are not kept."""
        tensor = value.meta["val"]
        if tensor.dtype not in DTYPES or not tensor.dim():
            return None
        signs = Readers.of(step).read(value) == Read.SIGN
        return self.coded(tensor, signs) if self.keeps_signs or not signs else None

    def coded(self, tensor: torch.Tensor, signs: bool = False) -> Coding:
        """How a tensor is stored; with ``signs`` none becomes zero or changes its sign."""
        groups = Groups.of(tensor, self.group)
        pack, unpack, size = self.packing(groups.turned(tensor))

        def encode(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
            turned = groups.turned(x)
            cut = groups.cut(turned).float()
            scale = scales(cut)
            codes = self.quantised(cut, cut / scale, signs)
            stored = scale.squeeze(1).to(torch.bfloat16)
            return (*pack(groups.mend(codes, turned)), stored)

        def decode(*stored: torch.Tensor) -> torch.Tensor:
            turned = unpack(*stored[:-1])
            shares = groups.cut(self.shares(turned))
            made = shares * stored[-1].float().unsqueeze(1)
            if signs:
                made = torch.where(shares == 0, 0.0, _at_least(made, shares, tensor.dtype))
            if tensor.dtype == torch.float16:  # a scale may be above its largest number
                made = made.clamp(-65504.0, 65504.0)
            return groups.back(groups.mend(made, turned).to(tensor.dtype))

        return Coding(encode, decode, lambda x: size(x) + SCALE_BYTES * groups.count(x))

    @abc.abstractmethod
    def packing(self, turned: torch.Tensor) -> Packing:
        """How codes, in the shape of ``turned``, are stored."""

    @abc.abstractmethod
    def quantised(self, x: torch.Tensor, share: torch.Tensor, signs: bool) -> torch.Tensor:
        """Codes, as floats, of ``x`` in float32; ``share`` is ``x`` over its scale."""

    @abc.abstractmethod
    def shares(self, codes: torch.Tensor) -> torch.Tensor:
        """What share of its scale each code stands for, in float32."""


def _at_least(made: torch.Tensor, shares: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """``made``, but no number so small that it is zero in ``dtype``."""
    least = 2.0**-24 if dtype == torch.float16 else 2.0**-126
    return torch.where(made.abs() < least, shares.sign() * least, made)


def cast(dtype: torch.dtype) -> Packing:
    """Codes in a dtype of one byte."""
    return Packing(lambda codes: (codes.to(dtype),), lambda stored: stored, lambda x: x.numel())


def finite(x: torch.Tensor) -> torch.Tensor:
    """Which numbers are; NaN compares as nothing."""
    return x.abs() < math.inf
