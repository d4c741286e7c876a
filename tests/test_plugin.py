"""A stranger's package: found, named, and given all that a built-in pass is given."""

import tomllib
from importlib.metadata import entry_points
from pathlib import Path

import pytest
import torch
from memcompile_example import PackBools, pack, unpack
from torch import nn

import memcompile
from memcompile.registry import defaults, resolve

PLUGIN = Path(__file__).parent / "plugin"


def train(passes: str | list[memcompile.Pass], budget: str | None = "min", **options: object):
    """Loss, gradients and report of one step with ReLU and dropout."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    layers = [(nn.Linear(64, 64), nn.ReLU(), nn.Dropout(0.1)) for _ in range(3)]
    model = nn.Sequential(*(module for layer in layers for module in layer))
    x = torch.randn(256, 64)
    options = {"passes": passes, "budget": budget, "lower": "eager", "strict": True} | options
    step = torch.compile(
        lambda x: model(x).square().mean(), backend="memopt", options=options, fullgraph=True
    )
    loss = step(x)
    loss.backward()
    results = [loss.detach(), *(p.grad for p in model.parameters())]
    return results, memcompile.reports()[-1]


def equal(one: list[torch.Tensor], two: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def test_it_is_found_by_entry_point_and_runs_only_when_named() -> None:
    (point,) = entry_points(group="memcompile.passes", name="pack_bools")
    assert point.dist is not None and point.dist.name == "memcompile-example"
    assert memcompile.available()["pack_bools"] is PackBools
    assert "pack_bools" not in [each.name for each in defaults()]
    assert [each.name for each in resolve("default,pack_bools")][-1] == "pack_bools"
    assert resolve("pack_bools{least=9}") == [PackBools(least=9)]


def test_its_moves_are_taken_named_and_exact() -> None:
    plain, _ = train("", None)
    least, without = train("default")
    packed, report = train("default,pack_bools")
    assert equal(plain, least) and equal(plain, packed)
    assert report.lowered < without.lowered
    assert {"recompute", "pack_bools"} == {ran.by for ran in report.passes}
    taken = [move for move in report.moves if move.by == "pack_bools"]
    assert taken and {move.how for move in taken} == {"pack"}
    assert {move.bytes for move in taken if move.bytes > 0} == {256 * 64}
    packed_for_others = {-move.bytes for move in taken if move.bytes < 0}
    assert packed_for_others <= {256 * 64 // 8}
    assert "pack_bools" in str(report)


def test_the_planner_runs_with_only_a_strangers_proposals() -> None:
    plain, _ = train("", None)
    packed, report = train([PackBools()])
    assert equal(plain, packed)
    assert report.moves and {move.by for move in report.moves} <= {"pack_bools", "planner"}
    assert report.lowered < report.inductor


def test_its_options_reach_the_report() -> None:
    _, report = train("pack_bools{least=100000}")
    (ran,) = report.passes
    assert ran.by == "pack_bools{least=100000}" and ran.note == "offered 0 moves"
    assert not report.moves


@pytest.mark.slow
def test_inductor_compiles_it() -> None:
    with torch._inductor.config.patch(fallback_random=True):
        plain, without = train("", None, lower="inductor")
        packed, report = train([PackBools()], lower="inductor")
    assert equal(plain, packed)
    assert "pack_bools" in {move.by for move in report.moves}
    assert report.lowered < without.lowered


@pytest.mark.parametrize("shape", [(8,), (3, 16), (2, 5, 24), (0, 8)])
def test_what_is_packed_comes_back(shape: tuple[int, ...]) -> None:
    mask = torch.rand(shape) > 0.5
    packed = pack(mask)
    assert packed.nbytes * 8 == mask.nbytes
    assert torch.equal(unpack(packed), mask)


def test_it_is_written_against_the_public_names_alone() -> None:
    source = (PLUGIN / "memcompile_example" / "__init__.py").read_text()
    imported = [line for line in source.splitlines() if "import" in line and "memcompile" in line]
    assert imported == ["from memcompile import Context, Proposal, Proposer, Step, rebuild"]
    assert len(source.splitlines()) < 60
    project = tomllib.loads((PLUGIN / "pyproject.toml").read_text())["project"]
    assert project["entry-points"]["memcompile.passes"]["pack_bools"]
