"""What a user relies on when `measure_peak` says how many bytes a step needs."""

from __future__ import annotations

import dataclasses
import threading

import pytest
import torch
from hypothesis import given, settings, strategies as st

from memcompile.measure import Event, Peak, measure_peak, peak_of, tensor_bytes

KB = 1024


def block(size: int) -> torch.Tensor:
    """A tensor of ``size`` bytes."""
    return torch.empty(size, dtype=torch.uint8)


# The figure is exact to the byte.


def test_blocks_alive_together_add_up() -> None:
    def fn() -> None:
        x = block(3 * KB)
        y = block(5 * KB)
        del x, y

    assert measure_peak(fn) == Peak(8 * KB, "cpu")


def test_a_block_freed_early_makes_room() -> None:
    def fn() -> None:
        x = block(7 * KB)
        del x
        y = block(5 * KB)
        z = block(1 * KB)
        del y, z

    assert measure_peak(fn).bytes == 7 * KB


def test_a_result_counts_while_fn_runs() -> None:
    assert measure_peak(lambda: [block(2 * KB), block(KB)]).bytes == 3 * KB


def test_what_lived_before_counts_neither_kept_nor_freed() -> None:
    held = [block(64 * KB)]

    def fn() -> torch.Tensor:
        held.clear()
        return block(3 * KB)

    assert measure_peak(fn, warmup=0).bytes == 3 * KB


def test_arguments_are_handed_on() -> None:
    def fn(x: torch.Tensor, *, times: int) -> torch.Tensor:
        return x.expand(times, -1).clone()

    assert measure_peak(fn, block(100), times=7).bytes == 700


def test_an_idle_function_needs_nothing() -> None:
    assert measure_peak(lambda: None).bytes == 0


def test_autograd_keeps_what_the_backward_reads() -> None:
    x = torch.randn(1000, requires_grad=True)

    def step() -> None:
        y = x.exp()  # 4000 bytes, kept for the backward
        z = y.sin()  # 4000; y kept again for free
        torch.autograd.backward(z, torch.ones_like(z))  # 4000 for the ones
        x.grad = None

    # Backward of sin: cos(y) and the product with it live at once, beside y, z, the ones.
    assert measure_peak(step).bytes == 5 * 4000


def test_a_backward_nested_deep_enough_to_change_threads_is_seen_whole() -> None:
    class Nested(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, depth):
            ctx.depth = depth
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            if ctx.depth == 0:
                block(1 << 20)
            else:
                with torch.enable_grad():
                    x = torch.zeros(1, requires_grad=True)
                    Nested.apply(x, ctx.depth - 1).backward()
            return grad, None

    x = torch.zeros(1, requires_grad=True)
    peak = measure_peak(lambda: Nested.apply(x, 80).backward())  # torch changes thread at 60
    assert (1 << 20) < peak.bytes < (1 << 20) + 64 * KB


def test_compiling_is_not_measured() -> None:
    @torch.compile(backend="aot_eager")
    def fn(x: torch.Tensor) -> torch.Tensor:
        return x.exp().sin()

    assert measure_peak(fn, torch.zeros(1000)).bytes == 8000


def test_measuring_twice_says_the_same() -> None:
    layer = torch.nn.Linear(64, 64)

    def step(x: torch.Tensor) -> None:
        layer.zero_grad()
        layer(x).relu().sum().backward()

    x = torch.randn(32, 64)
    assert measure_peak(step, x) == measure_peak(step, x)


def test_nothing_is_kept_alive_afterwards() -> None:
    import weakref

    made: list[weakref.ref[torch.Tensor]] = []

    def fn() -> torch.Tensor:
        result = block(KB)
        made.append(weakref.ref(result))
        return result

    measure_peak(fn)
    assert [ref() for ref in made] == [None, None]


def test_the_profiler_prints_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    measure_peak(lambda: block(KB))
    assert capfd.readouterr() == ("", "")


# What cannot be measured says so.


def test_measuring_cannot_be_nested_and_recovers() -> None:
    with pytest.raises(RuntimeError, match="cannot be nested"):
        measure_peak(lambda: measure_peak(lambda: None))
    assert measure_peak(lambda: block(KB)).bytes == KB


@pytest.mark.filterwarnings("ignore:Warning. Profiler clears events")  # torch 2.11
def test_an_active_profiler_is_an_error() -> None:
    with torch.profiler.profile(), pytest.raises(RuntimeError, match="stop it first"):
        measure_peak(lambda: block(KB))


def test_a_function_that_profiles_itself_is_an_error() -> None:
    def fn() -> None:
        with torch.profiler.profile():
            block(KB)

    with pytest.raises(RuntimeError, match="fn used torch"):
        measure_peak(fn)
    assert measure_peak(lambda: block(KB)).bytes == KB


def test_an_error_in_fn_passes_through() -> None:
    def fn() -> None:
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        measure_peak(fn, warmup=0)
    assert measure_peak(lambda: block(KB)).bytes == KB


def test_a_strange_device_or_warmup_is_refused() -> None:
    with pytest.raises(ValueError, match="meta"):
        measure_peak(lambda: None, device="meta")
    with pytest.raises(ValueError, match="warmup=-1"):
        measure_peak(lambda: None, warmup=-1)


def test_threads_of_fn_itself_are_not_seen_as_documented() -> None:
    def fn() -> None:
        thread = threading.Thread(target=block, args=(KB,))
        thread.start()
        thread.join()

    assert measure_peak(fn).bytes == 0


# The replay of allocator events, by its invariants.

ADDRESSES = st.integers(1, 5)
EVENTS = st.lists(
    st.builds(Event, ADDRESSES, st.integers(1, 100) | st.integers(-100, -1)), max_size=30
)


@settings(deadline=None)
@given(EVENTS)
def test_the_peak_lies_between_the_largest_block_and_their_sum(events: list[Event]) -> None:
    sizes = [event.size for event in events if event.size > 0]
    assert max(sizes, default=0) <= peak_of(events) <= sum(sizes)


@settings(deadline=None)
@given(EVENTS, EVENTS)
def test_the_peak_never_falls_as_events_follow(first: list[Event], more: list[Event]) -> None:
    assert peak_of(first + more) >= peak_of(first)


# Bytes behind tensors.


def test_views_count_once_and_containers_are_walked() -> None:
    @dataclasses.dataclass
    class Pair:
        left: torch.Tensor
        right: torch.Tensor

    x = torch.zeros(10)
    assert tensor_bytes(x) == 40
    assert tensor_bytes([x, x[2:], {"again": x.view(2, 5)}]) == 40
    assert tensor_bytes(x[:1]) == 40  # a view keeps its whole storage
    assert tensor_bytes(Pair(x, x.double())) == 120
    assert tensor_bytes(None) == 0


def test_a_module_counts_tied_weights_once_and_buffers() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 4, bias=False), torch.nn.Linear(4, 4))
    model[1].weight = model[0].weight
    model.register_buffer("table", torch.zeros(3))
    assert tensor_bytes(model) == 4 * (16 + 4 + 3)
    assert tensor_bytes(model.parameters()) == 4 * (16 + 4)


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support")
@pytest.mark.filterwarnings("ignore:Sparse invariant checks")  # torch 2.11
def test_sparse_tensors_count_their_parts() -> None:
    dense = torch.eye(3)
    assert tensor_bytes(dense.to_sparse()) == 3 * 4 + 2 * 3 * 8
    rows, columns = torch.tensor([0, 1, 2, 3]), torch.tensor([0, 1, 2])
    compressed = torch.sparse_csr_tensor(
        rows, columns, torch.ones(3), (3, 3), check_invariants=True
    )
    assert tensor_bytes(compressed) == 3 * 4 + (4 + 3) * 8


# CUDA.


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_on_cuda_the_allocator_answers() -> None:
    held = torch.empty(1 << 20, dtype=torch.uint8, device="cuda")

    def fn(x: torch.Tensor) -> torch.Tensor:
        return torch.cat([x, x])

    peak = measure_peak(fn, held)
    assert peak.device.startswith("cuda:")
    assert peak.bytes == 2 << 20
    assert peak.total is not None and peak.reserved is not None
    assert peak.bytes < peak.total <= peak.reserved


def test_the_device_of_a_cuda_argument_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    figures = iter([100, 1100])
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: None)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: next(figures))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: next(figures))
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda device: 2048)
    assert measure_peak(lambda: None, device="cuda:1") == Peak(1000, "cuda:1", 2048, 1100)
