"""Whole: floats as whole numbers of eight, four or two bits, each group scaled.

With four bits and two, rounding is stochastic: up as likely as the number is near, so that the
mean is right, and gradients have no bias; cf. Chen et al., "ActNN" (2021), §3.1. The draw is no
draw: it is a hash of the number's bits, its place and a seed. Encoding again gives the same codes,
and no random stream is read.
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from memcompile_passes.compress.bits import Rows
from memcompile_passes.compress.scaled import Packing, Scaled, cast, finite


class Whole(Scaled):
    """Codes from ``-levels`` to ``levels``, and one below them for what is not finite.

    Args:
        group: elements that share a scale, at most.
        stochastic: whether rounding is; else it is to the nearest.
        seed: of the hash.
    """

    away: ClassVar[float] = 1.0  #: half of it to the nearest, but for numbers whose sign is kept

    def __init__(self, group: int = 64, stochastic: bool = True, seed: int = 0) -> None:
        super().__init__(group)
        self.stochastic, self.seed = stochastic, seed

    def quantised(self, x: torch.Tensor, share: torch.Tensor, signs: bool) -> torch.Tensor:
        """Rounded."""
        exact = share * self.levels
        codes = (exact + uniform(x, self.seed)).floor() if self.stochastic else exact.round()
        codes = codes.clamp(-self.levels, self.levels)
        if signs:
            codes = x.sign() * (x.sign() * codes).clamp_min(1.0)
        return torch.where(finite(x), codes, -self.levels - 1)

    def shares(self, codes: torch.Tensor) -> torch.Tensor:
        """NaN for the lowest code."""
        numbers = codes.float()
        return torch.where(numbers < -self.levels, math.nan, numbers * (1 / self.levels))


class Int8(Whole):
    """A byte each."""

    name: ClassVar[str] = "int8"
    levels: ClassVar[float] = 127.0
    keeps_signs: ClassVar[bool] = True

    def __init__(self, group: int = 64, stochastic: bool = False, seed: int = 0) -> None:
        super().__init__(group, stochastic, seed)

    def packing(self, turned: torch.Tensor) -> Packing:
        """A byte each."""
        return cast(torch.int8)


class Packed(Whole):
    """Several to a word."""

    width: ClassVar[int]

    def packing(self, turned: torch.Tensor) -> Packing:
        """Neighbours along the dimension that ``bits`` would take."""
        rows, zero = Rows.of(turned, self.width), self.levels + 1
        like = turned.new_empty(turned.shape, dtype=torch.float32)
        return Packing(
            lambda codes: rows.pack(codes + zero),
            lambda *stored: rows.unpack(*stored, like=like) - zero,
            lambda x: rows.bytes(turned),
        )


class Int4(Packed):
    """Half a byte each, from -7 to 7."""

    name: ClassVar[str] = "int4"
    levels: ClassVar[float] = 7.0
    width: ClassVar[int] = 4


class Int2(Packed):
    """A quarter of a byte each: minus one, zero, one."""

    name: ClassVar[str] = "int2"
    levels: ClassVar[float] = 1.0
    width: ClassVar[int] = 2


def uniform(x: torch.Tensor, seed: int) -> torch.Tensor:
    """A number from 0 to below 1 for each of ``x`` (groups, size), float32, by bits and place.

    The mixing is lowbias32 of C. Wellons, "Prospecting for Hash Functions" (2018), in 64 bits:
    no product is beyond them.
    """
    place = torch.arange(x.shape[0] * x.shape[1], device=x.device).view(x.shape)
    mixed = _mixed((place + seed * 0x9E3779B1).bitwise_and(0x7FFFFFFF))
    bits = x.view(torch.int32).to(torch.int64).bitwise_and(0xFFFFFFFF)
    return _mixed(mixed.bitwise_xor(bits)).bitwise_right_shift(8).float() * 2.0**-24


def _mixed(h: torch.Tensor) -> torch.Tensor:
    """32 bits, each hanging on all of those given."""
    h = h.bitwise_xor(h.bitwise_right_shift(16))
    h = (h * 0x21F0AAAD).bitwise_and(0xFFFFFFFF)
    h = h.bitwise_xor(h.bitwise_right_shift(15))
    h = (h * 0x735A2D97).bitwise_and(0xFFFFFFFF)
    return h.bitwise_xor(h.bitwise_right_shift(15))
