"""How kernels walk over memory, read off graphs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from memcompile.access import Access, access

aten, CONTIGUOUS = torch.ops.aten, torch.contiguous_format
X, ROW, PLANE = torch.rand(4, 6, 8), torch.rand(8), torch.rand(6, 8)


def last(function: Callable[..., Any], *inputs: torch.Tensor) -> Access:
    """The walk of the last op of a function."""
    graph = make_fx(function)(*inputs).graph
    return access(next(n for n in reversed(graph.nodes) if n.op == "call_function"))


@pytest.mark.parametrize(
    ("function", "inputs", "breaks"),
    [
        (lambda x: x * 2, [X], set()),
        (lambda x, row: x * row, [X, ROW], {-1}),
        (lambda x, plane: x + plane, [X, PLANE], {-2}),
        (lambda x, column: x + column, [X, X[:, :, :1].clone()], {-1}),
        (
            lambda x: aten.clone(x.transpose(0, 1), memory_format=torch.contiguous_format),
            [X],
            {-1, -2},
        ),
        (lambda x: x.sum(-1), [X], {-1}),
        (lambda x: x.sum((1, 2)), [X], {-2}),
        (lambda x: x.sum(1), [X], {-1, -2}),
        (lambda x: x.sum(), [X], set()),
    ],
)
def test_loops_are_merged_where_all_that_is_read_lies_so(
    function: Callable[..., Any], inputs: list[torch.Tensor], breaks: set[int]
) -> None:
    assert last(function, *inputs).breaks == breaks


def test_what_is_turned_on_the_way_is_moved() -> None:
    assert last(lambda x: aten.clone(x.mT, memory_format=CONTIGUOUS), X).moved
    assert not last(lambda x: x.mT * 2, X).moved, "the result lies as what it is made of"
    assert not last(lambda x: x.reshape(24, 8) * 2, X).moved
    assert not last(lambda x: aten.clone(x[:, :, :1].mT, memory_format=CONTIGUOUS), X[:1, :1]).moved


def test_nothing_is_known_of_library_calls_and_inputs() -> None:
    assert last(lambda a: a @ a.mT, PLANE) == Access()
    graph = make_fx(lambda x: x * 2)(X).graph
    assert access(next(iter(graph.nodes))) == Access()
