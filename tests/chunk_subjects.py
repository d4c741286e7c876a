"""Small models with something large inside, for tests of loops."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from helpers import tensor
from torch import nn
from torch.nn import functional as F


class Attention(nn.Module):
    """Self-attention with a bias by distance."""

    def __init__(self, width: int = 8, heads: int = 2, dropout: float = 0.0) -> None:
        super().__init__()
        self.heads, self.dropout = heads, nn.Dropout(dropout)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.near = nn.Linear(1, heads)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, width = x.shape
        parts = self.qkv(x).view(batch, length, 3, self.heads, width // self.heads)
        q, k, v = parts.permute(2, 0, 3, 1, 4)
        place = torch.arange(length, dtype=x.dtype, device=x.device)
        near = self.near((place[:, None] - place).abs()[..., None] / length).permute(2, 0, 1)
        weights = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5 + near).softmax(-1)
        mixed = self.dropout(weights) @ v
        return self.out(mixed.transpose(1, 2).reshape(x.shape))


class Triangle(nn.Module):
    """Attention of the edges of each node over one another (AlphaFold 2, algorithm 13)."""

    def __init__(self, width: int = 4, heads: int = 2) -> None:
        super().__init__()
        self.heads, self.norm = heads, nn.LayerNorm(width)
        self.qkv, self.bias = nn.Linear(width, 3 * width), nn.Linear(width, heads)
        self.gate, self.out = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        length, _, width = z.shape
        y = self.norm(z)
        parts = self.qkv(y).view(length, length, 3, self.heads, width // self.heads)
        q, k, v = parts.permute(2, 0, 3, 1, 4)
        scores = torch.einsum("ihqc,ihkc->ihqk", q, k) + self.bias(y).permute(2, 0, 1)
        mixed = torch.einsum("ihqk,ihkc->iqhc", scores.softmax(-1), v)
        return z + self.out(mixed.reshape(z.shape) * self.gate(y).sigmoid())


class Columns(nn.Module):
    """Attention of the edges into each node over one another (algorithm 14), nothing transposed."""

    def __init__(self, width: int = 4, heads: int = 2) -> None:
        super().__init__()
        self.heads, self.norm = heads, nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        length, _, width = z.shape
        y = self.norm(z)
        parts = self.qkv(y).view(length, length, 3, self.heads, width // self.heads)
        q, k, v = parts.unbind(2)
        scores = torch.einsum("qjhc,kjhc->jhqk", q, k)
        mixed = torch.einsum("jhqk,kjhc->qjhc", scores.softmax(-1), v)
        return z + self.out(mixed.reshape(z.shape))


class Apart(nn.Module):
    """Pairs held in one row after the other, and mixed within columns."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 6 * width), nn.Linear(6 * width, width)

    def forward(self, z: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        length, _, width = z.shape
        flat = z.reshape(length * length, width).sin()
        wide = self.up(flat).view(length, length, 6 * width).softmax(0)
        return self.down(wide.view(length * length, 6 * width)), flat


class TriangleProduct(nn.Module):
    """The edges of one node times those of another, summed over the third (algorithms 11, 12)."""

    def __init__(self, outgoing: bool, width: int = 4) -> None:
        super().__init__()
        self.sum = "ikc,jkc->ijc" if outgoing else "kic,kjc->ijc"
        self.norm, self.after = nn.LayerNorm(width), nn.LayerNorm(width)
        self.left, self.right = nn.Linear(width, width), nn.Linear(width, width)
        self.left_gate, self.right_gate = nn.Linear(width, width), nn.Linear(width, width)
        self.gate, self.out = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        x = self.norm(z)
        left = self.left_gate(x).sigmoid() * self.left(x)
        right = self.right_gate(x).sigmoid() * self.right(x)
        product = torch.einsum(self.sum, left, right)
        return z + self.out(self.after(product)) * self.gate(x).sigmoid()


class Trunk(nn.Module):
    """Layers of one width along a residual stream."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            TriangleProduct(True, width),
            TriangleProduct(False, width),
            TriangleProduct(True, width),
        )

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        return self.layers(z.tanh())


class Transition(nn.Module):
    """A residual block that is wide inside."""

    def __init__(self, map_: Callable[..., torch.Tensor], width: int = 4) -> None:
        super().__init__()
        self.map_, self.norm = map_, nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        return z + self.down(self.map_(self.up(self.norm(z))))


class OuterProductMean(nn.Module):
    """Every pair of columns, multiplied out and averaged (AlphaFold 2, algorithm 10)."""

    def __init__(self, width: int = 6, hidden: int = 4) -> None:
        super().__init__()
        self.norm, self.out = nn.LayerNorm(width), nn.Linear(hidden**2, 3)
        self.left, self.right = nn.Linear(width, hidden), nn.Linear(width, hidden)

    def forward(self, m: torch.Tensor) -> torch.Tensor:
        y = self.norm(m)
        outer = torch.einsum("sic,sjd->ijcd", self.left(y), self.right(y))
        return self.out(outer.flatten(-2) / m.shape[0])


class Words(nn.Module):
    """An embedding, and cross entropy over all words; one weight for both if ``tied``."""

    def __init__(self, tied: bool, words: int = 211, width: int = 8) -> None:
        super().__init__()
        self.embed, self.mix = nn.Embedding(words, width), nn.Linear(width, width)
        self.head = nn.Linear(width, words, bias=not tied)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        logits = self.head(self.mix(self.embed(ids)).relu())
        return F.cross_entropy(logits, ids.roll(1))


class Scores(nn.Module):
    """All pairs of rows of ``x``, and what ``use`` makes of them."""

    def __init__(self, use: Callable[..., Any], width: int = 4) -> None:
        super().__init__()
        self.use, self.a, self.b = use, nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> Any:
        return self.use(self.a(x) @ self.b(x).T, x)


def double(make: Callable[..., nn.Module], *args: Any) -> nn.Module:
    torch.manual_seed(3)
    return make(*args).double()


def words(count: int) -> torch.Tensor:
    return torch.randint(211, (count,), generator=torch.Generator().manual_seed(1))


#: A model and its input, by name.
SUBJECTS: dict[str, tuple[Callable[[], nn.Module], Callable[[], torch.Tensor]]] = {
    "attention": (lambda: double(Attention), lambda: tensor(2, 36, 8)),
    "attention, prime": (lambda: double(Attention), lambda: tensor(2, 37, 8)),
    "attention, longer": (lambda: double(Attention), lambda: tensor(1, 97, 8)),
    "attention, fixed input": (lambda: double(Attention), lambda: tensor(1, 37, 8, grad=False)),
    "triangle": (lambda: double(Triangle), lambda: tensor(16, 16, 4)),
    "triangle, prime": (lambda: double(Triangle), lambda: tensor(13, 13, 4)),
    "columns, prime": (lambda: double(Columns), lambda: tensor(13, 13, 4)),
    "relu": (lambda: double(Transition, F.relu), lambda: tensor(37, 5, 4)),
    "gelu": (lambda: double(Transition, F.gelu), lambda: tensor(97, 4)),
    "silu, fixed input": (lambda: double(Transition, F.silu), lambda: tensor(48, 4, grad=False)),
    "outer product": (lambda: double(OuterProductMean), lambda: tensor(3, 36, 6)),
    "outer product, prime": (lambda: double(OuterProductMean), lambda: tensor(3, 37, 6)),
    "words": (lambda: double(Words, False), lambda: words(97)),
    "tied words": (lambda: double(Words, True), lambda: words(64)),
}
