"""The promise: a step compiled by Inductor under a budget stays within it, exactly."""

import itertools

import pytest
import torch
from torch import nn

import memcompile
from memcompile import measure_peak


class Stack(nn.Module):
    """Residual blocks wide enough that what they save is most of the peak."""

    def __init__(self, blocks: int = 4, width: int = 64) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(),
                nn.Linear(4 * width, width), nn.Dropout(0.1),
            )
            for _ in range(blocks)
        )  # fmt: skip

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = x + block(x)
        return x.square().mean()


@pytest.fixture
def model() -> Stack:
    return Stack()


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(512, 64)


def run(compiled: nn.Module, model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """One training step from clean gradients."""
    model.zero_grad(set_to_none=True)
    torch.manual_seed(7)
    loss = compiled(x)
    loss.backward()
    return loss.detach()


def planned(model: nn.Module, x: torch.Tensor, **options: object) -> tuple:
    """Compile, run once; the compiled model, its loss and its report."""
    torch.compiler.reset()
    compiled = torch.compile(model, backend="memopt", options=options)
    loss = run(compiled, model, x)
    return compiled, loss, memcompile.reports()[-1]


def step_peak(report: memcompile.Report) -> int:
    return report.lowered - report.before


def test_without_a_budget_the_step_is_inductors_own(model: Stack, x: torch.Tensor) -> None:
    compiled, _, report = planned(model, x)
    measured = measure_peak(run, compiled, model, x).bytes
    plain = torch.compile(model, backend="inductor")
    assert measured == measure_peak(run, plain, model, x).bytes
    assert step_peak(report) == pytest.approx(measured, rel=0.02)
    assert not report.moves


def test_every_budget_is_met_and_known_before_anything_runs(model: Stack, x: torch.Tensor) -> None:
    _, wanted, own = planned(model, x)
    gradients = [p.grad.clone() for p in model.parameters()]
    for share in ("75%", "50%"):
        compiled, loss, report = planned(model, x, budget=share)
        measured = measure_peak(run, compiled, model, x).bytes
        assert measured + report.before <= report.budget
        assert step_peak(report) == pytest.approx(measured, rel=0.02)
        assert report.lowered < own.lowered
        assert report.schedulings <= 3
        # The same draw of every mask, at every budget.
        torch.testing.assert_close(loss, wanted)
        for parameter, gradient in zip(model.parameters(), gradients, strict=True):
            torch.testing.assert_close(parameter.grad, gradient)


def test_a_budget_that_already_fits_changes_nothing(model: Stack, x: torch.Tensor) -> None:
    _, _, report = planned(model, x, budget="1GiB")
    assert not report.moves
    assert report.schedulings == 1


def test_an_impossible_budget_says_what_sets_the_floor(model: Stack, x: torch.Tensor) -> None:
    compiled = torch.compile(model, backend="memopt", options={"budget": "300KiB"})
    with pytest.raises(memcompile.BudgetError) as caught:
        run(compiled, model, x)
    error = caught.value
    assert error.floor > error.budget == 300 * 1024
    assert error.source.startswith("test_budget.py:")
    assert error.node in str(error)


def test_the_least_peak_is_below_half_of_inductors(model: Stack, x: torch.Tensor) -> None:
    compiled, _, report = planned(model, x, budget="min")
    assert step_peak(report) < 0.5 * (report.inductor - report.before)
    assert measure_peak(run, compiled, model, x).bytes == pytest.approx(step_peak(report), rel=0.02)


def test_a_reserve_makes_room_for_a_loss_outside_the_graph(x: torch.Tensor) -> None:
    body = nn.Sequential(*(m for b in Stack().blocks for m in b)).eval()

    def step(compiled: nn.Module) -> None:
        body.zero_grad(set_to_none=True)
        nn.functional.mse_loss(compiled(x), torch.zeros(512, 64)).backward()

    torch.compiler.reset()
    step(torch.compile(body, backend="memopt"))
    own = memcompile.reports()[-1]
    budget, reserve = own.lowered, 2 * x.nbytes
    compiled = torch.compile(body, backend="memopt", options={"budget": budget, "reserve": reserve})
    torch.compiler.reset()
    step(compiled)
    report = memcompile.reports()[-1]
    assert report.budget == budget - reserve
    assert measure_peak(step, compiled).bytes + report.before <= budget


def test_lower_budgets_never_raise_the_peak(model: Stack, x: torch.Tensor) -> None:
    reports = [planned(model, x, budget=f"{s}%", lower="eager")[2] for s in range(95, 60, -7)]
    for looser, tighter in itertools.pairwise(reports):
        assert tighter.predicted <= looser.predicted
        assert tighter.seconds >= looser.seconds


def test_the_report_prints_and_draws_itself(model: Stack, x: torch.Tensor, tmp_path) -> None:
    _, _, report = planned(model, x, budget="50%", name="stack", lower="eager")
    text = str(report)
    assert "stack" in text and "test_budget.py" in text
    path = tmp_path / "stack.html"
    report.html(str(path))
    assert "test_budget.py" in path.read_text()
    assert memcompile.Report.from_json(report.to_json()) == report
