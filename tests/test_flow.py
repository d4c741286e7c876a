"""Every dimension rule the loops rely on, held against numbers."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from flow_audit import audit, audit_merged, call, flows, hold
from flow_cases import CASES, f
from hypothesis import given, settings, strategies as st
from torch import fx
from torch.fx.experimental.proxy_tensor import make_fx

from memcompile.analysis.flow import AUDITED, rules_for
from memcompile.analysis.merged import VIEWS
from memcompile.analysis.ops import op_name
from memcompile.analysis.rules import FACTORIES, OWN, Flow, Merged

aten, prims = torch.ops.aten, torch.ops.prims


def as_dtype(value: Any, dtype: torch.dtype) -> Any:
    """Floating values, and the dtypes that are asked for, in another precision."""
    if isinstance(value, (list, tuple)):
        return type(value)(as_dtype(item, dtype) for item in value)
    if isinstance(value, torch.Tensor) and value.dtype == torch.float64:
        return value.to(dtype)
    return value


@pytest.mark.parametrize("name", CASES)
def test_an_op_in_parts_is_the_op(name: str) -> None:
    case = CASES[name]
    found = audit(call(case.op, *case.args, **case.more))
    assert case.expected.items() <= found.items()


@pytest.mark.parametrize("name", CASES)
def test_what_is_sliced_behind_others_passes_as_its_dimension_does(name: str) -> None:
    """A dimension that is two of what is sliced: of every op the parts make the whole."""
    case = CASES[name]
    made = call(case.op, *case.args, **case.more)
    found = audit_merged(made)
    for argument, plain in case.expected.items() if op_name(made.node) not in VIEWS else ():
        size = made.arguments["abc".index(argument[0])].shape[int(argument[1:])]
        for outer in (n for n in range(2, size // 2 + 1) if size % n == 0):
            outputs = found[f"{argument[0]}{outer}*{argument[1:]}"]
            assert outputs.replace(f"{outer}*", "") == plain


LOW = [n for n, case in CASES.items() if case.asked and not n.startswith(("_fft", "view as"))]


@pytest.mark.parametrize("name", LOW)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_and_so_it_is_in_lower_precision(name: str, dtype: torch.dtype) -> None:
    case = CASES[name]
    found = audit(call(case.op, *as_dtype(case.args, dtype), **case.more), most=0)
    assert case.expected.items() <= found.items()


#: Rules that are there because DTensor has none in some release, a wrong one or a slow one.
NAMED = {
    "_fft_c2c",
    "_fft_c2r",
    "_fft_r2c",
    "argmax",
    "avg_pool2d",
    "cat",
    "constant_pad_nd",
    "convert_element_type",
    "convolution",
    "cumprod",
    "cumsum",
    "flip",
    "fma",
    "full",
    "index_add",
    "inductor_randint",
    "inductor_random",
    "max_pool2d_with_indices",
    "ne",
    "roll",
    "scatter",
    "scatter_add",
    "scatter_reduce",
    "select_scatter",
    "squeeze",
    "var_mean",
}


def test_every_rule_added_by_name_is_there_and_audited() -> None:
    assert set(OWN) >= NAMED
    audited = {case.op._schema.name.split("::")[-1] for case in CASES.values() if case.asked}
    assert set(OWN) - FACTORIES <= audited


def test_every_rule_that_is_asked_for_is_audited() -> None:
    """What DTensor says of an op that no case runs whole and in parts is not believed."""
    audited = {case.op._schema.name.split("::")[-1] for case in CASES.values()}
    assert audited >= AUDITED


# ---------------------------------------------------------------- whatever the lengths

LENGTHS = st.sampled_from([1, 2, 3, 4, 5, 6, 7, 9, 12, 13])
few = settings(max_examples=25)


def shapes(least: int = 1, most: int = 3) -> st.SearchStrategy[list[int]]:
    return st.lists(LENGTHS, min_size=least, max_size=most)


@few
@given(shapes(), st.data())
def test_operands_of_any_shapes_that_broadcast(shape: list[int], data: st.DataObject) -> None:
    def operand() -> torch.Tensor:
        rank = data.draw(st.integers(0, len(shape)))
        ones = data.draw(st.lists(st.booleans(), min_size=rank, max_size=rank))
        own = shape[len(shape) - rank :]
        return f(*(1 if one else size for size, one in zip(own, ones, strict=True)))

    op, count = data.draw(st.sampled_from([(aten.mul.Tensor, 2), (prims.fma.default, 3)]))
    operands = [f(*shape), *(operand() for _ in range(count - 1))]
    if op is prims.fma.default:
        operands = [value.expand(shape) for value in operands]
    found = audit(call(op, *operands))
    for dim, length in enumerate(shape):
        if length > 1:
            assert found[f"a{dim}"] == str(dim)


@settings(max_examples=10)
@given(LENGTHS, LENGTHS, LENGTHS, LENGTHS)
def test_products_of_any_lengths(batch: int, rows: int, inner: int, columns: int) -> None:
    found = audit(call(aten.bmm.default, f(batch, rows, inner), f(batch, inner, columns)))
    wanted = {"a0": "0", "a1": "1", "a2": "sum", "b0": "0", "b1": "sum", "b2": "2"}
    lengths = dict(zip(wanted, (batch, rows, inner, batch, inner, columns), strict=True))
    assert {k: w for k, w in wanted.items() if lengths[k] > 1} == found


REDUCTIONS = {
    aten.sum.dim_IntList: "sum",
    aten.amax.default: "max",
    aten.amin.default: "min",
    aten.mean.dim: None,
}


@few
@given(shapes(2), st.sampled_from(list(REDUCTIONS)), st.booleans(), st.data())
def test_reductions_over_any_dims(
    shape: list[int], op: Any, keep: bool, data: st.DataObject
) -> None:
    dims = data.draw(st.sets(st.integers(0, len(shape) - 1), min_size=1))
    found = audit(call(op, f(*shape), sorted(dims), keep))
    for dim, length in enumerate(shape):
        if length == 1:
            continue
        if dim in dims:
            assert found.get(f"a{dim}") == REDUCTIONS[op]
        else:
            place = dim if keep else dim - sum(d < dim for d in dims)
            assert found[f"a{dim}"] == str(place)


@few
@given(shapes(2), st.sampled_from(["cumsum", "flip", "roll", "_fft_r2c"]), st.data())
def test_ops_along_one_dimension_are_sliced_along_the_others(
    shape: list[int], op: str, data: st.DataObject
) -> None:
    dim = data.draw(st.integers(0, len(shape) - 1))
    x, own = f(*shape), {"cumsum": [dim], "flip": [[dim]], "roll": [[1], [dim]]}
    args = own.get(op, [[dim], 0, True])
    found = audit(call(getattr(aten, op).default, x, *args))
    assert found == {f"a{d}": str(d) for d, n in enumerate(shape) if d != dim and n > 1}


@st.composite
def views(draw: st.DrawFn) -> tuple[list[int], list[int]]:
    """Two shapes of one tensor: the same factors put together in two ways, with ones between."""
    factors = draw(st.lists(st.sampled_from([1, 2, 3, 4, 5]), min_size=1, max_size=4))

    def grouped() -> list[int]:
        shape, group = [], []
        for factor in factors:
            group.append(factor)
            if draw(st.booleans()):
                shape.append(math.prod(group))
                group = []
        return [*shape, math.prod(group)]

    return grouped(), grouped()


@settings(max_examples=60)
@given(views())
def test_views_split_and_merge_dimensions(both: tuple[list[int], list[int]]) -> None:
    before, after = both
    found = audit(call(aten.view.default, f(*before), after))
    if before == after:
        assert found == {f"a{d}": str(d) for d, n in enumerate(before) if n > 1}


@settings(max_examples=60)
@given(views())
def test_what_views_merge_behind_others_they_give_back(both: tuple[list[int], list[int]]) -> None:
    before, after = both
    audit_merged(call(aten.view.default, f(*before), after))
    made, back = (
        call(aten.view.default, f(*shape), list(other))
        for shape, other in ((before, after), (after, before))
    )
    for dim, length in enumerate(before):
        there = rules_for(length).given(made.node, [dim]) if length > 1 else None
        if there is not None and isinstance(there.outputs[0], Merged):
            hold(made, there, made.run(made.arguments, None))
            assert rules_for(length).given(back.node, there.outputs) == Flow(there.outputs, (dim,))
            assert rules_for(length).giving(back.node, 0, dim) == Flow(there.outputs, (dim,))


def test_the_rows_of_some_columns_pass_a_product() -> None:
    """A linear layer over pairs: what a chunk of columns is behind the rows comes out so."""
    merge = call(aten.view.default, f(2, 3, 5, 4), [30, 4])
    split = call(aten.view.default, f(30, 7), [2, 3, 5, 7])
    columns = Merged(0, 6)
    assert rules_for(5).given(merge.node, [2]) == Flow((2,), (columns,))
    product = call(aten.mm.default, f(30, 4), f(4, 7))
    assert rules_for(5).given(product.node, [columns, None]) == Flow((columns, None), (columns,))
    assert rules_for(5).given(split.node, [columns]) == Flow((columns,), (2,))
    weights = call(aten.mm.default, f(4, 30), f(30, 7))
    added = Flow((Merged(1, 6), columns), ("sum",))
    assert rules_for(5).given(weights.node, [None, columns]) == added
    assert audit_merged(weights).items() >= {"a6*1": "sum", "b6*0": "sum"}.items()


def test_two_of_what_is_sliced_and_three_of_it_do_not_meet() -> None:
    made = call(aten.add.Tensor, f(12, 5), f(12, 5))
    assert rules_for(2).given(made.node, [Merged(0, 6), Merged(0, 6)]) is not None
    assert rules_for(2).given(made.node, [Merged(0, 6), Merged(0, 3)]) is None
    assert rules_for(2).given(made.node, [Merged(0, 6), 0]) is None
    assert rules_for(2).given(call(aten.add.Tensor, f(12), f(1)).node, [Merged(0, 6), 0]) is None


def test_a_view_that_cuts_through_what_is_sliced_stops_the_flow() -> None:
    made = call(aten.view.default, f(6, 5), [10, 3])
    assert rules_for(5).given(made.node, [1]) is None
    assert rules_for(3).given(made.node, [Merged(0, 2)]) is None


def test_no_draw_is_made_in_parts_that_stand_apart() -> None:
    """Its elements go by their place in the whole: a trip would have to know many starts."""
    for draw in DRAWN.values():
        assert rules_for(3).giving(draw([6, 5], torch.tensor(3)).node, 0, Merged(0, 2)) is None
    constant = call(aten.full.default, [6, 5], 1.0)
    assert rules_for(3).giving(constant.node, 0, Merged(0, 2)) == Flow((), (Merged(0, 2),))


@few
@given(shapes(2, 4), st.data())
def test_permutations_move_the_slice_along(shape: list[int], data: st.DataObject) -> None:
    order = data.draw(st.permutations(range(len(shape))))
    found = audit(call(aten.permute.default, f(*shape), order))
    assert found == {f"a{d}": str(order.index(d)) for d, n in enumerate(shape) if n > 1}


@pytest.mark.parametrize("length", [37, 97, 100])
def test_lengths_that_chunks_do_not_divide(length: int) -> None:
    scores = call(aten.bmm.default, f(2, length, 3), f(2, 3, length))
    assert audit(scores).items() >= {"a1": "1", "b2": "2"}.items()


# ---------------------------------------------------------------- what there is no rule for


def no_rule(made: Any) -> bool:
    return not list(flows(made))


def test_an_op_nobody_knows_stops_the_flow() -> None:
    with torch.library._scoped_library("memcompile_flow", "FRAGMENT") as library:
        library.define("twice(Tensor x) -> Tensor")
        library.impl("twice", lambda x: 2 * x, "CompositeExplicitAutograd")
        library.impl("twice", lambda x: 2 * x, "Meta")
        assert no_rule(call(torch.ops.memcompile_flow.twice.default, f(6, 5)))
    assert not no_rule(call(aten.mul.Tensor, f(6, 5), 2)), "the same, known"


def test_what_draws_random_numbers_stops_the_flow() -> None:
    assert no_rule(call(aten.bernoulli.default, f(6, 5).abs()))
    assert no_rule(call(aten.rand_like.default, f(6, 5)))
    assert no_rule(call(aten.native_dropout.default, f(6, 5), 0.5, True))


def test_symbolic_sizes_stop_the_flow() -> None:
    def nodes(mode: str) -> dict[str, fx.Node]:
        traced = make_fx(lambda x: x.exp().expand(3, *x.shape), tracing_mode=mode)
        return {node.name: node for node in traced(f(6, 5)).graph.nodes}

    known, symbolic = nodes("fake"), nodes("symbolic")
    for name in ("exp", "expand"):
        assert rules_for(6).given(known[name], [0]) is not None
        assert rules_for(6).given(symbolic[name], [0]) is None


def test_a_sum_that_is_still_going_on_stops_the_flow() -> None:
    made = call(aten.mul.Tensor, f(6, 5), f(6, 5))
    assert rules_for(6).given(made.node, ["sum", None]) is None
    assert rules_for(6).given(made.node, [None, "max"]) is None


def test_what_is_normalised_over_is_needed_whole() -> None:
    assert "a1" not in audit(call(aten._softmax.default, f(6, 10), 1, False))
    assert "a1" not in audit(call(aten.native_layer_norm.default, f(6, 10), [10], None, None, 0.1))


def test_operands_sliced_along_different_dimensions_do_not_meet() -> None:
    made = call(aten.add.Tensor, f(6, 6), f(6, 6))
    assert rules_for(6).given(made.node, [0, 1]) is None


# ---------------------------------------------------------------- from the output back


def test_a_slice_of_the_output_is_traced_back_to_the_operands() -> None:
    made = call(aten.bmm.default, f(6, 5, 4), f(6, 4, 7))
    backward = [rules_for(n).giving(made.node, 0, dim) for dim, n in enumerate((6, 5, 7))]
    assert backward == [Flow((0, 0), (0,)), Flow((1, None), (1,)), Flow((None, 2), (2,))]


def test_any_output_of_several_can_be_asked_for() -> None:
    made = call(aten.var_mean.correction, f(6, 5, 4), [2], correction=0)
    for output in (0, 1):
        flow = rules_for(5).giving(made.node, output, 1)
        assert flow == Flow((1,), (1, 1))
    assert rules_for(5).giving(made.node, 2, 1) is None


@given(shapes(), st.sampled_from([0.0, -1.5, 3]))
def test_a_constant_tensor_is_made_in_parts(shape: list[int], value: float) -> None:
    made = call(aten.full.default, shape, value, dtype=torch.float64)
    for dim, length in enumerate(shape):
        if length > 1:
            flow = rules_for(length).giving(made.node, 0, dim)
            assert flow == Flow((), (dim,))
            hold(made, flow, made.run([], None))


DRAWN = {
    "rand": lambda shape, seed: call(prims.inductor_random.default, shape, seed, "rand"),
    "randint": lambda shape, seed: call(prims.inductor_randint.default, 0, 9, shape, seed),
}


@pytest.mark.parametrize("name", DRAWN)
def test_a_draw_from_a_seed_is_made_in_parts_of_a_whole_seed(name: str) -> None:
    """That the parts are the draw is held in test_draws.py."""
    made = DRAWN[name]([6, 5, 7], torch.tensor(3))
    for dim, length in enumerate([6, 5, 7]):
        assert rules_for(length).giving(made.node, 0, dim) == Flow((None,), (dim,))


@pytest.mark.parametrize("own", [{}, {"align_dtype": torch.bfloat16}], ids=["", "low"])
def test_a_draw_of_eagers_numbers_is_not_made_in_parts(own: dict[str, Any]) -> None:
    """``align_random_eager``: what stands for the seed holds two numbers."""
    known = {argument.name for argument in prims.inductor_random.default._schema.arguments}
    if not own.keys() <= known:
        pytest.skip("this torch draws eager's numbers in no lower precision")
    made = call(prims.inductor_random.default, [6, 5], torch.tensor([3, 0]), "rand", **own)
    assert rules_for(6).giving(made.node, 0, 0) is None


def test_numbers_that_count_are_not_made_in_parts() -> None:
    counted = call(prims.iota.default, 6, start=0, step=1, dtype=torch.int64,
                   device="cpu", requires_grad=False)  # fmt: skip
    assert rules_for(6).giving(counted.node, 0, 0) is None
