"""What loops read along a stride in every trip is copied in front of them, and nothing else is."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from helpers import assert_noted, loops, memopt, with_loop
from torch import Tensor, fx
from torch._inductor.utils import run_and_get_code

from memcompile.contiguous import make_contiguous

aten = torch.ops.aten

#: What is made of ``z`` (i, h, j, c) and a bias (j, k, h), with a number for each of i.
Use = Callable[[Tensor, Tensor], Tensor]


def attended(z: Tensor, bias: Tensor) -> Tensor:
    """Attention weights of ``z`` (i, h, j, c) with a bias (h, j, k), summed to (i,)."""
    return (z @ z.transpose(-1, -2) + bias).softmax(-1).square().sum((1, 2, 3))


def by_both(z: Tensor, w: Tensor) -> Tensor:
    """A product with ``w`` (c, k), and a sum with it."""
    return z @ w + w


#: What a loop over i reads of the bias, and whether a copy is made.
READ: dict[str, tuple[Use, bool]] = {
    "heads innermost": (lambda z, b: attended(z, b.permute(2, 0, 1)), True),
    "turned as well": (lambda z, b: attended(z, b.permute(2, 1, 0)), True),
    "one of the heads": (lambda z, b: attended(z, b[:, :, :1].permute(2, 0, 1)), True),
    "one for all queries": (lambda z, b: attended(z, b[:1].permute(2, 0, 1)), True),
    "twice": (
        lambda z, b: attended(z, b.permute(2, 0, 1)) + attended(z * 2, b.permute(2, 0, 1)),
        True,
    ),
    "contiguous": (lambda z, b: attended(z, b.permute(2, 0, 1).contiguous()), False),
    "one number": (lambda z, b: attended(z, b[:1, :1, :1].permute(2, 0, 1)), False),
    "one for all keys": (lambda z, b: attended(z, b[:, :1].permute(2, 0, 1)), False),
    "by a product as well": (
        lambda z, b: (
            attended(z, b.new_zeros(1)) + by_both(z.transpose(1, 2) * 2, b[0].T).sum((1, 2, 3))
        ),
        False,
    ),
    "a slice a trip": (lambda z, b: attended(z, b[:, :1].permute(0, 2, 1)[..., None, :]), False),
}


def in_loop(use: Use, length: int) -> tuple[fx.GraphModule, list[Tensor], Tensor]:
    """The graph with a loop over i, its inputs, and what it is to return."""
    torch.manual_seed(0)
    z, bias = torch.randn(length, 4, length, 4), torch.randn(length, length, 4)
    inputs = [z.double(), bias.double()]
    module = with_loop(lambda z, b: [use(z, b)], inputs, "_softmax")
    return module, inputs, use(*inputs)


def copies(module: fx.GraphModule) -> list[fx.Node]:
    """What stands in front of loops as a contiguous copy."""
    given = {node for loop in loops(module) for node in loop.args[3]}
    return [node for node in given if node.target is aten.permute.default]


@pytest.mark.parametrize("length", [12, 13])
@pytest.mark.parametrize("name", READ)
def test_what_each_trip_reads_along_a_stride_is_copied_once(name: str, length: int) -> None:
    use, able = READ[name]
    module, inputs, wanted = in_loop(use, length)
    before = copies(module)
    make_contiguous(module)
    assert (copies(module) != before) is able
    torch.testing.assert_close(module(*inputs)[0], wanted, rtol=1e-12, atol=1e-12)
    assert assert_noted(module, inputs)


@pytest.mark.parametrize("known", [True, False], ids=["known lengths", "any length"])
def test_kernels_of_loops_use_vectors_where_inductors_own_do_not(known: bool) -> None:
    """The bias of triangle attention, as Inductor's C++ reads it."""
    bias = torch.randn(64, 64, 4)

    def forward(z: Tensor, bias: Tensor) -> Tensor:
        return attended(z, bias.permute(2, 0, 1))

    def run(compiled: Callable[[Tensor, Tensor], Tensor]) -> tuple[Tensor, str]:
        torch.manual_seed(0)
        z = torch.randn(64, 4, 64, 4, requires_grad=True)
        if not known:
            torch._dynamo.mark_dynamic(z, (0, 2))
            torch._dynamo.mark_dynamic(bias, (0, 1))
        found, codes = run_and_get_code(lambda: compiled(z, bias))
        return found, "".join(codes)

    wanted, plain = run(torch.compile(forward))
    found, chunked = run(memopt(forward, "min", "inductor", passes="default,chunk"))
    assert "std::exp(" in plain and "while" not in plain
    assert "std::exp(" not in chunked and "while" in chunked
    torch.testing.assert_close(found, wanted)
