"""Parts of scientific models that stay in fp32, and steps that are mostly weights."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import memopt, observe
from test_cast import (
    BF16,
    FP32,
    TriangleMultiplication,
    casted,
    contractions,
    distance,
    saved,
)
from torch import Tensor, nn

import memcompile
from memcompile.step import module_names


def rigid(vectors: Tensor) -> Tensor:
    """Rotations of two vectors each, by Gram and Schmidt (Jumper et al. 2021, algorithm 21)."""
    one = nn.functional.normalize(vectors[..., 0, :], dim=-1)
    two = vectors[..., 1, :] - (vectors[..., 1, :] * one).sum(-1, keepdim=True) * one
    two = nn.functional.normalize(two, dim=-1)
    return torch.stack([one, two, torch.linalg.cross(one, two)], -1)


class PointAttention(nn.Module):
    """Attention by squared distances of points in the frames (as in algorithm 22 there)."""

    def __init__(self, width: int = 32, heads: int = 2, points: int = 4) -> None:
        super().__init__()
        self.heads, self.points = heads, points
        self.q, self.k = nn.Linear(width, heads * 16), nn.Linear(width, heads * 16)
        self.v = nn.Linear(width, heads * 16)
        self.q_points = nn.Linear(width, heads * points * 3)
        self.kv_points = nn.Linear(width, heads * 2 * points * 3)
        self.weight = nn.Parameter(torch.zeros(heads))
        self.out = nn.Linear(heads * (16 + points * 4), width)

    def forward(self, s: Tensor, turn: Tensor, shift: Tensor) -> Tensor:
        length = len(s)
        q, k, v = (f(s).unflatten(-1, (self.heads, 16)) for f in (self.q, self.k, self.v))
        shape = (self.heads, -1, 3)
        mine, theirs = (
            torch.einsum("nij,nhpj->nhpi", turn, f(s).unflatten(-1, shape)) + shift[:, None, None]
            for f in (self.q_points, self.kv_points)
        )
        theirs, values = theirs.chunk(2, -2)
        apart = (mine[:, None] - theirs[None]).square().sum((-1, -2))
        scores = (
            torch.einsum("nhc,mhc->nmh", q, k) / 4 - nn.functional.softplus(self.weight) * apart
        )
        weights = scores.softmax(1)
        seen = torch.einsum("nmh,mhpi->nhpi", weights, values) - shift[:, None, None]
        local = torch.einsum("nji,nhpj->nhpi", turn, seen)
        parts = [torch.einsum("nmh,mhc->nhc", weights, v), local, local.norm(dim=-1)]
        return self.out(torch.cat([part.reshape(length, -1) for part in parts], -1))


class Structure(nn.Module):
    """A hidden layer, point attention, and a frame updated by what it gives."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.attention = nn.Linear(32, 32), PointAttention()
        self.update = nn.Linear(32, 9)

    def forward(self, s: Tensor, vectors: Tensor, shift: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        turn = rigid(vectors)
        s = self.hidden(s).relu()
        s = s + self.attention(s, turn, shift)
        moved = self.update(s).unflatten(-1, (3, 3))
        shift = shift + (turn @ moved[:, 2, :, None])[..., 0]
        turn = turn @ rigid(moved[:, :2] + torch.eye(3).to(s)[:2])
        return s, turn, shift


class Harmonics(nn.Module):
    """Polynomials of unit vectors up to the second degree, and messages weighted by them."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.radial = nn.Linear(24, 24), nn.Linear(8, 24)
        self.mix, self.out = nn.Linear(9, 24, bias=False), nn.Linear(24, 24)

    def forward(self, h: Tensor, places: Tensor) -> Tensor:
        apart = places[:, None] - places[None] + 1e-3
        length = apart.square().sum(-1, keepdim=True).sqrt()
        x, y, z = (apart / length).unbind(-1)
        one = torch.ones_like(x)
        second = [x * y, y * z, 3 * z * z - 1, x * z, x * x - y * y]
        angles = torch.stack([one, x, y, z, *second], -1)
        radial = self.radial((-(length - torch.arange(8)).square()).exp())
        messages = self.mix(angles) * radial * self.hidden(h).relu()
        return self.out(messages.sum(1) / len(places) ** 0.5)


SUBJECTS: dict[str, tuple[Callable[[], nn.Module], Callable[[], list[Tensor]], set[str]]] = {
    "frames": (
        Structure,
        lambda: [torch.randn(45, 32), torch.randn(45, 2, 3), 30 * torch.randn(45, 3)],
        {"hidden", "attention.q", "attention.k", "attention.v"},
    ),
    "harmonics": (
        Harmonics,
        lambda: [torch.randn(13, 24), 10 * torch.randn(13, 3)],
        {"hidden", "radial", "out"},
    ),
}


def made(name: str) -> tuple[nn.Module, list[Tensor], set[str]]:
    torch.manual_seed(0)
    model, inputs, low = SUBJECTS[name]
    return model(), [x.requires_grad_() for x in inputs()], low


@pytest.mark.parametrize("name", SUBJECTS)
def test_geometry_stays_in_fp32_and_layers_do_not(name: str) -> None:
    model, inputs, low = made(name)
    _, module, _ = casted(model, *inputs)
    layers = {name for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    layers.discard("attention.out")  # it reads lengths: in fp32 or not, as torch decomposes them
    found: dict[str, set[torch.dtype]] = {}
    for node in contractions(module):
        at = [each for each in module_names(node) if each in layers]
        place = at[-1] if at else str([tuple(n.meta["val"].shape) for n in node.all_input_nodes])
        found.setdefault(place, set()).add(node.all_input_nodes[0].meta["val"].dtype)
    assert {place for place in layers if found[place] == {BF16}} == low
    assert all(found[place] == {FP32} for place in layers - low)


def test_a_triangle_multiplication_is_summed_in_fp32() -> None:
    z = torch.randn(1, 12, 12, 16)
    _, module, _ = casted(TriangleMultiplication(16), z)
    sums = [n for n in contractions(module) if n.all_input_nodes[0].meta["val"].dim() == 3]
    assert len(sums) == 3, "forward and backward"
    assert all(n.all_input_nodes[0].meta["val"].dtype == FP32 for n in sums)
    layers = [n for n in contractions(module) if n not in sums]
    assert layers and all(n.all_input_nodes[0].meta["val"].dtype == BF16 for n in layers)


class Mixer(nn.Module):
    """Softmax attention or its like, with a norm behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(32, 32) for _ in range(3))
        self.norm, self.drop = nn.LayerNorm(32), nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        weights = self.drop((self.q(x) @ self.k(x).mT / 32**0.5).softmax(-1))
        return self.norm(weights @ self.v(x))


def test_attention_that_a_norm_reads_is_cast() -> None:
    _, module, _ = casted(Mixer(), torch.randn(2, 24, 32))
    assert {n.all_input_nodes[0].meta["val"].dtype for n in contractions(module)} == {BF16}


def test_points_that_come_in_pieces_are_known() -> None:
    """One layer gives all points, split and turned; differences are split, too."""

    class Pieces(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.points, self.last = nn.Linear(32, 24), nn.Linear(2, 16)
            self.other = nn.Linear(32, 16)

        def forward(self, s: Tensor, turn: Tensor) -> Tensor:
            one, two = self.points(s).unflatten(-1, (8, 3)).split(4, 1)
            apart = one.mean(1)[:, None] - (two @ turn.mT).mean(1)[None]
            x, y, _ = apart.unbind(-1)
            return self.last(torch.stack([x * y, y * y], -1)).sum(1) + self.other(s)

    _, module, _ = casted(Pieces(), torch.randn(40, 32), torch.randn(40, 3, 3))
    kinds: dict[str, set[torch.dtype]] = {}
    for node in contractions(module):
        for name in {"points", "last", "other"} & set(module_names(node)):
            kinds.setdefault(name, set()).add(node.all_input_nodes[0].meta["val"].dtype)
    assert kinds == {"points": {FP32}, "last": {FP32}, "other": {BF16}}


@pytest.mark.parametrize("name", SUBJECTS)
def test_gradients_are_no_worse_than_under_autocast(name: str) -> None:
    model, inputs, _ = made(name)
    exact_model = copy.deepcopy(model).double()
    exact = observe(
        exact_model, exact_model, [x.detach().double().requires_grad_() for x in inputs]
    )
    under = copy.deepcopy(model)

    def autocast(*given: Any) -> Any:
        with torch.autocast("cpu", BF16):
            return under(*given)

    peer = observe(under, autocast, inputs)
    ours = observe(model, memopt(model, precision="bf16", strict=True, fullgraph=True), inputs)
    for field in ("outputs", "gradients", "parameters"):
        error, theirs = (distance(getattr(s, field), getattr(exact, field)) for s in (ours, peer))
        assert 0 < error <= theirs, field


def heavy() -> tuple[nn.Module, Tensor]:
    """Layers with more weights than a batch has numbers, as in pytorch #133637."""
    torch.manual_seed(0)
    layers = [nn.Linear(160, 160, bias=False) for _ in range(5)]
    return nn.Sequential(*layers), torch.randn(4, 160)


def test_a_step_of_weights_alone_measures_no_higher_than_in_fp32() -> None:
    """pytorch #133637: under autocast a 16-bit copy of each weight is kept for the backward."""
    model, x = heavy()
    peaks: dict[Any, int] = {}
    for precision in (None, "bf16"):
        torch._dynamo.reset()
        compiled = memopt(model, lower="inductor", precision=precision, strict=True)

        def step(compiled: Any = compiled) -> None:
            model.zero_grad()
            compiled(x).square().mean().backward()

        peaks[precision] = memcompile.measure_peak(step).bytes
        report = memcompile.reports()[-1]
        assert report.held_after is not None
        assert report.held_after - report.before < model[0].weight.nbytes / 2, "no weight's copy"
    assert peaks["bf16"] <= peaks[None]
    weights = sum(p.nbytes for p in model.parameters())
    assert peaks[None] >= weights, "the gradients"


def test_no_16_bit_weight_is_among_what_such_a_step_keeps() -> None:
    model, x = heavy()
    graph, module, changed = casted(model, x)
    assert changed and any(n.meta["val"].dtype == BF16 for n in contractions(module))
    kept = [n.meta["val"] for n in saved(graph, module)]
    assert kept and max(value.numel() for value in kept) <= x.numel()
