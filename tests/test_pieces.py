"""DDP's graph splitting: the pieces of one graph share the budget of the step."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from helpers import FUSED_CLOSE, memopt, new_reports, short_planning
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import memcompile
from memcompile import measure_peak
from memcompile.options import format_bytes

distributed = torch.distributed
pytestmark = [
    pytest.mark.skipif(
        not (distributed.is_available() and distributed.is_gloo_available()),
        reason="torch has no gloo",
    ),
    # DDP's own forward, which Dynamo looks into and leaves alone.
    pytest.mark.filterwarnings("ignore:Profiler record function:UserWarning"),
]

ROWS, WIDTH = 512, 128
HIDDEN = ROWS * WIDTH * 8  #: bytes of what one block hands to the next


class Blocks(nn.Module):
    """Blocks of 1 MiB of parameters each: a bucket of DDP's, and so a piece, each."""

    def __init__(self, blocks: int, skip: bool = False, loss: bool = False) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.skip, self.loss = skip, loss
        self.register_buffer("calls", torch.zeros((), dtype=torch.float64))
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))
            for _ in range(blocks)
        ).double()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        hidden = x
        for block in self.blocks:
            hidden = block(hidden) * x if self.skip else block(hidden)
        return hidden.square().sum() if self.loss else hidden


@pytest.fixture(autouse=True)
def one_process(tmp_path: Path) -> Iterator[None]:
    store = f"file://{tmp_path}/store"
    distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


def given(rows: int = ROWS) -> torch.Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.randn(rows, WIDTH, generator=generator, dtype=torch.float64)


def wrapped(model: nn.Module) -> nn.Module:
    return DistributedDataParallel(model, bucket_cap_mb=1)


def step(call: nn.Module, x: torch.Tensor) -> torch.Tensor:
    call.zero_grad(set_to_none=True)
    out = call(x)
    (out if out.dim() == 0 else out.square().sum()).backward()
    return out.detach()


def compiled(
    model: nn.Module, budget: object, lower: str = "eager", **more: object
) -> list[memcompile.Report]:
    """The reports of the pieces; outputs and gradients of two steps are plain DDP's."""
    plain, ours = copy.deepcopy(model), copy.deepcopy(model)
    x, since = given(), len(memcompile.reports())
    call, expected = memopt(wrapped(ours), budget, lower, **more), wrapped(plain)
    for _ in range(2):
        with short_planning():
            torch.testing.assert_close(step(call, x), step(expected, x), **FUSED_CLOSE)
        for one, other in zip(ours.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(one.grad, other.grad, **FUSED_CLOSE)
    return new_reports(since)


def test_each_piece_gets_what_the_pieces_before_it_leave() -> None:
    first, second, third = compiled(Blocks(3), None)
    assert first.held_before == 0 and not first.notes
    # What a piece hands on is in its own bytes and in the next one's inputs.
    assert second.held_before == first.held_after - HIDDEN
    assert third.held_before == first.held_after + second.held_after - 2 * HIDDEN
    for report, holders in ((second, (first,)), (third, (first, second))):
        size = format_bytes(report.held_before)
        names = ", ".join(f"graph {holder.index}" for holder in holders)
        assert report.notes == (f"a piece of a graph that was split: {size} are held by {names}",)
    assert first.lowered < second.lowered < third.lowered


def test_an_input_that_every_piece_reads_is_counted_once() -> None:
    own = compiled(Blocks(3), None)
    both = compiled(Blocks(3, skip=True), None)
    assert both[1].held_before == both[0].held_after - 2 * HIDDEN
    assert both[2].held_before == both[0].held_after + both[1].held_after - 4 * HIDDEN
    assert [r.before for r in both[1:]] == [r.before + HIDDEN for r in own[1:]]


def test_a_later_piece_is_planned_within_what_is_left() -> None:
    *_, last = compiled(Blocks(3), None)
    budget = last.lowered - 2 * HIDDEN
    reports = compiled(Blocks(3), budget)
    assert not reports[0].moves, "it fits alone"
    assert reports[2].moves
    assert all(report.lowered <= budget == report.budget for report in reports)


def test_a_share_is_of_each_pieces_own_peak() -> None:
    for report in compiled(Blocks(2), "90%"):
        own = report.inductor - report.held_before - report.before
        assert report.lowered - report.held_before - report.before <= 0.9 * own


def test_a_budget_that_a_later_piece_cannot_meet_is_refused_before_any_piece_runs() -> None:
    *_, last = compiled(Blocks(3), None)
    torch._dynamo.reset()
    model = Blocks(3)
    call = memopt(wrapped(model), last.held_before)
    for _ in range(2):
        with pytest.raises(memcompile.BudgetError, match="held by graphs compiled before"):
            call(given())
    assert model.calls == 0


def test_options_that_are_wrong_are_said_to_be_by_the_first_piece() -> None:
    call = memopt(wrapped(Blocks(3)), "lots")
    with pytest.raises(memcompile.OptionsError, match="budget='lots'"):
        call(given())


@pytest.mark.slow
def test_the_measured_peak_of_the_whole_step_is_within_the_budget() -> None:
    rows = 4 * ROWS
    budget = pieces_by_inductor(None, rows)[-1].lowered - 3 * HIDDEN
    model = Blocks(3, loss=True)
    call = memopt(wrapped(model), budget, "inductor")
    x, since = given(rows), len(memcompile.reports())
    measured = measure_peak(step, call, x, warmup=2).bytes  # the second builds buckets
    reports = new_reports(since)
    assert len(reports) == 3
    assert reports[-1].lowered <= budget < reports[-1].inductor
    lived = sum(p.nbytes for p in (*model.parameters(), *model.buffers())) + x.nbytes
    assert measured + lived == reports[-1].lowered, "what the pieces hold is what they hold"


def pieces_by_inductor(budget: object, rows: int) -> list[memcompile.Report]:
    since = len(memcompile.reports())
    step(memopt(wrapped(Blocks(3, loss=True)), budget, "inductor"), given(rows))
    torch._dynamo.reset()
    return new_reports(since)
