"""Integers: whole numbers in the narrowest dtype that holds all they can be.

PyTorch's positions and indices are int64. What they can be is proved from the graph
(``memcompile.analysis.ranges``): a table of 30,000 rows is indexed with 16 bits.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import fx

from memcompile.analysis.ranges import Ranges
from memcompile.contract import Codec, Coding
from memcompile.step import Step

#: Narrowest first.
DTYPES = (torch.uint8, torch.int8, torch.int16, torch.int32)


class Integers(Codec):
    """Integers whose bounds the graph proves."""

    name: ClassVar[str] = "integers"

    def coding(self, value: fx.Node, step: Step) -> Coding | None:
        """Into the first dtype that holds both bounds and is narrower."""
        dtype = value.meta["val"].dtype
        if dtype.is_floating_point or dtype.is_complex or dtype is torch.bool:
            return None
        bounds = Ranges.of(step).bounds(value)
        if bounds is None:
            return None
        for narrow in DTYPES:
            limits = torch.iinfo(narrow)
            if limits.min <= bounds[0] and bounds[1] <= limits.max:
                return narrowed(dtype, narrow)
        return None


def narrowed(dtype: torch.dtype, narrow: torch.dtype) -> Coding | None:
    """Numbers of ``dtype`` kept as ``narrow``, which holds them all."""
    if narrow.itemsize >= dtype.itemsize:
        return None
    return Coding(
        encode=lambda x: x.to(narrow),
        decode=lambda stored: stored.to(dtype),
        bytes=lambda x: x.numel() * narrow.itemsize,
    )
