"""Faults of PyTorch's own ways to save memory, and how far they are cured here.

The models are written from the descriptions of the issues, scaled to a small machine.
(pytorch #190758, wrong gradients of recomputed dropout, is in ``test_random.py``.)
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import memcompile

pytestmark = pytest.mark.usefixtures("one_thread")

Run = Callable[[], None]


@pytest.fixture(name="one_thread")
def fixture_one_thread() -> object:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Layer(nn.Module):
    """A Llama-style layer."""

    def __init__(self, dim: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.heads = heads
        self.norms = nn.ModuleList(nn.RMSNorm(dim, eps=1e-5) for _ in range(2))
        self.qkv, self.out = nn.Linear(dim, 3 * dim, bias=False), nn.Linear(dim, dim, bias=False)
        self.gate, self.up = (nn.Linear(dim, hidden, bias=False) for _ in range(2))
        self.down = nn.Linear(hidden, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        heads = self.qkv(self.norms[0](x)).unflatten(-1, (3, self.heads, -1))
        q, k, v = heads.permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).flatten(-2))
        y = self.norms[1](x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


class Attention(nn.Module):
    """Attention of ``x`` to ``of``."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.kv, self.out = (nn.Linear(dim, n * dim) for n in (1, 2, 1))

    def forward(self, x: Tensor, of: Tensor) -> Tensor:
        q = self.q(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        k, v = self.kv(of).unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(-2))


class Block(nn.Module):
    """Self-attention, attention to a context where one is given, and a transition."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(3))
        self.attend, self.cross = Attention(dim, heads), Attention(dim, heads)
        self.up, self.down = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor, context: Tensor | None) -> Tensor:
        y = self.norms[0](x)
        x = x + self.attend(y, y)
        if context is not None:
            x = x + self.cross(self.norms[1](x), context)
        return x + self.down(F.gelu(self.up(self.norms[2](x))))


class Twice(nn.Module):
    """The same blocks traversed twice in a step, each one checkpointed."""

    def __init__(self, blocks: int, dim: int, heads: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(dim, heads) for _ in range(blocks))

    def traverse(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        for block in self.blocks:
            x = checkpoint(block, x, context, use_reentrant=False)
        return x

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        return self.traverse(x).mean(1).square().mean() + self.traverse(x, context).square().mean()


def runner(model: nn.Module, call: Callable[..., Tensor], *inputs: Tensor) -> Run:
    def run() -> None:
        model.zero_grad(set_to_none=True)
        call(*inputs).backward()

    return run


def peak(run: Run) -> int:
    return memcompile.measure_peak(run, warmup=1).bytes


def median_ratio(one: Run, other: Run) -> float:
    """Seconds of one run over those of another, alternating."""
    ratios = []
    for _ in range(15):
        start = time.perf_counter()
        one()
        middle = time.perf_counter()
        other()
        ratios.append((middle - start) / (time.perf_counter() - middle))
    return statistics.median(ratios)


def gradients(model: nn.Module) -> list[Tensor]:
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


@pytest.mark.long
def test_where_torchs_own_budget_is_lowest_ours_needs_a_fifth_less_in_no_more_time() -> None:
    """pytorch #197838: with ``activation_memory_budget`` the peak goes up and down as the budget
    falls. At the issue's point, its budget 0.05, ours is at least 22 % below it at no more than
    5 % more time. (That peaks only fall is in ``test_lowering.py``.)"""
    torch.manual_seed(0)
    model = nn.Sequential(*(Layer(64, 4, 172) for _ in range(3)))
    x = torch.randn(2, 513, 64)

    def step(x: Tensor) -> Tensor:
        return model(x).square().mean()

    theirs = runner(model, torch.compile(step), x)
    with torch._functorch.config.patch(activation_memory_budget=0.05):
        limit = peak(theirs) * 78 // 100
    before = sum(t.nbytes for t in (*model.parameters(), x))
    ours = runner(
        model, torch.compile(step, backend="memopt", options={"budget": before + limit}), x
    )
    assert peak(ours) <= limit
    assert median_ratio(ours, theirs) <= 1.05


def test_a_checkpointed_stack_traversed_twice_needs_no_more_than_eager_checkpointing() -> None:
    """pytorch #193193: compiled, a step that traverses the same checkpointed blocks twice peaks
    at about twice what eager checkpointing needs. Ours gets by with eager checkpointing's peak,
    in at most its time."""
    torch.manual_seed(0)
    model = Twice(2, 64, 4)
    inputs = torch.randn(8, 192, 64), torch.randn(8, 192, 64)
    eager = runner(model, model, *inputs)
    limit = peak(eager)
    want = gradients(model)
    options = {"budget": sum(t.nbytes for t in (*model.parameters(), *inputs)) + limit}
    ours = runner(model, torch.compile(model, backend="memopt", options=options), *inputs)
    assert peak(ours) <= limit
    report = memcompile.reports()[-1]
    assert report.inductor - report.before > 1.5 * limit  # else there is nothing to cure
    for got, expected in zip(gradients(model), want, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)

    assert median_ratio(ours, eager) <= 1.0


def test_a_compiled_checkpointed_stack_needs_no_more_than_eager_checkpointing() -> None:
    """pytorch #120381: compiling a checkpointed model brought back the memory that
    checkpointing had saved. Ours gets by with eager checkpointing's peak, tags and all."""
    torch.manual_seed(0)
    layers = (nn.Sequential(nn.Linear(96, 96), nn.LayerNorm(96), nn.GELU()) for _ in range(4))
    model = nn.ModuleList(layers)
    x = torch.randn(512, 96)

    def step(x: Tensor) -> Tensor:
        for layer in model:
            x = checkpoint(layer, x, use_reentrant=False)
        return x.square().mean()

    eager = runner(model, step, x)
    limit = peak(eager)
    want = gradients(model)
    options = {"budget": sum(t.nbytes for t in (*model.parameters(), x)) + limit}
    assert peak(runner(model, torch.compile(step, backend="memopt", options=options), x)) <= limit
    for got, expected in zip(gradients(model), want, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)
