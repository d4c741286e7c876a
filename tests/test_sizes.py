"""The largest length that fits: asked of a compiled dynamic step."""

import pytest
import torch

import memcompile


def _attention(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    q = x @ w
    return torch.softmax(q @ x.T, dim=-1).matmul(x).tanh().square().mean()


def _report(length: int = 64, **options: object) -> memcompile.Report:
    torch.compiler.reset()
    x = torch.randn(length, 16, requires_grad=True)
    w = torch.randn(16, 16, requires_grad=True)
    torch._dynamo.mark_dynamic(x, 0)
    compiled = torch.compile(_attention, backend="memopt", options={"lower": "eager", **options})
    compiled(x, w).backward()
    return memcompile.reports()[-1]


def test_the_peak_is_a_polynomial_in_the_length() -> None:
    report = _report()
    assert list(report.symbols.values()) == [64]
    (name,) = report.symbols
    assert f"{name}**2" in report.peak_expression


def test_the_largest_length_of_the_plan_fits_and_the_next_does_not() -> None:
    report = _report()
    budget = 4 * report.lowered
    size = memcompile.max_size(report, budget)
    assert 64 < size < 256
    assert _report(size).lowered <= budget < _report(size + 1).lowered


def test_replanning_reaches_further() -> None:
    report = _report()
    budget = 4 * report.lowered
    size = memcompile.max_size(report, budget, replan=True)
    assert size >= memcompile.max_size(report, budget)
    assert _report(size, budget=budget).lowered <= budget


def test_a_static_step_has_no_largest_length() -> None:
    x = torch.randn(8, 16, requires_grad=True)
    w = torch.randn(16, 16, requires_grad=True)
    torch.compile(_attention, backend="memopt", options={"lower": "eager"})(x, w)
    with pytest.raises(ValueError, match="static shapes"):
        memcompile.max_size(memcompile.reports()[-1], "1GiB")


def test_a_budget_too_small_for_anything_gives_zero() -> None:
    assert memcompile.max_size(_report(), 100) == 0
