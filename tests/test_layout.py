"""What a loop fills lies as the products want it that read it whole."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from helpers import assert_noted, first_body, with_loop
from torch import Tensor, fx

from memcompile.layout import PRODUCTS, is_taken_as_it_lies, lay_out

aten = torch.ops.aten


def outgoing(z: Tensor, factor: Tensor) -> Tensor:
    """Sums over k of ``z`` (i, k, c) times ``factor`` (j, k, c), as (i, j, c)."""
    return torch.bmm(z.sin().permute(2, 0, 1), factor.permute(2, 1, 0)).permute(1, 2, 0)


def incoming(z: Tensor, factor: Tensor) -> Tensor:
    """Sums over k of ``z`` (k, i, c) times ``factor`` (k, j, c), as (i, j, c)."""
    return torch.bmm(z.sin().permute(2, 1, 0), factor.permute(2, 0, 1)).permute(1, 2, 0)


#: What a step makes of a factor that a loop fills, and whether products alone read it.
STEPS: dict[str, tuple[Callable[[Tensor, Tensor], list[Tensor]], bool]] = {
    "rows": (lambda z, f: [outgoing(z, f)], True),
    "columns": (lambda z, f: [incoming(z, f)], True),
    "both": (lambda z, f: [outgoing(z, f) + incoming(z, f)], True),
    "returned": (lambda z, f: [outgoing(z, f), f], False),
    "a view returned": (lambda z, f: [outgoing(z, f), f.flatten(1)], False),
    "read by channel": (lambda z, f: [outgoing(z, f), f.sum(-1)], False),
    "rows flattened": (lambda z, f: [outgoing(z, f), f.reshape(-1, 4) @ f.new_ones(4, 3)], False),
}


def operands(module: fx.GraphModule) -> list[Tensor]:
    """What batched products read, in the graph and in its loops."""
    graphs = [m.graph for m in module.modules() if isinstance(m, fx.GraphModule)]
    return [
        node.args[at].meta["val"]
        for graph in graphs
        for node in graph.nodes
        for at in PRODUCTS.get(node.target, ())
    ]


@pytest.mark.parametrize("length", [12, 13])
@pytest.mark.parametrize("name", STEPS)
def test_a_factor_lies_as_its_products_read_it_where_nothing_else_does(
    name: str, length: int
) -> None:
    use, able = STEPS[name]

    def forward(z: Tensor, w: Tensor) -> list[Tensor]:
        wide = (z @ w).tanh()  # never whole
        return use(z, wide @ w.T)

    inputs = [torch.randn(length, length, 4, dtype=torch.float64), torch.randn(4, 9).double()]
    module = with_loop(forward, inputs, "tanh")
    given = [each.clone() for each in inputs]
    wanted = forward(*given)
    before = [is_taken_as_it_lies(each) for each in operands(module)]
    assert not all(before)
    lay_out(module)
    after = [is_taken_as_it_lies(each) for each in operands(module)]
    assert sum(after) == sum(before) + able * (2 if name == "both" else 1)
    for got, want in zip(module(*inputs), wanted, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
        assert got.stride() == want.stride(), "what is returned lies as it did"


def test_what_is_noted_of_a_buffer_is_how_it_lies() -> None:
    """Kernels are made by the notes: a wrong one would be a wrong read."""

    def forward(z: Tensor, w: Tensor) -> list[Tensor]:
        return outgoing(z, (z @ w).tanh() @ w.T)

    inputs = [torch.randn(13, 13, 4), torch.randn(4, 9)]
    module = with_loop(lambda z, w: [forward(z, w)], inputs, "tanh")
    lay_out(module)
    assert assert_noted(module, inputs) > 10


def test_products_take_rows_or_columns_as_they_lie_and_nothing_else() -> None:
    """Measured against what torch itself copies: see the module's docstring."""
    whole = torch.empty(5, 6, 7)
    assert is_taken_as_it_lies(whole)
    assert is_taken_as_it_lies(whole.transpose(1, 2))
    assert is_taken_as_it_lies(whole[:, ::2])
    assert is_taken_as_it_lies(whole.transpose(0, 1)), "a batch may be apart"
    assert not is_taken_as_it_lies(whole.permute(2, 0, 1))
    assert not is_taken_as_it_lies(whole[:, :, ::2])


def product(rows: Tensor, factor: Tensor) -> Tensor:
    """Sums over k of ``rows`` (i, k, c) times ``factor`` (j, k, c), as (i, j, c)."""
    return torch.bmm(rows.permute(2, 0, 1), factor.permute(2, 1, 0)).permute(1, 2, 0)


#: What a loop over rows reads whole, and how many of its products' operands lie well then.
WHOLE: dict[str, tuple[Callable[[Tensor, Tensor], list[Tensor]], int]] = {
    "once": (lambda rows, f: [product(rows, f).cos()], 2),
    "twice, also turned": (
        lambda rows, f: [(product(rows, f) + product(rows * 2, f.transpose(0, 1))).cos()],
        3,  # not the rows that are read elementwise as well
    ),
    "also returned": (lambda rows, f: [product(rows, f).cos(), f * 1], 1),
}


@pytest.mark.parametrize("length", [12, 13])
@pytest.mark.parametrize("name", WHOLE)
def test_what_is_made_elementwise_lies_as_products_in_loops_read_it(name: str, length: int) -> None:
    use, lie_well = WHOLE[name]
    x, z = (torch.randn(length, length, 4).double() for _ in range(2))
    w = torch.randn(4, 4).double()
    wanted = use((x @ w).tanh(), z.exp())

    module = with_loop(lambda x, w, f: use((x @ w).tanh(), f), [x, w, z], "cos")
    factor = module.graph.find_nodes(op="placeholder")[2]  # instead of it what is made of it
    with module.graph.inserting_after(factor):
        made = module.graph.call_function(aten.exp.default, (factor,))
    made.meta = dict(factor.meta)
    factor.replace_all_uses_with(made, delete_user_cb=lambda user: user is not made)
    module.recompile()

    assert not any(is_taken_as_it_lies(each) for each in operands(module))
    lay_out(module)
    assert sum(map(is_taken_as_it_lies, operands(first_body(module)))) == lie_well
    for got, want in zip(module(x, w, z), wanted, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
        assert got.stride() == want.stride()
