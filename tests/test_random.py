"""Random draws: one draw at every budget, the unplanned step's, and gradients that know it."""

import pytest
import torch
from helpers import Block, middle, new_reports, short_planning, stack, tensor
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import memcompile

LOWERINGS = pytest.mark.parametrize("lower", ["eager", "inductor"])


def run(model, x: torch.Tensor, seed: int = 0, **how):
    """Outputs, gradients and the next number drawn, after one compiled step."""
    torch._dynamo.reset()
    compiled = torch.compile(model, **how)
    torch.manual_seed(seed)
    leaf = x.detach().clone().requires_grad_()
    out = compiled(leaf)
    out.abs().square().sum().backward()
    return out.detach(), leaf.grad, torch.rand(())


def ours(model, x: torch.Tensor, budget=None, lower: str = "inductor", seed: int = 0, **inductor):
    options = {"budget": budget, "lower": lower, "inductor": inductor}
    since = len(memcompile.reports())
    with short_planning():
        result = run(model, x, seed, backend="memopt", options=options)
    return result, new_reports(since)


def budgets_of(model, x: torch.Tensor, lower: str) -> list[object]:
    _, reports = ours(model, x, "min", lower)
    return [None, "min", middle(reports)]


class Dropped(nn.Module):
    """Dropout where its mask shows: exact zeros in the output and in the gradient."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.dropout(x.exp(), 0.5) * F.dropout(x.cos() + 2, 0.25)


def checkpointed(model: nn.Sequential):
    def step(x: torch.Tensor) -> torch.Tensor:
        for block in model:
            x = checkpoint(block, x, use_reentrant=False)
        return x

    return step


@LOWERINGS
def test_the_mask_of_the_backward_is_the_mask_of_the_forward(lower: str) -> None:
    x = tensor(32, 8)
    for budget in budgets_of(Dropped(), x, lower):
        (out, gradient, _), _ = ours(Dropped(), x, budget, lower)
        assert 0.2 < (out == 0).double().mean() < 0.9
        assert torch.equal(out == 0, gradient == 0), budget


@LOWERINGS
def test_every_budget_draws_the_same_mask(lower: str) -> None:
    model, x = stack(1, dropout=0.5), tensor(32, 8)
    first, *others = [ours(model, x, b, lower)[0] for b in budgets_of(model, x, lower)]
    for other in others:
        torch.testing.assert_close(other, first, rtol=1e-10, atol=1e-12)
        assert torch.equal(other[2], first[2]), "the generator is left in another state"


def test_masks_are_bit_equal_to_those_of_the_unplanned_step() -> None:
    x = tensor(32, 8)
    wanted = run(Dropped(), x, backend="inductor")
    for budget in budgets_of(Dropped(), x, "inductor"):
        got, _ = ours(Dropped(), x, budget)
        assert torch.equal(got[0] == 0, wanted[0] == 0)
        torch.testing.assert_close(got, wanted)


def test_a_dropout_stack_is_the_unplanned_one() -> None:
    model, x = stack(1, dropout=0.3), tensor(32, 8)
    wanted = run(model, x, backend="inductor")
    for budget in budgets_of(model, x, "inductor"):
        torch.testing.assert_close(ours(model, x, budget)[0], wanted, rtol=1e-9, atol=1e-11)


def test_fallback_random_draws_what_eager_draws() -> None:
    model, x = stack(1, dropout=0.3), tensor(16, 8)
    torch.manual_seed(0)
    leaf = x.detach().clone().requires_grad_()
    out = model(leaf)
    out.abs().square().sum().backward()
    wanted = out.detach(), leaf.grad, torch.rand(())
    for budget in (None, "min"):
        got, _ = ours(model, x, budget, fallback_random=True)
        torch.testing.assert_close(got, wanted)


def test_two_steps_draw_two_masks() -> None:
    compiled = torch.compile(Dropped(), backend="memopt", options={"budget": "min"})
    x = tensor(32, 8)
    assert not torch.equal(compiled(x) == 0, compiled(x) == 0)


def test_another_seed_draws_another_mask() -> None:
    x = tensor(32, 8)
    (one, *_), _ = ours(Dropped(), x, "min", "eager", seed=1)
    (two, *_), _ = ours(Dropped(), x, "min", "eager", seed=2)
    assert not torch.equal(one == 0, two == 0)


def slope(model, x: torch.Tensor, budget, lower: str) -> tuple[float, float]:
    """The gradient along one direction, and the same by finite differences, one seed."""
    torch._dynamo.reset()
    options = {"budget": budget, "lower": lower}
    compiled = torch.compile(model, backend="memopt", options=options)
    direction = torch.ones_like(x) / x.numel() ** 0.5

    def loss(at: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(3)
        return compiled(at).square().sum()

    leaf = x.detach().clone().requires_grad_()
    with short_planning():
        (gradient,) = torch.autograd.grad(loss(leaf), leaf)
    small = 1e-5
    ahead, behind = (
        loss((leaf + sign * small * direction).detach().requires_grad_()).item() for sign in (1, -1)
    )
    return float((gradient * direction).sum()), (ahead - behind) / (2 * small)


@LOWERINGS
def test_checkpointed_dropout_has_the_right_gradient_at_every_budget(lower: str) -> None:
    """Stock torch draws the masks of a checkpoint region anew (pytorch #190758)."""
    step, x = checkpointed(stack(1, dropout=0.5)), tensor(16, 8)
    for budget in budgets_of(step, x, lower):
        by_gradient, by_difference = slope(step, x, budget, lower)
        assert by_gradient == pytest.approx(by_difference, rel=1e-6), budget


@LOWERINGS
def test_dropout_has_the_right_gradient_at_every_budget(lower: str) -> None:
    model, x = stack(1, dropout=0.5), tensor(16, 8)
    for budget in budgets_of(model, x, lower):
        by_gradient, by_difference = slope(model, x, budget, lower)
        assert by_gradient == pytest.approx(by_difference, rel=1e-6), budget


DRAWS = {
    "rand_like": lambda x: x.exp() * torch.rand_like(x),
    "randn": lambda x: (x + torch.randn(x.shape, dtype=x.dtype)).sin().exp(),
    "bernoulli": lambda x: x.exp() * torch.bernoulli(torch.full_like(x, 0.5)),
    "randint": lambda x: x.exp()[torch.randint(0, 4, (9,))].sin(),
    "randperm": lambda x: x.exp()[torch.randperm(x.shape[0])].sin(),
    "multinomial": lambda x: x.exp()[torch.multinomial(torch.ones(4), 3)].sin(),
    "gumbel": lambda x: F.gumbel_softmax(x.exp(), hard=False) * x,
    "random relu": lambda x: F.rrelu(x.sin(), training=True).exp(),
    "attention dropout": lambda x: F.scaled_dot_product_attention(
        x[None, None].sin(), x[None, None].cos(), x[None, None].exp(), dropout_p=0.5
    ),
    "feature dropout": lambda x: F.dropout1d(x.exp()[None], 0.5).sin() + x,
    "alpha dropout": lambda x: F.alpha_dropout(x.exp(), 0.5, training=True).sin(),
    "in place": lambda x: (x * 2).mul_(torch.empty_like(x).uniform_(1, 2)).sin(),
}


@pytest.mark.parametrize("name", DRAWS)
def test_a_draw_is_one_draw_at_every_budget(name: str) -> None:
    step, x = DRAWS[name], tensor(4, 6)
    first, *others = [ours(step, x, b, "eager")[0] for b in (None, "min")]
    for other in others:
        torch.testing.assert_close(other, first, rtol=1e-10, atol=1e-12)
    by_gradient, by_difference = slope(step, x, "min", "eager")
    assert by_gradient == pytest.approx(by_difference, rel=1e-5)


def test_drawing_inside_and_outside_a_checkpoint_region() -> None:
    inner, outer = Block(dropout=0.5).double(), nn.Dropout(0.5)

    def step(x: torch.Tensor) -> torch.Tensor:
        x = outer(x.exp())
        x = checkpoint(lambda y: inner(outer(y)).sin(), x, use_reentrant=False)
        return outer(x) * torch.rand_like(x)

    x = tensor(16, 8)
    for budget in budgets_of(step, x, "eager"):
        by_gradient, by_difference = slope(step, x, budget, "eager")
        assert by_gradient == pytest.approx(by_difference, rel=1e-6), budget
