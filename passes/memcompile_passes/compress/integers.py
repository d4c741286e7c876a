"""Integers: whole numbers in the narrowest dtype that holds all they can be.

PyTorch's positions and indices are int64. What they can be is proved from the graph
(``memcompile.analysis.ranges``): a table of 30,000 rows is indexed with 16 bits. What is not
proved can be checked while the step runs, where the user says what to expect.
"""

from __future__ import annotations

import dataclasses
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
        narrow = _proved(value, step) if _is_whole(dtype) else None
        return narrowed(dtype, narrow) if narrow is not None else None


@dataclasses.dataclass(frozen=True)
class Checked(Codec):
    """Integers of which the user says that they fit: checked as they are packed.

    The check is part of the step and waits for nothing: numbers that do not fit end the step
    with an error (on a GPU by a device assertion), they are never wrapped round.
    """

    fits: torch.dtype
    name: ClassVar[str] = "checked"

    def coding(self, value: fx.Node, step: Step) -> Coding | None:
        """Into the dtype the user has named, unless the graph proves that no check is needed."""
        dtype = value.meta["val"].dtype
        found = narrowed(dtype, self.fits) if _is_whole(dtype) else None
        if found is None or _proved(value, step) is not None:
            return None
        limits = torch.iinfo(self.fits)
        said = f"node {value.name} does not fit {str(self.fits).removeprefix('torch.')}: leave out "
        said += f"compress{{fits={str(self.fits).removeprefix('torch.')}}}, or name a wider dtype"

        def encode(x: torch.Tensor) -> torch.Tensor:
            inside = ((x >= limits.min) & (x <= limits.max)).all()
            torch.ops.aten._assert_async.msg(inside, said)
            return x.to(self.fits)

        return dataclasses.replace(found, encode=encode)


def _is_whole(dtype: torch.dtype) -> bool:
    return not (dtype.is_floating_point or dtype.is_complex or dtype is torch.bool)


def _proved(value: fx.Node, step: Step) -> torch.dtype | None:
    """The narrowest dtype that the graph shows to hold all a value can be."""
    bounds = Ranges.of(step).bounds(value)
    if bounds is None:
        return None
    for narrow in DTYPES:
        limits = torch.iinfo(narrow)
        if limits.min <= bounds[0] and bounds[1] <= limits.max:
            return narrow
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
