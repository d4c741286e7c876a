"""Which ops hold memory, and for how long: lists of ops, no graphs."""

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
