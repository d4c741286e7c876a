"""Private torch that random draws need: Inductor's lowerings, and how Triton's kernels draw.

Checked by running on torch 2.13.0 (CPU). Inductor turns a random op into a seed and a draw
whose every element is a function of that seed and of the element's place in the whole
tensor. So a part of it can be drawn alone: the two ops below do that, lowered as the whole
draws are (``inductor_random`` and ``inductor_randint`` of ``torch/_inductor/lowering.py``).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

import torch
from torch._inductor import ir
from torch._inductor.codegen.triton import TritonOverrides
from torch._inductor.lowering import register_lowering
from torch._inductor.ops_handler import OpsHandler
from torch._inductor.virtualized import ops

__all__ = [
    "OpsHandler",
    "TritonOverrides",
    "draw_part",
    "exact_draws",
    "ir",
    "ops",
    "register_lowering",
]

_library = torch.library.Library("memcompile", "FRAGMENT")
_PLACE = "int dim, SymInt start, SymInt length"
_library.define(f"random_part(SymInt[] whole, Tensor seed, str mode, {_PLACE}) -> Tensor")
_library.define(f"randint_part(int low, int high, SymInt[] whole, Tensor seed, {_PLACE}) -> Tensor")
_random_part = torch.ops.memcompile.random_part.default
_randint_part = torch.ops.memcompile.randint_part.default


def draw_part(name: str, args: Sequence[Any], dim: int, start: Any, length: int) -> torch.Tensor:
    """A part of what a draw would be, of the same bits.

    Args:
        name: of the prim, ``"inductor_random"`` or ``"inductor_randint"``.
        args: its arguments; the size among them is that of the whole.
        dim: along which the part is taken.
        start: where it begins along ``dim``; an integer, symbolic or not.
        length: of the part along ``dim``.
    """
    op = {"inductor_random": _random_part, "inductor_randint": _randint_part}[name]
    return op(*args, dim, start, length)


# -- run op by op -------------------------------------------------------------------------


def _generator(seed: torch.Tensor) -> torch.Generator:
    return torch.Generator(seed.device).manual_seed(int(seed))


def _random_eager(
    whole: list[int], seed: torch.Tensor, mode: str, dim: int, start: int, length: int
) -> torch.Tensor:
    """Numbers of the seed and the place alone, but not those of Inductor's kernels."""
    draw = {"rand": torch.rand, "randn": torch.randn}[mode]
    options: dict[str, Any] = {"dtype": torch.float32, "device": seed.device}
    return draw(whole, generator=_generator(seed), **options).narrow(dim, start, length).clone()


def _randint_eager(
    low: int, high: int, whole: list[int], seed: torch.Tensor, dim: int, start: int, length: int
) -> torch.Tensor:
    generator = _generator(seed)
    drawn = torch.randint(low, high, whole, generator=generator, device=seed.device)
    return drawn.narrow(dim, start, length).clone()


_library.impl("random_part", _random_eager, "CompositeExplicitAutograd")
_library.impl("randint_part", _randint_eager, "CompositeExplicitAutograd")


def _local(whole: Sequence[int], dim: int, length: int) -> list[int]:
    return [*whole[:dim], length, *whole[dim + 1 :]]


@torch.library.register_fake(_random_part, lib=_library)
def _random_fake(
    whole: list[int], seed: torch.Tensor, mode: str, dim: int, start: int, length: int
) -> torch.Tensor:
    return seed.new_empty(_local(whole, dim, length), dtype=torch.float32)


@torch.library.register_fake(_randint_part, lib=_library)
def _randint_fake(
    low: int, high: int, whole: list[int], seed: torch.Tensor, dim: int, start: int, length: int
) -> torch.Tensor:
    return seed.new_empty(_local(whole, dim, length), dtype=torch.int64)


# -- lowered by Inductor ------------------------------------------------------------------


def _places(whole: Sequence[int], seed: Any, dim: int, start: Any) -> Callable[..., Any]:
    """From an index into the part to the place in the whole, as the whole's draw counts it."""
    strides = ir.FlexibleLayout.contiguous_strides(whole)
    layout = ir.FixedLayout(seed.get_device_or_error(), torch.int32, list(whole), strides)
    place = layout.make_indexer()

    def at(index: Sequence[Any]) -> Any:
        moved = [*index[:dim], index[dim] + start, *index[dim + 1 :]]
        return ops.index_expr(place(moved), torch.int32)

    return at


def _drawn(draw: Callable[..., Any], seed: Any, size: list[int], dtype: torch.dtype) -> Any:
    return ir.Pointwise.create(
        device=seed.get_device_or_error(), dtype=dtype, inner_fn=draw, ranges=size
    )


@register_lowering(_random_part, type_promotion_kind=None)
def _lower_random(
    whole: Sequence[int], seed: Any, mode: str, dim: int, start: Any, length: int
) -> Any:
    place, load = _places(whole, seed, dim, start), seed.make_loader()

    def draw(index: Sequence[Any]) -> Any:
        return getattr(ops, mode)(load([]), place(index))

    drawn = _drawn(draw, seed, _local(whole, dim, length), torch.float32)
    drawn.realize()  # as the whole is: drawn once, however many kernels read it
    return drawn


@register_lowering(_randint_part, type_promotion_kind=None)
def _lower_randint(
    low: int, high: int, whole: Sequence[int], seed: Any, dim: int, start: Any, length: int
) -> Any:
    place, load = _places(whole, seed, dim, start), seed.make_loader()

    def draw(index: Sequence[Any]) -> Any:
        number = ops.value_expr if hasattr(OpsHandler, "value_expr") else ops.index_expr  # 2.11
        bounds = (number(bound, torch.int64) for bound in (low, high))
        return ops.randint64(load([]), place(index), *bounds)

    return _drawn(draw, seed, _local(whole, dim, length), torch.int64)


@contextlib.contextmanager
def exact_draws() -> Iterator[None]:
    """Within the block, Triton kernels draw each element by its place and nothing else.

    torch 2.13 draws four numbers at a time in kernels of one dimension, and takes the places
    in a block to follow one another. Where they do not (a permuted mask, a part of a draw)
    numbers repeat, and the same draw in a kernel of another shape, as in a backward, gives
    others (pytorch #198333).
    """
    if not hasattr(TritonOverrides, "_can_use_4x_random"):  # before 2.13
        yield
        return
    with mock.patch.object(TritonOverrides, "_can_use_4x_random", staticmethod(lambda: False)):
        yield
