"""fp8: floats in eight bits, four of them the exponent, each group scaled.

The format is e4m3 of Micikevicius et al., "FP8 Formats for Deep Learning" (2022), §3. A group's
largest magnitude becomes 240, the end of a binade: the nearest number is at most 8 away. Small
numbers keep three bits of their mantissa down to 2^-6, so it suits values whose magnitudes differ.
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from memcompile_passes.compress.scaled import Packing, Scaled, cast, finite


class Fp8(Scaled):
    """Scaled floats of eight bits."""

    name: ClassVar[str] = "fp8"
    levels: ClassVar[float] = 240.0
    away: ClassVar[float] = 8.0
    keeps_signs: ClassVar[bool] = True

    def packing(self, turned: torch.Tensor) -> Packing:
        """A byte each."""
        return cast(torch.float8_e4m3fn)

    def quantised(self, x: torch.Tensor, share: torch.Tensor, signs: bool) -> torch.Tensor:
        """Rounded to the nearest by the cast."""
        codes = (share * self.levels).clamp(-self.levels, self.levels)
        if signs:
            codes = torch.where(codes.abs() < 2.0**-9, x.sign() * 2.0**-9, codes)
        return torch.where(finite(x), codes, math.nan)

    def shares(self, codes: torch.Tensor) -> torch.Tensor:
        """NaN stays NaN."""
        return codes.float() * (1 / self.levels)
