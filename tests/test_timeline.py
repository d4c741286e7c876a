"""Which ops hold memory, and for how long: lists of ops, no graphs."""

import dataclasses

import pytest

from memcompile.analysis.timeline import Kind, Op, Timeline, simulate

DRAW, READ, CALLED = 1000, 10, 30  #: bytes


def lay(draw: Op, *after: Op) -> Timeline:
    """A random draw (place 1, from the seed at place 0) and what follows it."""
    seed = Op("seed", Kind.SOURCE, (), 0)
    return simulate([seed, draw, *after])


def random_draw(drawn: bool = True, **more: bool) -> Op:
    return Op("draw", Kind.POINTWISE, (0,), DRAW, drawn=drawn, **more)


def reader(*inputs: int) -> Op:
    return Op("reader", Kind.POINTWISE, inputs, READ, keep=True)


def call(*inputs: int) -> Op:
    """A library call: what comes after it is another kernel than what came before."""
    return Op("call", Kind.EXTERN, inputs, CALLED)


def holds(line: Timeline) -> bool:
    """Whether the draw is a buffer."""
    return line.real.real[1]


def test_a_draw_with_one_reader_is_drawn_inside_its_kernel() -> None:
    line = lay(random_draw(), reader(1))
    assert not holds(line)
    assert line.peak == READ


def test_readers_that_share_a_kernel_share_the_draw() -> None:
    line = lay(random_draw(), reader(1), reader(1))
    assert not holds(line)
    assert line.peak == 2 * READ


def test_a_draw_with_a_reader_on_each_side_of_a_library_call_is_a_buffer() -> None:
    line = lay(random_draw(), reader(1), call(2), reader(1, 3))
    assert holds(line)
    assert line.last[1] == 4, "it is held for the far reader"
    assert all(bytes_alive >= DRAW for bytes_alive in line.live[1:])
    assert line.peak == DRAW + 2 * READ + CALLED


def test_a_cheap_value_with_the_same_readers_is_computed_in_each() -> None:
    line = lay(random_draw(drawn=False), reader(1), call(2), reader(1, 3))
    assert not holds(line)
    assert line.peak == 2 * READ + CALLED


def test_a_draw_whose_one_reader_is_far_is_drawn_there() -> None:
    """It needs nothing but its seed, so it is not drawn before the library call."""
    line = lay(random_draw(), call(0), reader(1, 2))
    assert not holds(line)
    assert line.peak == CALLED + READ


def test_a_draw_that_a_library_call_reads_is_a_buffer() -> None:
    line = lay(random_draw(), call(1))
    assert holds(line)
    assert line.peak == DRAW + CALLED


def test_a_draw_that_the_caller_keeps_is_a_buffer() -> None:
    line = lay(random_draw(keep=True), reader(1))
    assert holds(line)
    assert line.peak == DRAW + READ


# ------------------------------------------------------------------- kernels and calls


def source(size: int = 0) -> Op:
    return Op("source", Kind.SOURCE, (), size)


def test_a_sum_is_not_held_open_for_a_reader_that_waits_for_a_library_call() -> None:
    """What it reads is gone by then (pytorch #193193)."""
    big = Op("big", Kind.EXTERN, (0,), 1000)
    total = Op("sum", Kind.REDUCTION, (1,), 8)
    line = simulate(
        [source(), big, total, call(0), Op("add", Kind.POINTWISE, (2, 3), 8, keep=True)]
    )
    assert line.real.real[2]
    assert line.last[1] == 2


def test_a_sum_that_waits_for_nothing_new_stays_inside_its_readers_kernel() -> None:
    total = Op("sum", Kind.REDUCTION, (1,), 8)
    line = simulate([source(), call(0), total, Op("mul", Kind.POINTWISE, (1, 2), 30, keep=True)])
    assert not line.real.real[2]


def test_what_is_read_in_another_shape_by_a_library_call_alone_is_its_copy() -> None:
    """Inductor writes the reshaped value for the call; others compute it in place."""
    value = Op("value", Kind.POINTWISE, (0,), 100)
    reshaping = Op("call", Kind.EXTERN, (1,), 30, reshaped=(1,))
    line = simulate(
        [source(50), value, reshaping, Op("other", Kind.POINTWISE, (1, 2), 9, keep=True)]
    )
    assert line.real.real[1]
    assert line.last[1] == 2, "the call's copy is not read again"
    assert line.last[0] == 3, "the other reader starts from what the value was made of"


def test_an_exponential_on_the_way_is_not_computed_twice() -> None:
    inner = Op("exp", Kind.POINTWISE, (0,), 100, heavy=True)
    outer = Op("silu", Kind.POINTWISE, (1,), 100)
    line = simulate([source(), inner, outer, call(2), reader(2, 3)])
    twice = simulate([source(), inner, outer, reader(2), call(3), reader(2, 4)])
    assert not line.real.real[1] and line.real.real[2], "a library call reads it"
    assert twice.real.real[2], "and so do two kernels"


def kernels_after(size: int) -> list[Op]:
    """Two kernels between library calls; the first one frees ``size`` bytes."""
    return [
        source(),
        Op("one", Kind.EXTERN, (0,), size),
        Op("large", Kind.EXTERN, (0,), 1000),
        Op("sum", Kind.REDUCTION, (1,), 10, keep=True),
        Op("other", Kind.REDUCTION, (0,), 40, keep=True),
        Op("two", Kind.EXTERN, (2,), 0),
    ]


def test_kernels_between_two_library_calls_allocate_together_on_a_cpu() -> None:
    """They are one C++ function: its outputs before it starts, its inputs until it ends."""
    ops = kernels_after(50)
    assert simulate(ops).live[4] == 1050
    assert simulate(ops, grouped=True).live[4] == 1100
    assert simulate(ops, grouped=True).live[-1] == 1050


def test_a_function_ends_where_it_has_done_with_much() -> None:
    ops = kernels_after(100)
    assert simulate(ops).live == simulate(ops, grouped=True).live


ROWS, PLANES = frozenset({-1}), frozenset({-1, -2})  #: how far the loops of a kernel are merged


def test_what_a_sum_reads_too_is_written_over_where_both_walk_the_same_loops() -> None:
    """Else Inductor would have to be past the sum before the first result is written."""

    def peak(breaks: frozenset[int]) -> int:
        scores = Op("scores", Kind.EXTERN, (0,), 100)
        total = Op("sum", Kind.REDUCTION, (1,), 10, breaks=ROWS)
        scaled = Op("scaled", Kind.POINTWISE, (1,), 100, breaks=breaks)
        softmax = Op("softmax", Kind.POINTWISE, (3, 2), 100, keep=True, breaks=ROWS)
        return simulate([source(), scores, total, scaled, softmax]).peak

    assert peak(ROWS) == 100
    assert peak(PLANES) == 200, "a mask of one plane keeps its loops apart"


def test_what_is_read_in_another_order_is_not_written_over() -> None:
    product = Op("product", Kind.EXTERN, (0,), 100)
    turned = Op("copy", Kind.POINTWISE, (1,), 100, moved=(1,))
    doubled = Op("doubled", Kind.POINTWISE, (1,), 100, keep=True)
    inside = Op("doubled", Kind.POINTWISE, (2,), 100, keep=True)
    assert simulate([source(), product, doubled]).peak == 100
    assert simulate([source(), product, dataclasses.replace(turned, keep=True)]).peak == 200
    assert simulate([source(), product, turned, inside]).peak == 200


def test_what_a_loop_has_written_is_written_over_by_no_kernel_of_its_graph() -> None:
    """Where it was saved for a backward, it is there like anything else that was."""

    def peak(written: Op) -> int:
        return simulate([written, Op("scaled", Kind.POINTWISE, (0,), 100, keep=True)]).peak

    assert peak(Op("product", Kind.EXTERN, (), 100)) == 100
    assert peak(Op("filled", Kind.EXTERN, (), 100, group="loop")) == 200
    assert peak(Op("saved", Kind.SOURCE, (), 100)) == 100


@pytest.mark.parametrize("third", [True, False])
def test_in_a_loops_body_a_third_reader_parts_sums_from_what_overwrites(third: bool) -> None:
    ops = [
        Op("w", Kind.SOURCE, (), 0, owned=False),
        Op("product", Kind.EXTERN, (0,), 1000),
        Op("sums", Kind.REDUCTION, (1,), 10, breaks=ROWS),
        Op("one of them", Kind.POINTWISE, (1, 2) if third else (2,), 0, keep=True),
        Op("gradient", Kind.POINTWISE, (1, 2), 1000, breaks=PLANES),
        Op("reader", Kind.EXTERN, (4,), 10),
    ]
    whole, parted = (simulate(ops, grouped=True, parted=parted).peak for parted in (False, True))
    assert whole >= 2000
    assert (parted < 1500) is third
