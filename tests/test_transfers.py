"""Copies to the host and back: when they are over, when they begin, and what keeps them safe."""

from __future__ import annotations

import contextlib
import gc
import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings, strategies as st

from memcompile import _torch
from memcompile._torch import transfers
from memcompile.analysis.timeline import Kind, Op, materialise, simulate
from memcompile.analysis.transfers import MARGIN, Copy, back, out

RATE = MARGIN  # a byte a second, margin and all


# -- schedules -----------------------------------------------------------------------------


def test_a_copy_out_is_waited_for_where_it_is_over() -> None:
    found = out([Copy(0, 3)], [1.0] * 6, RATE)
    assert found.places == (3,)  # from second 1 on: over at 4
    assert found.stalls == (0.0,) and found.busy == pytest.approx(3)


def test_copies_queue() -> None:
    found = out([Copy(0, 2), Copy(1, 2)], [1.0] * 7, RATE)
    assert found.places == (2, 4)  # the second starts at 3, where the first is over
    assert sum(found.stalls) == 0


def test_what_is_not_over_at_the_end_is_waited_for_there() -> None:
    found = out([Copy(0, 2), Copy(1, 8)], [1.0] * 4, RATE)
    assert found.places == (2, 3)
    assert found.stalls == pytest.approx((0.0, 7.0))


def test_waiting_frees_at_once_and_costs_seconds() -> None:
    patient, hasty = (out([Copy(0, 3, waits, until=1)], [1.0] * 6, RATE) for waits in (False, True))
    assert (patient.places, hasty.places) == ((3,), (1,))
    assert hasty.stalls == pytest.approx((2.0,))


def test_waiting_for_a_copy_is_waiting_for_those_before_it() -> None:
    found = out([Copy(0, 3), Copy(1, 1, True, until=1)], [1.0] * 6, RATE)
    assert found.places == (1, 1)
    assert found.stalls == pytest.approx((2.0, 1.0))


def test_a_copy_back_begins_so_early_that_it_is_over_where_it_is_read() -> None:
    found = back([Copy(5, 2)], [1.0] * 8, RATE)
    assert found.places == (3,) and found.stalls == (0.0,)
    found = back([Copy(5, 2), Copy(6, 2)], [1.0] * 8, RATE)
    assert found.places == (2, 4) and sum(found.stalls) == 0


def test_a_copy_back_that_cannot_be_hidden_costs_seconds() -> None:
    found = back([Copy(1, 5)], [1.0] * 4, RATE)
    assert found.places == (0,) and found.stalls == pytest.approx((4.0,))
    found = back([Copy(2, 2, True)], [1.0] * 4, RATE)
    assert found.places == (2,) and found.stalls == pytest.approx((2.0,))


steps = st.lists(st.floats(0.0, 4.0), min_size=2, max_size=12)
moves = st.lists(st.tuples(st.integers(0, 11), st.integers(1, 9), st.booleans()), max_size=6)


def drawn_copies(drawn: list[tuple[int, int, bool]], last: int) -> list[Copy]:
    copies = [Copy(min(at, last), size, waits, min(at + 1, last)) for at, size, waits in drawn]
    return sorted(copies, key=lambda copy: copy.at)


@given(steps, moves)
@settings(max_examples=200, deadline=None)
def test_copies_out_are_over_where_they_are_waited_for(
    seconds: list[float], drawn: list[tuple[int, int, bool]]
) -> None:
    copies = drawn_copies(drawn, len(seconds) - 1)
    found = out(copies, seconds, RATE)
    clock, free, over = 0.0, 0.0, dict[int, float]()
    for place, spent in enumerate(seconds):
        clock += spent
        for number, copy in enumerate(copies):
            if copy.at == place:
                free = over[number] = max(free, clock) + copy.bytes
        for number, copy in enumerate(copies):
            if number in over and found.places[number] > place:
                assert over[number] > clock, "waited for later than need be"
                assert not copy.waits or copy.until > place
            elif found.places[number] == place:
                clock = max(clock, over[number])
    assert clock == pytest.approx(sum(seconds) + sum(found.stalls))
    assert sum(found.stalls) <= found.busy + 1e-9  # nobody waits for an idle link


@given(steps, moves)
@settings(max_examples=200, deadline=None)
def test_copies_back_are_hidden_where_they_can_be(
    seconds: list[float], drawn: list[tuple[int, int, bool]]
) -> None:
    copies = drawn_copies(drawn, len(seconds) - 1)
    found = back(copies, seconds, RATE)
    starts = list(itertools.accumulate(seconds, initial=0.0))
    latest = float("inf")  # when the first must begin for all to be over in time
    for copy, place in zip(copies[::-1], found.places[::-1], strict=True):
        latest = min(latest, starts[copy.at]) - copy.bytes
        assert 0 <= place <= copy.at
        assert place == copy.at or not copy.waits
    if latest >= 0 and not any(copy.waits for copy in copies):
        assert sum(found.stalls) == pytest.approx(0, abs=1e-9)
    assert sum(found.stalls) <= found.busy + 1e-9


# -- the timeline --------------------------------------------------------------------------


def test_memory_is_held_for_a_copy_and_taken_ahead_of_one() -> None:
    ops = [
        Op("a", Kind.EXTERN, (), 10),
        Op("b", Kind.EXTERN, (0,), 1),
        Op("c", Kind.EXTERN, (1,), 1),
        Op("back", Kind.EXTERN, (), 10, moves=10),
        Op("d", Kind.EXTERN, (2, 3), 1, keep=True),
    ]
    assert simulate(ops).live == [10, 11, 2, 11, 12]
    assert simulate(ops, held={0: 2}).live == [10, 11, 12, 11, 12]
    line = simulate(ops, since={3: 1})
    assert line.live == [10, 21, 12, 11, 12]
    assert 3 in line.alive(1) and 3 not in line.alive(0)
    assert simulate(ops, real=materialise(ops), held={0: 0}).live == simulate(ops).live


def test_nothing_is_written_over_what_is_being_copied() -> None:
    ops = [Op("a", Kind.EXTERN, (), 10), Op("b", Kind.POINTWISE, (0,), 10, keep=True)]
    assert simulate(ops).peak == 10
    ops.append(Op("c", Kind.EXTERN, (1,), 1, keep=True))
    assert simulate(ops, held={0: 2}).live == [10, 20, 21]


# -- the ops, on the CPU -------------------------------------------------------------------

dtypes = st.sampled_from([torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.bool])


@given(st.lists(st.integers(0, 4), min_size=0, max_size=4), st.randoms(), dtypes)
@settings(max_examples=60, deadline=None)
def test_what_comes_back_has_its_bits_and_strides(
    shape: list[int], random: Any, dtype: torch.dtype
) -> None:
    order = list(range(len(shape)))
    random.shuffle(order)
    value = (torch.rand(shape) * 7).to(dtype).permute(order)
    host = transfers.wait(transfers.offload(value), value)
    again = transfers.wait(transfers.reload(host, torch.device("cpu")))
    assert torch.equal(again, value) and again.stride() == value.stride()
    assert again.dtype == dtype and host.device.type == "cpu"
    assert not value.numel() or again.data_ptr() != value.data_ptr()


def test_fakes_say_where_it_lies() -> None:
    with torch._subclasses.FakeTensorMode():
        value = torch.empty(4, 6, device="cuda").t()
        host = transfers.offload(value)
        assert host.device.type == "cpu" and host.stride() == value.stride()
        assert transfers.wait(host, value) is host
        assert transfers.reload(host, torch.device("cuda")).device.type == "cuda"


@pytest.mark.parametrize("op", [transfers.offload, transfers.reload, transfers.wait])
def test_the_ops_are_told_apart(op: Any) -> None:
    assert transfers.is_transfer(op)
    assert not transfers.is_transfer(torch.ops.aten.mm.default)


# -- streams -------------------------------------------------------------------------------


class Streams:
    """Stands for a device: notes who waits for what."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.said: list[str] = []
        self.owner, self.copies = self.stream("kernels"), self.stream("copies")
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: self.owner)
        monkeypatch.setattr(torch.cuda, "stream", self.inside)
        monkeypatch.setattr(transfers, "_stream", lambda device: self.copies)

    @contextlib.contextmanager
    def inside(self, stream: Any) -> Any:
        self.said.append(f"in {stream.name}")
        yield

    def stream(self, name: str) -> Any:
        said = self.said

        class Stream:
            def __init__(self) -> None:
                self.name = name

            def wait_stream(self, other: Any) -> None:
                said.append(f"{name} wait for {other.name}")

            def wait_event(self, event: str) -> None:
                said.append(f"{name} wait until {event}")

            def record_event(self) -> str:
                return "copied"

        return Stream()


@pytest.fixture
def streams(monkeypatch: pytest.MonkeyPatch) -> Streams:
    return Streams(monkeypatch)


def begin(source: torch.Tensor) -> torch.Tensor:
    return transfers._begin(source, torch.empty_like(source), torch.device("cuda:0"))


def test_a_copy_runs_beside_the_kernels_and_they_wait_for_it(streams: Streams) -> None:
    target = begin(torch.ones(3))
    assert streams.said == ["copies wait for kernels", "in copies"]
    assert transfers.copies_under_way() == 1
    assert transfers.wait(target) is target  # the same tensor: nothing else frees it
    assert streams.said[2:] == ["kernels wait until copied"]
    assert transfers.copies_under_way() == 0
    del target
    gc.collect()
    assert len(streams.said) == 3  # once


def test_memory_that_is_still_written_to_is_waited_for_when_it_dies(streams: Streams) -> None:
    target = begin(torch.ones(3))

    def interrupted(moved: torch.Tensor) -> None:
        raise RuntimeError("in the middle of a step")

    with pytest.raises(RuntimeError, match="middle"):
        interrupted(target)
    del target
    gc.collect()
    assert streams.said[2:] == ["kernels wait until copied"]
    assert transfers.copies_under_way() == 0


def test_a_copy_outlives_its_first_name(streams: Streams) -> None:
    """Compiled code hands tensors through the dispatcher: their death is what counts."""
    target = begin(torch.ones(3))
    other = torch.ops.aten.alias.default(target)
    assert transfers.copies_under_way() == 1
    assert transfers.wait(target) is target
    assert torch.equal(other, torch.ones(3))


def test_nothing_is_copied_of_nothing(streams: Streams) -> None:
    target = begin(torch.ones(0, 3))
    assert transfers.wait(target) is target
    assert not streams.said and not transfers.copies_under_way()


def test_each_copy_is_one_of_its_own(streams: Streams) -> None:
    held = [begin(torch.ones(n)) for n in (1, 2, 3)]
    assert transfers.copies_under_way() == 3
    for target in held[::-1]:
        transfers.wait(target)
    assert transfers.copies_under_way() == 0


def test_kernels_are_recorded_only_where_asked() -> None:
    assert not _torch.records_kernels()
    assert _torch.mode_patches("reduce-overhead")["triton.cudagraphs"] is True
