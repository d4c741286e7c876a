"""What a careful user writes by hand: loops over chunks, each chunk under a checkpoint.

Only a chunk's inputs are saved; what is inside is computed again when its backward runs.
"""

from __future__ import annotations

import copy
import dataclasses

import torch
from layers import DistanceAttention, attend, nearness
from subjects import Subject, checkpointed, evoformer_example
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

QUERIES = 128  #: in a chunk of attention
ROWS = 16  #: in a chunk of the Evoformer's layers
UNROLLED = 16  #: at most so many chunks where the loop is compiled, which unrolls it


class QueryChunks(nn.Module):
    """Attention with a bias made of positions, ``size`` queries at a time."""

    def __init__(self, inner: DistanceAttention, size: int) -> None:
        super().__init__()
        self.inner, self.size = inner, size

    def some(self, q: Tensor, k: Tensor, v: Tensor, own: Tensor, positions: Tensor) -> Tensor:
        """Some queries ``q`` (H, Q, D) at the positions ``own`` (Q,)."""
        return attend(q, k, v, nearness(own, positions))

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        """As :class:`layers.DistanceAttention`."""
        q, k, v = self.inner.heads_of(x)
        parts = zip(q.split(self.size, dim=1), positions.split(self.size), strict=True)
        mixed = [
            checkpoint(self.some, queries, k, v, own, positions, use_reentrant=False)
            for queries, own in parts
        ]
        return self.inner.out(torch.cat(mixed, dim=1).transpose(0, 1).flatten(-2))


class RowChunks(nn.Module):
    """A layer that treats the rows of ``x`` apart, ``size`` rows at a time."""

    def __init__(self, inner: nn.Module, size: int) -> None:
        super().__init__()
        self.inner, self.size = inner, size

    def forward(self, x: Tensor, *others: Tensor) -> Tensor:
        """``x`` (rows, ...) is sliced, ``others`` are not."""
        parts = x.split(self.size)
        return torch.cat([checkpoint(self.inner, p, *others, use_reentrant=False) for p in parts])


class OuterProductChunks(nn.Module):
    """The Evoformer's outer product mean, ``size`` residues of its first factor at a time."""

    def __init__(self, inner: nn.Module, size: int) -> None:
        super().__init__()
        self.inner, self.size = inner, size

    def rows(self, left: Tensor, right: Tensor) -> Tensor:
        """``left`` (S, I, c), ``right`` (S, J, c) -> (I, J, c_z)."""
        outer = torch.einsum("sic,sjd->ijcd", left, right)
        return self.inner.out(outer.flatten(-2))

    def forward(self, m: Tensor) -> Tensor:
        """``m`` (S, R, c_m) -> (R, R, c_z)."""
        m = self.inner.norm(m)
        left, right = self.inner.left(m), self.inner.right(m) / m.shape[0]
        parts = left.split(self.size, dim=1)
        return torch.cat([checkpoint(self.rows, p, right, use_reentrant=False) for p in parts])


def attention_by_hand(subject: Subject, unrolled: bool) -> Subject:
    """``layers.distance_attention``, its queries in chunks; ``unrolled`` in no more than a few."""
    module = copy.deepcopy(subject.module)
    length = len(module.x)
    size = max(QUERIES, -(-length // UNROLLED)) if unrolled else QUERIES
    module.layer = QueryChunks(module.layer, size)
    return dataclasses.replace(subject, module=module, blocks=[module.layer])


def evoformer_by_hand(subject: Subject) -> Subject:
    """The Evoformer with all that is large in chunks, inside checkpointed blocks."""
    example = evoformer_example()
    module = copy.deepcopy(subject.module)
    for name, layer in list(module.named_modules()):
        if isinstance(layer, (example.GatedAttention, example.Transition)):
            module.set_submodule(name, RowChunks(layer, ROWS))
        elif isinstance(layer, example.OuterProductMean):
            module.set_submodule(name, OuterProductChunks(layer, ROWS))
    blocks = list(module.evoformer.blocks)
    return checkpointed(dataclasses.replace(subject, module=module, blocks=blocks))
