"""Ops as the joint graphs of training steps hold them, and the flows they must have."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

aten, prims = torch.ops.aten, torch.ops.prims


def f(*shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64).to(dtype)


def i(*shape: int, below: int) -> torch.Tensor:
    return torch.randint(below, shape)


def b(*shape: int) -> torch.Tensor:
    return torch.rand(shape) < 0.5


@dataclasses.dataclass(frozen=True)
class Case:
    """An op, and what slicing one of its arguments must lead to.

    ``"a0>0 a1>sum"``: the first argument sliced along dimension 0 leaves the output sliced
    along 0, along 1 it leaves a sum; ``-`` is an output that is whole. There may be more
    flows than are asked for. All there are is checked.
    """

    op: Any
    args: tuple[Any, ...]
    asked: str
    more: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def expected(self) -> dict[str, str]:
        return dict(word.split(">") for word in self.asked.split())


def c(op: Any, *args: Any, asked: str, **more: Any) -> Case:
    return Case(op, args, asked, more)


UNARY = """
abs acos acosh alias asin asinh atan atanh ceil cos cosh erfc exp2 expm1 floor isnan log log10 log1p
log2 neg reciprocal round rsqrt sgn sigmoid sign sin sinh sqrt tan tanh trunc
"""


def cases() -> dict[str, Case]:
    torch.manual_seed(0)
    x, y = f(6, 5, 4), f(6, 5, 4)
    points = "a0>0 a1>1 a2>2"
    both = f"{points} b0>0 b1>1 b2>2"
    window = [[2, 2], [2, 2]]
    above, truth = x.abs() + 0.1, b(6, 5, 4)
    plain = {name: c(getattr(aten, name).default, above, asked=points) for name in UNARY.split()}
    compared = {
        name: c(getattr(aten, name).Tensor, x, f(5, 1), asked=f"{points} b0>1")
        for name in ["ge", "gt", "lt", "ne"]
    }
    logical = {
        name: c(getattr(aten, name).default, truth, b(5, 1), asked=f"{points} b0>1")
        for name in ["logical_and", "logical_or"]
    }
    binary = {
        name: c(op, above, f(5, 1).abs() + 0.1, asked=f"{points} b0>1")
        for name, op in {
            "atan2": aten.atan2.default,
            "hypot": aten.hypot.default,
            "fmod": aten.fmod.Tensor,
            "remainder": aten.remainder.Tensor,
        }.items()
    }
    logical["logical_xor"] = c(aten.logical_xor.default, truth, b(5, 1), asked=f"{points} b0>1")
    return {
        **plain, **compared, **logical, **binary,
        "bitwise_xor": c(aten.bitwise_xor.Tensor, truth, b(5, 1), asked=f"{points} b0>1"),
        "scatter a number": c(
            aten.scatter.value, f(6, 9), 1, i(6, 1, below=9), -1.0, asked="a0>0 b0>0"
        ),
        "scatter": c(
            aten.scatter.src, f(6, 9), 1, i(6, 2, below=9), f(6, 2), asked="a0>0 b0>0 c0>0"
        ),
        "sort": c(aten.sort.default, x, 1, asked="a0>0,0 a2>2,2"),
        "view as real": c(aten.view_as_real.default, torch.complex(x, y), asked=points),
        "view as complex": c(aten.view_as_complex.default, f(6, 5, 2), asked="a0>0 a1>1"),
        "slice_scatter": c(
            aten.slice_scatter.default, x, f(6, 2, 4), 1, 1, 3, asked="a0>0 a2>2"
        ),
        "select_scatter": c(
            aten.select_scatter.default, x, f(6, 4), 1, 2, asked="a0>0 a2>2 b0>0 b1>2"
        ),
        "select_scatter the last": c(
            aten.select_scatter.default, x, f(6, 5), -1, 0, asked="a0>0 a1>1 b0>0 b1>1"
        ),
        "logical_not": c(aten.logical_not.default, truth, asked=points),
        "bitwise_not": c(aten.bitwise_not.default, truth, asked=points),
        "bitwise_or": c(aten.bitwise_or.Tensor, truth, b(5, 1), asked=f"{points} b0>1"),
        "clamp": c(aten.clamp.default, x, -0.5, 0.5, asked=points),
        "clamp_max": c(aten.clamp_max.default, x, 0.5, asked=points),
        "minimum": c(aten.minimum.default, x, f(5, 1), asked=f"{points} b0>1"),
        "unsafe view": c(aten._unsafe_view.default, x, [6, 20], asked="a0>0"),
        "cat": c(aten.cat.default, [x, y, f(6, 5, 3)], -1, asked="a0>0 a1>1 b0>0 b1>1"),
        "cat along the first": c(aten.cat.default, [f(6, 5), f(4, 5)], asked="a1>1 b1>1"),
        # -- elementwise, broadcasting
        "copy": c(aten.copy.default, x, f(5, 1), asked=f"{points} b0>1"),
        "add": c(aten.add.Tensor, x, y, asked=both, alpha=2),
        "add a row": c(aten.add.Tensor, x, f(4), asked=f"{points} b0>2"),
        "add a column": c(aten.add.Tensor, f(7, 1, 4), f(5, 1), asked="a0>0 a2>2 b0>1"),
        "mul": c(aten.mul.Tensor, x, f(6, 1, 4), asked=f"{points} b0>0 b2>2"),
        "mul by a number": c(aten.mul.Tensor, x, 3.0, asked=points),
        "div": c(aten.div.Tensor, x, f(1, 5, 1), asked=f"{points} b1>1"),
        "sub": c(aten.sub.Tensor, f(1, 4), x, asked="a1>2 b0>0 b1>1 b2>2"),
        "exp": c(aten.exp.default, x, asked=points),
        "erf": c(aten.erf.default, x, asked=points),
        "pow": c(aten.pow.Tensor_Scalar, x, 2, asked=points),
        "where": c(aten.where.self, b(6, 1, 4), x, f(), asked="a0>0 a2>2 b0>0 b1>1 b2>2"),
        "clamp_min": c(aten.clamp_min.default, x, 0.0, asked=points),
        "relu": c(aten.relu.default, x, asked=points),
        "maximum": c(aten.maximum.default, x, f(5, 1), asked=f"{points} b0>1"),
        "le": c(aten.le.Scalar, x, 0, asked=points),
        "eq": c(aten.eq.Tensor, i(6, 5, below=3), i(5, below=3), asked="a0>0 a1>1 b0>1"),
        "bitwise_and": c(aten.bitwise_and.Tensor, b(7, 5), b(5), asked="a0>0 a1>1 b0>1"),
        "convert": c(prims.convert_element_type.default, x, torch.bfloat16, asked=points),
        "convert up": c(prims.convert_element_type.default, b(6, 5), torch.float32, asked="a0>0"),
        "fma": c(prims.fma.default, x, y, f(6, 5, 4), asked=f"{both} c0>0 c1>1 c2>2"),
        "clone": c(aten.clone.default, x, asked=points, memory_format=torch.contiguous_format),
        # -- products
        "mm": c(aten.mm.default, f(6, 10), f(10, 7), asked="a0>0 a1>sum b0>sum b1>1"),
        "addmm": c(aten.addmm.default, f(7), f(6, 10), f(10, 7), asked="a0>1 b0>0 c1>1"),
        "bmm": c(
            aten.bmm.default, f(6, 5, 4), f(6, 4, 7),
            asked="a0>0 a1>1 a2>sum b0>0 b1>sum b2>2",
        ),
        "baddbmm": c(
            aten.baddbmm.default, f(6, 5, 7), f(6, 5, 4), f(6, 4, 7),
            asked="a0>0 a1>1 a2>2 b0>0 b1>1 c0>0 c2>2",
        ),
        # -- reductions
        "sum": c(aten.sum.dim_IntList, x, [1], asked="a0>0 a1>sum a2>1"),
        "sum, kept": c(aten.sum.dim_IntList, x, [-1], True, asked="a0>0 a1>1 a2>sum"),
        "sum of two": c(aten.sum.dim_IntList, x, [0, 2], asked="a0>sum a1>0 a2>sum"),
        "sum of all": c(aten.sum.default, x, asked="a0>sum a1>sum a2>sum"),
        "sum of bools": c(aten.sum.dim_IntList, b(6, 5), [0], asked="a0>sum a1>0"),
        "mean": c(aten.mean.dim, x, [1], asked="a0>0 a2>1"),
        "amax": c(aten.amax.default, x, [-1], True, asked="a0>0 a1>1 a2>max"),
        "amin": c(aten.amin.default, x, [0, 1], asked="a0>min a1>min a2>0"),
        "amax of ints": c(aten.amax.default, i(6, 7, below=9), [1], asked="a0>0 a1>max"),
        "var_mean": c(aten.var_mean.correction, x, [2], asked="a0>0,0 a1>1,1", correction=0),
        "split": c(aten.split.Tensor, x, 2, 1, asked="a0>0,0,0 a2>2,2,2"),
        "prod": c(aten.prod.dim_int, x, 1, asked="a0>0 a2>1"),
        "any of two": c(aten.any.dims, b(6, 5, 4), [0, 2], asked=""),
        "any": c(aten.any.dim, b(6, 5, 4), 1, asked="a0>0 a2>1"),
        "argmax": c(aten.argmax.default, x, 1, asked="a0>0 a2>1"),
        "argmax kept": c(aten.argmax.default, x, -1, True, asked="a0>0 a1>1"),
        "argmax of all": c(aten.argmax.default, x, asked=""),
        "var_mean kept": c(
            aten.var_mean.correction, x, [-1, 0], asked="a1>1,1", correction=1, keepdim=True
        ),
        "softmax": c(aten._softmax.default, x, -1, False, asked="a0>0 a1>1"),
        "cumsum": c(aten.cumsum.default, x, 1, asked="a0>0 a2>2"),
        "cumsum of ints": c(aten.cumsum.default, i(6, 5, below=9), -1, asked="a0>0"),
        "cumprod": c(aten.cumprod.default, x, -1, asked="a0>0 a1>1"),
        # -- views
        "split a dimension": c(aten.view.default, f(6, 12), [6, 3, 4], asked="a0>0 a1>1"),
        "merge two": c(aten.view.default, x, [30, 4], asked="a0>0 a2>1"),
        "merge the last": c(aten.view.default, x, [6, 20], asked="a0>0 a1>1"),
        "view, one more": c(aten.view.default, f(37, 8), [1, 37, 1, 8], asked="a0>1 a1>3"),
        "reshape": c(aten.reshape.default, f(7, 6).t(), [6, 7, 1], asked="a0>0 a1>1"),
        "permute": c(aten.permute.default, x, [2, 0, 1], asked="a0>1 a1>2 a2>0"),
        "expand": c(aten.expand.default, f(6, 1, 4), [3, 6, 5, 4], asked="a0>1 a2>3"),
        "expand nothing": c(aten.expand.default, x, [6, 5, 4], asked=points),
        "unsqueeze": c(aten.unsqueeze.default, x, 1, asked="a0>0 a1>2 a2>3"),
        "squeeze": c(aten.squeeze.dims, f(6, 1, 4), [1], asked="a0>0 a2>1"),
        "squeeze of nothing": c(aten.squeeze.dims, f(6, 5, 1), [1, -1], asked="a0>0"),
        "select": c(aten.select.int, x, 1, 2, asked="a0>0 a2>1"),
        "slice": c(aten.slice.Tensor, x, 1, 1, 4, asked="a0>0 a2>2"),
        # -- copies
        "constant_pad_nd": c(aten.constant_pad_nd.default, x, [1, 2], 0.5, asked="a0>0 a1>1"),
        "pad two": c(aten.constant_pad_nd.default, x, [0, 0, 2, 0, 1, -1], asked="a2>2"),
        "flip": c(aten.flip.default, x, [1], asked="a0>0 a2>2"),
        "flip from behind": c(aten.flip.default, x, [-1], asked="a0>0 a1>1"),
        "roll": c(aten.roll.default, x, [2], [1], asked="a0>0 a2>2"),
        "roll of two": c(aten.roll.default, x, [1, -1], [0, 2], asked="a1>1"),
        "tril": c(aten.tril.default, x, asked=""),
        "repeat": c(aten.repeat.default, x, [1, 2, 1], asked="a0>0 a2>2"),
        # -- indices
        "gather": c(aten.gather.default, x, 1, i(6, 3, 4, below=5), asked="b1>1"),
        "scatter_add": c(
            aten.scatter_add.default, x, 1, i(6, 5, 4, below=5), y,
            asked="a0>0 a2>2 b0>0 b2>2 c0>0 c2>2",
        ),
        "scatter_reduce": c(
            aten.scatter_reduce.two, x, -1, i(6, 5, 4, below=4), y, "amax",
            asked="a0>0 a1>1 b0>0 c1>1",
        ),
        "index_add": c(
            aten.index_add.default, x, 1, i(3, below=5), f(6, 3, 4), asked="a0>0 a2>2 c0>0 c2>2"
        ),
        "index_select": c(aten.index_select.default, x, 1, i(3, below=5), asked="a0>0 a2>2"),
        "index": c(aten.index.Tensor, x, [None, i(7, below=5)], asked=""),
        "embedding": c(aten.embedding.default, f(9, 4), i(6, 5, below=9), asked="a1>2 b0>0 b1>1"),
        # -- spectra
        "_fft_r2c": c(aten._fft_r2c.default, x, [1], 0, True, asked="a0>0 a2>2"),
        "_fft_c2c": c(
            aten._fft_c2c.default, torch.complex(x, y), [0, 2], 0, True, asked="a1>1"
        ),
        "_fft_c2r": c(aten._fft_c2r.default, torch.complex(x, y), [2], 0, 6, asked="a0>0 a1>1"),
        # -- layers
        "layer_norm": c(
            aten.native_layer_norm.default, x, [4], f(4), f(4), 1e-5, asked="a0>0,0,0 a1>1,1,1"
        ),
        "convolution": c(
            aten.convolution.default, f(6, 2, 8), f(3, 2, 3), f(3), [1], [1], [1], False, [0], 1,
            asked="a0>0",
        ),
        "avg_pool": c(aten.avg_pool2d.default, f(6, 3, 4, 6), *window, asked="a0>0 a1>1"),
        "avg_pool unbatched": c(aten.avg_pool2d.default, f(3, 4, 6), *window, asked="a0>0"),
        "convolution transposed": c(
            aten.convolution.default, f(6, 2, 8), f(2, 3, 3), None, [2], [1], [1], True, [0], 1,
            asked="a0>0",
        ),
        "max_pool": c(
            aten.max_pool2d_with_indices.default, f(6, 3, 4, 6), *window, asked="a0>0,0 a1>1,1"
        ),
        "nearest": c(aten.upsample_nearest2d.vec, f(6, 3, 4, 5), [8, 10], None, asked=""),
        "bilinear": c(
            aten.upsample_bilinear2d.vec, f(6, 3, 4, 5), [8, 7], True, None, asked=""
        ),
    }  # fmt: skip


CASES = cases()
