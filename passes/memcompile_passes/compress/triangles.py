"""Triangles: pair tensors of which one half says all.

A value is symmetric in two dimensions (``symmetric.py``), or nothing but zero on one side of its
diagonal (``zeros.py``). One triangle is kept, folded into a rectangle: a row from the top beside
one from the bottom.

Bits must be equal, so it is for the CPU alone: elsewhere a product and a sum may round once, and
``a*b + c*d`` is no longer symmetric.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from memcompile_passes.compress.symmetric import is_symmetric
from memcompile_passes.compress.zeros import weights_side, zero_side
from torch import fx

from memcompile.contract import Codec, Coding
from memcompile.step import Step


class Triangles(Codec):
    """Symmetric tensors and triangular ones."""

    name: ClassVar[str] = "triangles"

    def coding(self, value: fx.Node, step: Step) -> Coding | None:
        """One triangle, where two dimensions of one length have one; of masks, see ``bits``."""
        tensor = value.meta["val"]
        if tensor.device.type != "cpu" or tensor.dim() < 2 or tensor.dtype is torch.bool:
            return None
        shape = tensor.shape
        for one in range(tensor.dim()):
            for two in range(one + 1, tensor.dim()):
                if type(shape[one]) is not int or shape[one] != shape[two] or shape[one] < 3:
                    continue
                if is_symmetric(value, one, two):
                    return folded(tensor, one, two, "both")
                if two != tensor.dim() - 1 or one != two - 1:
                    continue
                if side := zero_side(value):
                    return folded(tensor, one, two, side)
                if side := weights_side(value):
                    return folded(tensor, one, two, side, nan=True)
        return None


def folded(tensor: torch.Tensor, one: int, two: int, side: str, nan: bool = False) -> Coding:
    """The lower triangle of dimensions ``one`` and ``two``; ``side`` "upper": the upper one.

    Beyond it stands the same transposed ("both"), or zero; with ``nan``, NaN in the rows of NaN.
    """
    n = tensor.shape[one]
    half = (n + 1) // 2
    turn = (two, one) if side == "upper" else (one, two)

    def encode(x: torch.Tensor) -> torch.Tensor:
        rows, columns = _grid(half, n + 1, x.device)
        top = columns <= rows
        row = torch.where(top, rows, n - 1 - rows)
        column = torch.where(top, columns, columns - rows - 1)
        return x.movedim(turn, (0, 1))[row, column]

    def decode(stored: torch.Tensor) -> torch.Tensor:
        rows, columns = _grid(n, n, stored.device)
        high, low = torch.maximum(rows, columns), torch.minimum(rows, columns)
        top = high < half
        row = torch.where(top, high, n - 1 - high)
        whole = stored[row, torch.where(top, low, low + n - high)]
        if side != "both":
            inside = (columns <= rows).view(n, n, *[1] * (whole.dim() - 2))
            whole = torch.where(inside, whole, diagonal(stored, rows) * 0 if nan else 0)
        return whole.movedim((0, 1), turn)

    def diagonal(stored: torch.Tensor, lines: torch.Tensor) -> torch.Tensor:
        """At every place what the row of the whole has on its diagonal."""
        if side == "upper":
            lines = lines.mT
        top = lines < half
        return stored[torch.where(top, lines, n - 1 - lines), torch.where(top, lines, n)]

    return Coding(encode, decode, lambda x: x.nbytes // (n * n) * (half * (n + 1)))


def _grid(rows: int, columns: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Every place's row and column."""
    return (
        torch.arange(rows, device=device)[:, None].expand(rows, columns),
        torch.arange(columns, device=device)[None].expand(rows, columns),
    )
