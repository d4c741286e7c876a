"""Gradients a user can trust: every budget gives the numbers of the unplanned step."""

import copy
import functools
from collections.abc import Callable

import pytest
import torch
from helpers import Block, assert_same, check, expected, memopt, middle, planned, stack, tensor
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

# ---------------------------------------------------------------- ops


def attention(x: torch.Tensor) -> torch.Tensor:
    scores = x @ x.transpose(-1, -2) / x.shape[-1] ** 0.5
    return scores.masked_fill(torch.ones_like(scores).triu(1) > 0, -torch.inf).softmax(-1) @ x


def triangle(x: torch.Tensor) -> torch.Tensor:
    pair = x[:, :, None] * x[:, None]
    return torch.einsum("bikc,bjkc->bijc", pair.sigmoid(), pair.tanh())


class Double(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> torch.Tensor:
        (x,) = ctx.saved_tensors
        return 3 * gradient * x  # not the true derivative: ours must be kept


OPS: dict[str, tuple[Callable[..., object], tuple[int, ...]]] = {
    "attention": (attention, (2, 5, 4)),
    "fused attention": (
        lambda x: F.scaled_dot_product_attention(x.sin(), x.cos(), x.exp(), is_causal=True),
        (2, 3, 5, 4),
    ),
    "triangle multiplication": (triangle, (2, 3, 4)),
    "odd sizes": (lambda x: (x @ x.t()).softmax(0).cumsum(1).exp(), (7, 3)),
    "expand": (lambda x: (x[:, None].expand(-1, 4, -1).exp() * x[:, None]).sin(), (5, 3)),
    "slice": (lambda x: x.exp()[1:-1, ::2].sin() * x[1:-1, ::2], (6, 5)),
    "cat and stack": (
        lambda x: torch.stack([torch.cat([x.exp(), x.sin()], 1), torch.cat([x, x * x], 1)]).tanh(),
        (4, 3),
    ),
    "split": (lambda x: [part.exp() * part for part in x.sin().split([2, 3], 1)], (4, 5)),
    "chunk": (lambda x: torch.mul(*x.exp().chunk(2, -1)).sin(), (4, 6)),
    "unbind": (lambda x: sum(part.exp() * part for part in x.sin().unbind(1)), (4, 3)),
    "index": (lambda x: x.exp()[torch.tensor([0, 2, 2, 1])].sin() * x[3], (4, 3)),
    "index by mask": (lambda x: torch.where(x > 0, x.exp(), x.sin()) * x, (4, 3)),
    "index assignment": (
        lambda x: x.sin().index_put((torch.tensor([0, 0, 2]),), x[:3].exp(), accumulate=True),
        (4, 3),
    ),
    "gather and scatter": (
        lambda x: x.exp().gather(1, x.argsort(1)).scatter_add(1, x.argsort(1), x.sin()),
        (4, 3),
    ),
    "sort and topk": (lambda x: (x.exp().sort(1)[0] * x.sin().topk(3)[0]).tanh(), (4, 3)),
    "max with indices": (lambda x: x.exp().max(1)[0] * x.sin().amax(1), (4, 3)),
    "cumulative": (lambda x: x.exp().cumsum(0).log().cumprod(1), (4, 3)),
    "norms": (lambda x: F.group_norm(x, 2).exp() + F.rms_norm(x, [5]) * F.normalize(x), (3, 4, 5)),
    "pooling": (lambda x: F.max_pool2d(F.avg_pool2d(x.exp(), 2), 2, ceil_mode=True), (1, 2, 9, 7)),
    "padding": (lambda x: F.pad(x.exp(), (1, 2), mode="reflect").sin() * F.pad(x, (2, 1)), (2, 5)),
    "interpolation": (lambda x: F.interpolate(x.exp(), scale_factor=2).sin(), (1, 2, 3, 4)),
    "linear algebra": (lambda x: torch.linalg.solve(x @ x.t() + 3 * torch.eye(4), x.exp()), (4, 4)),
    "fft": (lambda x: torch.fft.irfft(torch.fft.rfft(x.exp()) * 2).sin(), (3, 8)),
    "complex": (lambda x: torch.view_as_real(torch.exp(torch.complex(x, x.sin())) ** 2), (4, 3)),
    "losses": (
        lambda x: (
            F.cross_entropy(x.exp(), torch.arange(4) % 3, label_smoothing=0.1)
            + F.smooth_l1_loss(x.sin(), x.detach())
        ),
        (4, 3),
    ),
    "custom function": (lambda x: Double.apply(x.exp()).sin(), (4, 3)),
    "as_strided": (lambda x: x.exp().as_strided((3, 2), (2, 1)).sin(), (3, 4)),
    "roll, flip, repeat": (lambda x: x.exp().roll(1, 0).flip(1).repeat(2, 1).sin(), (4, 3)),
    "scalars": (lambda x: x.exp() / x.abs().sum().sqrt() + x.mean().tanh(), (4, 3)),
}


@pytest.mark.parametrize("name", OPS)
def test_the_gradient_of(name: str) -> None:
    function, shape = OPS[name]
    check(function, tensor(*shape))


MODULES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "convolutions": (
        lambda: nn.Sequential(
            nn.Conv2d(2, 4, 3, stride=2), nn.BatchNorm2d(4), nn.SiLU(),
            nn.ConvTranspose2d(4, 2, 3), nn.InstanceNorm2d(2), nn.GELU(),
        ),
        (2, 2, 9, 8),
    ),
    "3d convolutions": (
        lambda: nn.Sequential(nn.Conv3d(1, 3, 3, padding=1), nn.ReLU(), nn.MaxPool3d(2)),
        (1, 1, 5, 4, 6),
    ),
    "multi-head attention": (lambda: Attention(), (2, 5, 8)),
    "transformer layer": (
        lambda: nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True),
        (2, 5, 8),
    ),
    "recurrent": (lambda: Recurrent(), (2, 4, 3)),
    "deep relu stack": (
        lambda: nn.Sequential(*(m for _ in range(6) for m in (nn.Linear(6, 6), nn.ReLU()))),
        (5, 6),
    ),
}  # fmt: skip


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.attention(x, x, x, need_weights=True)[0]


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.GRUCell(3, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = x.new_zeros(x.shape[0], 5)
        for step in range(x.shape[1]):
            hidden = self.cell(x[:, step], hidden)
        return hidden


@pytest.mark.parametrize("name", MODULES)
def test_the_gradients_of(name: str) -> None:
    build, shape = MODULES[name]
    torch.manual_seed(1)
    check(build().double(), tensor(*shape))


def test_embeddings_with_padding_and_repeats() -> None:
    class Bag(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(7, 4, padding_idx=0)
            self.block = Block(4)

        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            return self.block(self.embed(tokens)).sum(1)

    check(Bag().double(), torch.tensor([[0, 1, 1, 3], [6, 0, 0, 1]]))


@pytest.mark.parametrize(
    "build",
    [lambda: stack(2), lambda: nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU()).double()],
    ids=["blocks", "convolution"],
)
def test_with_inductor_too(build: Callable[[], nn.Module]) -> None:
    model = build()
    check(model, tensor(6, 8) if len(model) == 2 and isinstance(model[0], Block) else
          tensor(1, 1, 6, 5), lower="inductor")  # fmt: skip


def test_a_function_with_inductor_too() -> None:
    check(triangle, tensor(2, 5, 4), lower="inductor")


# ---------------------------------------------------------------- every budget


def test_eight_budgets_give_one_gradient_and_less_memory_never_costs_less_time() -> None:
    model, x = stack(3), [tensor(16, 8)]
    wanted = expected(model, x)
    _, (least,) = planned(model, x, "min")
    seconds = []
    for place in range(8):
        budget = least.lowered + (least.inductor - least.lowered) * place // 7
        got, (report,) = planned(model, x, budget)
        assert_same(got, wanted)
        assert report.lowered <= budget
        assert report.predicted <= budget
        seconds.append(report.seconds)
    assert seconds == sorted(seconds, reverse=True)


def test_the_reserve_is_taken_off_the_budget() -> None:
    model, x = stack(3), [tensor(16, 8)]
    _, reports = planned(model, x, "min")
    budget = middle(reports)
    _, (plain,) = planned(model, x, budget)
    _, (reserved,) = planned(model, x, budget + 4096, reserve=4096)
    assert (plain.lowered, plain.moves) == (reserved.lowered, reserved.moves)


# ---------------------------------------------------------------- checkpoint inside


class Checkpointed(nn.Module):
    def __init__(self, blocks: int = 3, **how) -> None:
        super().__init__()
        self.blocks, self.how = stack(blocks), how

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False, **self.how)
        return x


@pytest.mark.parametrize("lower", ["eager", pytest.param("inductor", marks=pytest.mark.long)])
def test_checkpoint_regions(lower: str) -> None:
    check(Checkpointed(2), tensor(16, 8), lower=lower)


def test_a_checkpoint_region_is_kept_as_written_without_a_budget() -> None:
    x = [tensor(32, 8)]
    _, (plain,) = planned(stack(3), x, None)
    _, (written,) = planned(Checkpointed(), x, None)
    assert written.lowered < plain.lowered


def test_checkpoint_in_checkpoint() -> None:
    class Nested(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Checkpointed(2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return checkpoint(lambda y: self.inner(y).sin(), x.exp(), use_reentrant=False)

    check(Nested(), tensor(6, 8))


def test_a_checkpoint_region_used_twice() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = Block().double()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for _ in range(3):
                x = checkpoint(self.block, x, use_reentrant=False)
            return x

    check(Twice(), tensor(6, 8))


def test_checkpoint_of_several_inputs_and_outputs() -> None:
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right = stack(2)

        def both(self, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return self.left(x) * y, self.right(y)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            left, right = checkpoint(self.both, x, x.sin(), use_reentrant=False)
            return left * right

    check(Pair(), tensor(6, 8))


aten = torch.ops.aten


def policy(tags: dict[object, CheckpointPolicy], otherwise: CheckpointPolicy):
    """A selective checkpoint context with a tag for each op."""

    def choose(context, op, *args, **kwargs) -> CheckpointPolicy:
        return tags.get(op, otherwise)

    return functools.partial(create_selective_checkpoint_contexts, choose)


SELECTIVE = {
    "save products": policy(
        {
            aten.mm.default: CheckpointPolicy.MUST_SAVE,
            aten.addmm.default: CheckpointPolicy.MUST_SAVE,
        },
        CheckpointPolicy.PREFER_RECOMPUTE,
    ),
    "recompute gelu": policy(
        {aten.gelu.default: CheckpointPolicy.MUST_RECOMPUTE}, CheckpointPolicy.PREFER_SAVE
    ),
    "recompute all": policy({}, CheckpointPolicy.MUST_RECOMPUTE),
    "save all": policy({}, CheckpointPolicy.MUST_SAVE),
}


@pytest.mark.parametrize("name", SELECTIVE)
def test_selective_checkpoint(name: str) -> None:
    check(Checkpointed(2, context_fn=SELECTIVE[name]), tensor(16, 8))


def test_a_value_tagged_must_save_is_never_recomputed() -> None:
    x = [tensor(32, 8)]
    _, (report,) = planned(Checkpointed(context_fn=SELECTIVE["save products"]), x, "min")
    again = [move for move in report.moves if move.how != "keep"]
    assert not [move for move in again if "mm" in move.value]
    assert "aten.addmm" not in report.backward


def test_a_value_tagged_must_recompute_is_never_kept() -> None:
    x = [tensor(32, 8)]
    _, (free,) = planned(Checkpointed(context_fn=SELECTIVE["recompute all"]), x, None)
    _, (plain,) = planned(stack(3), x, None)
    assert free.lowered < plain.lowered
    assert "erf" in free.backward, "gelu's inside runs again in the backward"


def test_checkpoint_with_batch_norm_updates_its_statistics_once() -> None:
    class Normed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.GELU()).double()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return checkpoint(self.inner, x, use_reentrant=False)

    plain = Normed()
    wanted_buffers = copy.deepcopy(plain.inner)
    wanted_buffers(tensor(6, 8))
    for budget in (None, "min"):
        got, _ = planned(plain, [tensor(6, 8)], budget)
        for name, buffer in wanted_buffers.named_buffers():
            torch.testing.assert_close(got.buffers[f"inner.{name}"], buffer)


def test_gradients_of_a_shared_prefix_do_not_depend_on_the_order_of_losses() -> None:
    def step(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        trunk = (x @ x.t()).softmax(1).exp()
        return (trunk * 2).sin().sum(), (trunk @ x).tanh().sum()

    x = tensor(6, 3)
    compiled = memopt(step, "min")
    first, second = compiled(x)
    (a,) = torch.autograd.grad(first, x, retain_graph=True)
    (b,) = torch.autograd.grad(second, x)
    wanted_first, wanted_second = step(x)
    (c,) = torch.autograd.grad(wanted_first, x, retain_graph=True)
    (d,) = torch.autograd.grad(wanted_second, x)
    torch.testing.assert_close((a, b), (c, d))
