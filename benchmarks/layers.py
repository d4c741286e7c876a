"""Single layers with something large inside: what loops over chunks are judged by.

``LAYERS[name](scale)`` builds a :class:`~subjects.Subject`, as ``subjects.SUBJECTS`` does.
Each layer stands as it would inside a network: what it reads has a gradient, and a gradient
comes in from above. Attention is plain torch, with its logits.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from subjects import Scale, Subject, esmfold, evoformer, evoformer_example
from torch import Tensor, nn


class Within(nn.Module):
    """A layer between others: ``x`` is a parameter, so that its gradient is taken."""

    def __init__(self, layer: nn.Module, x: Tensor, residual: bool) -> None:
        super().__init__()
        self.layer, self.residual = layer, residual
        self.x = nn.Parameter(x)

    def forward(self, gradient: Tensor, *others: Tensor) -> Tensor:
        """``gradient``, in the output's shape, comes in from above; ``others`` go to the layer."""
        y = self.layer(self.x, *others)
        if self.residual:
            y = self.x + y
        return (y * gradient).sum().float()


class Attention(nn.Module):
    """Self-attention over ``x`` (L, c) with an additive ``bias`` (L, L)."""

    def __init__(self, c: int, heads: int) -> None:
        super().__init__()
        self.heads, self.scale = heads, (c // heads) ** -0.5
        self.qkv, self.out = nn.Linear(c, 3 * c), nn.Linear(c, c)

    def heads_of(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, each (heads, L, c / heads)."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(1, 2, 0, 3)
        return q * self.scale, k, v

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        """``x`` (L, c), ``bias`` (L, L) -> (L, c); the logits are (heads, L, L)."""
        q, k, v = self.heads_of(x)
        mixed = attend(q, k, v, bias)
        return self.out(mixed.transpose(0, 1).flatten(-2))


class DistanceAttention(Attention):
    """Self-attention whose bias falls with the distance along the sequence.

    ALiBi (Press et al. 2022, §3) with a slope of one: it has no input of L squared elements.
    """

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        """``x`` (L, c), ``positions`` (L,) -> (L, c)."""
        return super().forward(x, nearness(positions, positions))


def nearness(some: Tensor, others: Tensor) -> Tensor:
    """The bias between positions: ``some`` (Q,), ``others`` (K,) -> (Q, K)."""
    return -(some[:, None] - others).abs()


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """``q`` (H, Q, D), ``k`` and ``v`` (H, K, D), ``bias`` (Q, K) -> (H, Q, D)."""
    return (q @ k.transpose(-1, -2) + bias).softmax(-1) @ v


class Vocabulary(nn.Module):
    """A language model's head and its loss: ``x`` (tokens, width) is a parameter."""

    def __init__(self, tokens: int, words: int, width: int) -> None:
        super().__init__()
        self.x = nn.Parameter(torch.randn(tokens, width))
        self.head = nn.Linear(width, words, bias=False)

    def forward(self, labels: Tensor) -> Tensor:
        """``labels`` (tokens,), int64 -> the mean loss; the logits are (tokens, words)."""
        return F.cross_entropy(self.head(self.x).float(), labels)


class Folding(nn.Module):
    """ESMFold's blocks without a loss."""

    def __init__(self, blocks: nn.ModuleList) -> None:
        super().__init__()
        self.blocks = blocks

    def forward(self, sequence: Tensor, pair: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """``sequence`` (B, L, c_s), ``pair`` (B, L, L, c_z), ``mask`` (B, L) -> the first two."""
        for block in self.blocks:
            sequence, pair = block(sequence, pair, mask=mask)
        return sequence, pair


def within(name: str, make: Callable[[], nn.Module], shape: tuple[int, ...]) -> Subject:
    """The residual layer that ``make`` builds on a tensor of ``shape``."""
    torch.manual_seed(0)
    module = Within(make(), torch.randn(shape), residual=True)
    evoformer_example().perturb_zeros_(module, 0.02)
    return Subject(name, module, (torch.randn(shape),), [module.layer])


def triangle(scale: Scale = "default") -> Subject:
    """Triangle attention (AlphaFold 2, algorithm 13), N = 192, c = 64, 4 heads."""
    length, c, heads = (192, 64, 4) if scale == "default" else (16, 8, 2)
    layer = functools.partial(
        evoformer_example().TriangleAttention, c, heads, c // heads, starting=True
    )
    return within("triangle attention", layer, (length, length, c))


class GeluTransition(nn.Module):
    """The Evoformer's transition with a GELU, whose backward needs what it reads."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(c)
        self.up, self.down = nn.Linear(c, 4 * c), nn.Linear(4 * c, c)

    def forward(self, x: Tensor) -> Tensor:
        """``x`` (..., c) -> (..., c)."""
        return self.down(F.gelu(self.up(self.norm(x))))


def transition(scale: Scale = "default", gelu: bool = False) -> Subject:
    """A pair transition, N = 256, c = 64, four times as wide inside; with ReLU algorithm 15."""
    length, c = (256, 64) if scale == "default" else (24, 8)
    make = GeluTransition if gelu else evoformer_example().Transition
    name = "transition, GELU" if gelu else "transition, ReLU"
    return within(name, functools.partial(make, c), (length, length, c))


def outer_product(scale: Scale = "default") -> Subject:
    """Outer product mean (algorithm 10), 8 sequences of N = 192, c = 32, to 64 channels."""
    torch.manual_seed(0)
    length, msa, c_m, c, c_z = (192, 8, 64, 32, 64) if scale == "default" else (24, 4, 8, 4, 8)
    layer = evoformer_example().OuterProductMean(c_m, c_z, c)
    module = Within(layer, torch.randn(msa, length, c_m), residual=False)
    evoformer_example().perturb_zeros_(module, 0.02)
    return Subject("outer product mean", module, (torch.randn(length, length, c_z),), [layer])


def attention(scale: Scale = "default", length: int = 1536, small: int = 128) -> Subject:
    """Attention with a bias that has no gradient, c = 64, 4 heads; ``small`` is a length, too."""
    torch.manual_seed(0)
    c, heads = (64, 4) if scale == "default" else (8, 2)
    length = length if scale == "default" else small
    name = f"attention, L={length}"
    module = Within(Attention(c, heads), torch.randn(length, c), residual=False)
    inputs = (torch.randn(length, c), torch.randn(length, length))
    return Subject(name, module, inputs, [module.layer])


def distance_attention(scale: Scale = "default", length: int = 1536) -> Subject:
    """Attention with a bias made of positions, c = 64, 4 heads."""
    torch.manual_seed(0)
    c, heads = (64, 4) if scale == "default" else (8, 2)
    module = Within(DistanceAttention(c, heads), torch.randn(length, c), residual=False)
    inputs = (torch.randn(length, c), torch.arange(length) / 64)
    return Subject(f"attention by distance, L={length}", module, inputs, [module.layer])


def vocabulary(scale: Scale = "default") -> Subject:
    """Head and cross entropy, 1024 tokens over 16384 words, width 256."""
    torch.manual_seed(0)
    tokens, words, width = (1024, 16384, 256) if scale == "default" else (64, 512, 16)
    module = Vocabulary(tokens, words, width)
    return Subject("vocabulary head", module, (torch.randint(words, (tokens,)),), [module])


def folding(scale: Scale = "default") -> Subject:
    """Inference with two ESMFold blocks, L = 256: at 64 its outputs are half of what it needs."""
    module = Folding(esmfold(scale).module.blocks).eval().requires_grad_(False)
    length = 256 if scale == "default" else 12
    c_s, c_z = (256, 128) if scale == "default" else (32, 16)
    sequence, pair = torch.randn(1, length, c_s), torch.randn(1, length, length, c_z)
    inputs = (sequence, pair, torch.ones(1, length))
    return Subject("esmfold, inference", module, inputs, list(module.blocks), training=False)


def long_trunk(scale: Scale = "default") -> Subject:
    """ESMFold's trunk at twice the length: pair values are four times as large."""
    return dataclasses.replace(
        esmfold(scale, residues=128 if scale == "default" else 12), name="esmfold, L=128"
    )


LAYERS: dict[str, Callable[[Scale], Subject]] = {
    "triangle": triangle,
    "attention": attention,
    "attention-prime": functools.partial(attention, length=997, small=83),
    "attention-beside": functools.partial(attention, length=1024, small=64),
    "outer-product": outer_product,
    "transition": transition,
    "transition-gelu": functools.partial(transition, gelu=True),
    "vocabulary": vocabulary,
    "esmfold": esmfold,
    "esmfold-long": long_trunk,
    "evoformer": evoformer,
    "inference": folding,
}
