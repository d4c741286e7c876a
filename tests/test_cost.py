"""What the planner relies on when it asks how many seconds a node takes."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch.fx.experimental.proxy_tensor import make_fx

from memcompile._torch import UNKNOWN_SIZE
from memcompile.analysis import cost
from memcompile.analysis.cost import (
    FIXED,
    Rates,
    calibrate,
    node_flops,
    node_seconds,
    use_rates,
)
from memcompile.folders import cache_folder
from memcompile.step import hint


def nodes(
    fn: Callable[..., Any], *args: Any, tracing_mode: str = "fake"
) -> dict[str, torch.fx.Node]:
    """The traced nodes of ``fn`` by name."""
    graph = make_fx(fn, tracing_mode=tracing_mode)(*args).graph
    return {node.name: node for node in graph.nodes}


def seconds(node: torch.fx.Node, **how: Any) -> float:
    return node_seconds(node, FIXED, **how)


# Products cost their arithmetic.


def test_a_large_product_costs_its_flops_at_the_rate_of_its_dtype() -> None:
    size = 2048
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        x = torch.empty(size, size, dtype=dtype)
        mm = nodes(torch.mm, x, x)["mm"]
        assert node_flops(mm) == 2 * size**3
        rate = FIXED.matmul_rate(dtype)
        assert seconds(mm) == pytest.approx(2 * size**3 / rate + FIXED.launch)


def test_a_thin_product_costs_its_bytes() -> None:
    matrix, column = torch.empty(4096, 4096), torch.empty(4096, 1)
    mm = nodes(torch.mm, matrix, column)["mm"]
    moved = 4 * (4096 * 4096 + 2 * 4096)
    assert seconds(mm) == pytest.approx(moved / FIXED.memory + FIXED.launch)


@pytest.mark.parametrize(
    ("fn", "shapes", "flops"),
    [
        (torch.addmm, [(6,), (4, 5), (5, 6)], 2 * 4 * 5 * 6),
        (torch.bmm, [(3, 4, 5), (3, 5, 6)], 2 * 3 * 4 * 5 * 6),
        (torch.baddbmm, [(3, 4, 6), (3, 4, 5), (3, 5, 6)], 2 * 3 * 4 * 5 * 6),
        (torch.nn.functional.conv2d, [(2, 3, 8, 8), (5, 3, 3, 3)], 2 * 2 * 5 * 36 * 27),
    ],
)
def test_the_product_family_is_counted(fn: Any, shapes: list[Any], flops: int) -> None:
    found = nodes(fn, *(torch.empty(shape) for shape in shapes))
    assert sum(node_flops(node) for node in found.values()) == flops


def test_fused_attention_and_its_backward_are_counted() -> None:
    def step(q: torch.Tensor) -> torch.Tensor:
        out = torch.nn.functional.scaled_dot_product_attention(q, q, q)
        return torch.autograd.grad(out.sum(), q)[0]

    found = nodes(step, torch.randn(1, 2, 64, 16, requires_grad=True))
    forward = found["_scaled_dot_product_flash_attention_for_cpu"]
    backward = found["_scaled_dot_product_flash_attention_for_cpu_backward"]
    assert node_flops(forward) == 2 * (2 * 2 * 64 * 64 * 16)
    assert node_flops(backward) == 5 * (2 * 2 * 64 * 64 * 16)


def test_a_convolution_backward_is_counted() -> None:
    def step(x: torch.Tensor, w: torch.Tensor) -> Any:
        return torch.autograd.grad(torch.nn.functional.conv1d(x, w).sum(), (x, w))

    x, w = torch.randn(2, 3, 16), torch.randn(4, 3, 5)
    found = nodes(step, x.requires_grad_(), w.requires_grad_())
    assert node_flops(found["convolution_backward"]) == 2 * node_flops(found["convolution"])


# Everything else costs bytes, or slow arithmetic.


def test_a_plain_op_costs_its_bytes_and_a_launch() -> None:
    add = nodes(torch.add, torch.empty(1000, 1000), torch.empty(1000, 1000))["add"]
    assert seconds(add) == pytest.approx(12_000_000 / FIXED.memory + FIXED.launch)


def test_a_slow_op_costs_its_arithmetic() -> None:
    found = nodes(lambda x: (x + 1).exp(), torch.empty(1000, 1000))
    assert seconds(found["exp"]) == pytest.approx(1_000_000 / FIXED.slow + FIXED.launch)
    assert seconds(found["exp"]) > seconds(found["add"])


def test_a_square_is_cheap_and_a_real_power_is_not() -> None:
    found = nodes(lambda x: (x**2) ** 0.3, torch.empty(1000, 1000))
    assert seconds(found["pow_1"]) < seconds(found["pow_2"])


def test_what_is_inlined_costs_arithmetic_alone() -> None:
    add = nodes(torch.add, torch.empty(1000), torch.empty(1000))["add"]
    assert seconds(add, materialised=False) == pytest.approx(1000 / FIXED.cheap)


def test_a_caller_who_knows_the_bytes_is_believed() -> None:
    add = nodes(torch.add, torch.empty(1000), torch.empty(1000))["add"]
    moved = seconds(add, reads=10**9, writes=10**9)
    assert moved == pytest.approx(2 * 10**9 / FIXED.memory + FIXED.launch)


def test_a_reduction_is_charged_for_what_it_reads() -> None:
    total = nodes(torch.sum, torch.empty(1000, 1000))["sum_1"]
    assert seconds(total) == pytest.approx(4_000_004 / FIXED.memory + FIXED.launch)


def test_an_expanded_input_is_read_once() -> None:
    found = nodes(lambda x, y: x.expand(1000, 1000) + y, torch.empty(1000), torch.empty(1000, 1000))
    assert seconds(found["add"]) == pytest.approx(8_004_000 / FIXED.memory + FIXED.launch)


def test_a_lookup_reads_its_rows_not_the_table() -> None:
    table, rows = torch.empty(100_000, 64), torch.zeros(10, dtype=torch.int64)
    found = nodes(lambda i, w: torch.nn.functional.embedding(i, w), rows, table)
    assert seconds(found["embedding"]) < 2 * FIXED.launch


def test_inputs_views_items_and_outputs_are_free() -> None:
    def fn(x: torch.Tensor) -> torch.Tensor:
        return x.view(-1)[2:].split(3)[0].unsqueeze(0).expand(4, 3).t().detach()

    found = nodes(fn, torch.empty(4, 5))
    assert len(found) > 7
    assert sum(seconds(node) for node in found.values()) == 0


# Sizes nobody knows, ops nobody knows.


def test_symbolic_sizes_are_taken_at_their_hint() -> None:
    x, w = torch.empty(30, 50), torch.empty(50, 70)
    known = nodes(torch.mm, x, w)["mm"]
    symbolic = nodes(torch.mm, x, w, tracing_mode="symbolic")["mm"]
    size = symbolic.meta["val"].shape[0]
    assert isinstance(size, torch.SymInt) and hint(size) == 30
    assert seconds(symbolic) == seconds(known)


def test_a_size_from_the_data_is_assumed() -> None:
    found = nodes(lambda x: torch.nonzero(x) + 1, torch.ones(8), tracing_mode="symbolic")
    add = found["add"]
    assert hint(add.meta["val"].shape[0]) == UNKNOWN_SIZE
    assert seconds(add) > 0


def test_any_node_has_a_cost() -> None:
    def user_function(*args: Any) -> Any:
        return args

    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    strange = [
        graph.call_function(user_function, (x, 3)),
        graph.call_function(torch.ops.aten.mm.default, (x, None)),
        graph.call_function(torch.ops.aten.mm.default, ()),
        graph.call_method("exp", (x,)),
        graph.call_module("nowhere", (x,)),
        graph.output(x),
    ]
    for value in (None, (), [None], 3, "text", torch.empty(2, device="meta")):
        for node in strange:
            node.meta["val"] = value
            assert 0 <= seconds(node) < 1 and 0 <= seconds(node, materialised=False) < 1


def test_a_sparse_value_has_a_cost() -> None:
    graph = torch.fx.Graph()
    node = graph.call_function(torch.ops.aten.neg.default, (graph.placeholder("x"),))
    node.meta["val"] = torch.eye(3).to_sparse()
    assert seconds(node) > 0


def test_a_loop_is_charged_for_its_bytes_alone() -> None:
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    x.meta["val"] = torch.empty(1000, device="meta")
    loop = graph.call_function(torch.ops.higher_order.while_loop, (None, None, (x,), ()))
    loop.meta["val"] = (x.meta["val"],)
    assert seconds(loop) == pytest.approx(8000 / FIXED.memory + FIXED.launch)
    assert seconds(loop, materialised=False) == 0


@settings(deadline=None)
@given(st.integers(1, 500), st.integers(1, 500), st.integers(1, 500), st.integers(0, 100))
def test_more_work_never_costs_less(m: int, k: int, n: int, more: int) -> None:
    def product(inner: int) -> torch.fx.Node:
        graph = torch.fx.Graph()
        left, right = graph.placeholder("left"), graph.placeholder("right")
        left.meta["val"] = torch.empty(m, inner, device="meta")
        right.meta["val"] = torch.empty(inner, n, device="meta")
        node = graph.call_function(torch.ops.aten.mm.default, (left, right))
        node.meta["val"] = torch.empty(m, n, device="meta")
        return node

    assert seconds(product(k)) <= seconds(product(k + more))
    assert seconds(product(k), materialised=False) <= seconds(product(k))


# Rates: measured once, the same ever after.


@pytest.fixture
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder, and no rates remembered or forced."""
    monkeypatch.setenv("MEMCOMPILE_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("MEMCOMPILE_RATES", raising=False)
    monkeypatch.setattr(cost, "_known", {})
    monkeypatch.setattr(cost, "_forced", [])
    return tmp_path / "cache"


def test_calibrating_measures_sane_rates_and_leaves_the_threads_alone(fresh: Path) -> None:
    threads = torch.get_num_threads()
    rates = calibrate("cpu")
    assert torch.get_num_threads() == threads == rates.threads
    assert rates.device
    assert 1e8 < rates.matmul["float32"] < 1e15
    assert 1e8 < rates.memory < 1e13
    assert rates.slow < rates.cheap < 1e14
    assert 1e-8 < rates.launch < 1e-2
    figures = [*rates.matmul.values(), rates.memory, rates.cheap, rates.slow, rates.launch]
    assert all(figure == float(f"{figure:.1e}") for figure in figures)


def test_a_device_is_measured_once_and_read_back(
    fresh: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured: list[torch.device] = []

    def measure(device: torch.device) -> Rates:
        measured.append(device)
        return FIXED

    monkeypatch.setattr(cost, "measure_rates", measure)
    assert calibrate("cpu") == calibrate("cpu") == FIXED
    cost._known.clear()  # a second process
    assert calibrate("cpu") == FIXED
    assert len(measured) == 1
    assert [path.suffix for path in fresh.iterdir()] == [".json"]


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"device": 3}'])
def test_a_damaged_file_is_measured_anew(
    fresh: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    monkeypatch.setattr(cost, "measure_rates", lambda device: FIXED)
    calibrate("cpu")
    (path,) = fresh.iterdir()
    path.write_text(text)
    cost._known.clear()
    assert calibrate("cpu") == FIXED
    assert json.loads(path.read_text())["device"] == "fixed"


def test_a_folder_that_cannot_be_written_is_no_error(
    fresh: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fresh.write_text("a file where the folder should be")
    monkeypatch.setattr(cost, "measure_rates", lambda device: FIXED)
    assert calibrate("cpu") == FIXED


def test_rates_can_be_forced(fresh: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    mine = dataclasses.replace(FIXED, memory=1.0)
    with use_rates(FIXED), use_rates(mine) as inner:
        assert calibrate("cpu") is inner is mine
    monkeypatch.setenv("MEMCOMPILE_RATES", "fixed")
    assert calibrate("cpu") is FIXED
    (tmp_path / "mine.json").write_text(mine.to_json())
    monkeypatch.setenv("MEMCOMPILE_RATES", str(tmp_path / "mine.json"))
    assert calibrate("cpu") == mine
    assert not fresh.exists()


@pytest.mark.parametrize("figure", [0, -1, math.inf, math.nan, "fast", None])
def test_rates_that_are_no_rates_are_refused(figure: Any) -> None:
    fields = dataclasses.asdict(FIXED)
    with pytest.raises(ValueError, match="not memcompile rates"):
        Rates.from_json(json.dumps({**fields, "memory": figure}))
    with pytest.raises(ValueError, match="not memcompile rates"):
        Rates.from_json(json.dumps({**fields, "matmul": {"float32": figure}}))
    with pytest.raises(ValueError, match="not memcompile rates"):
        Rates.from_json(json.dumps({**fields, "matmul": {}}))


def test_an_unlisted_dtype_multiplies_at_a_listed_rate() -> None:
    rates = dataclasses.replace(FIXED, matmul={"float32": 1.0, "bfloat16": 2.0})
    assert rates.matmul_rate(torch.float16) == 1.0
    assert rates.matmul_rate(torch.int8) == 1.0
    assert rates.matmul_rate(torch.float8_e4m3fn) == 2.0


def test_files_lie_beside_inductors(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    monkeypatch.delenv("MEMCOMPILE_CACHE", raising=False)
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    assert cache_folder() == Path(default_cache_dir(), "memcompile")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    assert cache_folder() == tmp_path / "memcompile"
