"""How a dimension flows through ops: sliced, whole, or carried by a loop.

A chunk is a shard in time: DTensor's rules say which inputs of an op must be sliced for
its output to be, and when the parts must be added up (Partial). What DTensor has no rule
for, and Inductor's joint graphs hold, is added below by name. An op without a rule stops
the flow.
"""

from __future__ import annotations

import dataclasses
import functools
import operator
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import fx

from memcompile import _torch
from memcompile._torch.loops import propagate
from memcompile.analysis.ops import is_random, op_name
from memcompile.step import tensors

#: A dimension (sliced), ``None`` (whole), or "sum", "max", "min" (carried by the loop).
Place = int | str | None


@dataclasses.dataclass(frozen=True)
class Flow:
    """One way an op can be run chunk by chunk."""

    inputs: tuple[Place, ...]  #: of its tensor arguments, in order
    outputs: tuple[Place, ...]  #: one a tensor it returns


def tensor_args(node: fx.Node) -> list[fx.Node]:
    """The node's tensor arguments in order, repeats included."""
    found: list[fx.Node] = []
    fx.node.map_arg((node.args, node.kwargs), lambda n: found.append(n) if tensors(n) else None)
    return found


class Rules:
    """Answers for one length of the sliced dimension; every question is asked once.

    Args:
        length: of the dimension; its chunks need not divide it.
    """

    def __init__(self, length: int) -> None:
        self.parts = _smallest_factor(length)
        self._answers: dict[Any, Flow | None] = {}

    def given(self, node: fx.Node, places: Iterable[Place]) -> Flow | None:
        """The flow through ``node`` when its tensor arguments are placed so, if there is one.

        What is given as sliced stays so; what is whole may be asked to be sliced.
        """
        if node.meta.get("no_loop"):  # a pass has said so
            return None
        places = tuple(places)
        key = (_signature(node), places)
        if key not in self._answers:
            self._answers[key] = self._ask(node, places)
        return self._answers[key]

    def giving(self, node: fx.Node, output: int, dim: int) -> Flow | None:
        """A flow through ``node`` that leaves its output number ``output`` sliced along ``dim``."""
        arguments = tensor_args(node)
        nothing: list[Place] = [None] * len(arguments)
        if op_name(node) in FACTORIES:
            flow = self.given(node, nothing)
            return Flow(flow.inputs, (dim,)) if flow is not None else None
        for at, argument in enumerate(arguments):
            for along in range(tensors(argument)[0].dim()):
                flow = self.given(node, [*nothing[:at], along, *nothing[at + 1 :]])
                if flow is not None and flow.outputs[output : output + 1] == (dim,):
                    return flow
        return None

    def _ask(self, node: fx.Node, places: tuple[Place, ...]) -> Flow | None:
        if node.op != "call_function" or any(isinstance(p, str) for p in places):
            return None
        if not _static(node):
            return None
        if node.target is operator.getitem:
            return None
        if is_random(node) or not isinstance(node.target, _torch.OpOverload):
            return None
        name = op_name(node)
        if name in OWN:
            return OWN[name](node, places)
        if name not in AUDITED or any(tensors(n) for n in _nodes(node.kwargs)):
            return None
        args = fx.node.map_arg(node.args, lambda n: n.meta["val"])
        found = propagate(node.target, args, node.kwargs, places, self.parts)
        if found is None:
            return None
        inputs, outputs = found
        if any(p is not None and q != p for p, q in zip(places, inputs, strict=True)):
            return None
        if name in BOOLEAN and "sum" in outputs:  # parts of a truth value do not add up
            return None
        return Flow(inputs, outputs)


def _smallest_factor(length: int) -> int:
    for factor in range(2, int(length**0.5) + 1):
        if length % factor == 0:
            return factor
    return max(2, length)


def _static(node: fx.Node) -> bool:
    if any(not tensors(n) for n in node.all_input_nodes):
        return False  # a symbolic size among the arguments
    values = [t for n in (node, *node.all_input_nodes) for t in tensors(n)]
    return all(isinstance(size, int) for t in values for size in t.shape)


def _nodes(values: Any) -> list[fx.Node]:
    found: list[fx.Node] = []
    fx.node.map_arg(values, found.append)
    return found


def _signature(node: fx.Node) -> Any:
    def leaf(n: fx.Node) -> Any:
        value = n.meta.get("val")
        if isinstance(value, torch.Tensor):
            return ("t", tuple(map(str, value.shape)), tuple(map(str, value.stride())), value.dtype)
        return ("o", n.name)

    args = fx.node.map_arg((node.args, node.kwargs), lambda n: _Leaf(leaf(n)))
    return (str(node.target), repr(args))


@dataclasses.dataclass(frozen=True)
class _Leaf:
    what: Any


# -- rules added by name ------------------------------------------------------------------

#: Make a tensor along any dimension of which any part can be made alone: of one number,
#: or of a seed and each element's place.
FACTORIES = frozenset({"full", "inductor_random", "inductor_randint"})

BOOLEAN = frozenset({"any", "all"})


def _factory(node: fx.Node, places: tuple[Place, ...]) -> Flow:
    return Flow((), (None,))


def _draw(node: fx.Node, places: tuple[Place, ...]) -> Flow | None:
    """A draw from a seed, which stays whole."""
    (seed,) = tensor_args(node)
    if tensors(seed)[0].dim() or node.kwargs:  # ``align_random_eager``: eager's numbers
        return None
    return Flow(places, (None,))


def _pointwise(node: fx.Node, places: tuple[Place, ...]) -> Flow | None:
    """Broadcasting elementwise ops: all operands are sliced along the output's dimension."""
    (out,) = tensors(node)
    given = {
        p + out.dim() - tensors(a)[0].dim()
        for a, p in zip(tensor_args(node), places, strict=True)
        if isinstance(p, int)
    }
    if len(given) != 1:
        return Flow(places, (None,)) if not given else None
    (along,) = given
    inputs: list[Place] = []
    for argument in tensor_args(node):
        value = tensors(argument)[0]
        own = along - (out.dim() - value.dim())
        inputs.append(own if own >= 0 and value.shape[own] == out.shape[along] else None)
    if any(p is not None and p != q for p, q in zip(places, inputs, strict=True)):
        return None
    return Flow(tuple(inputs), (along,))


def _same_dims(dims: Callable[[fx.Node], Iterable[int]]) -> Callable[..., Flow | None]:
    """Ops over the dimensions ``dims``: any other one of the first argument is sliced through."""

    def rule(node: fx.Node, places: tuple[Place, ...]) -> Flow | None:
        (along, *others) = places
        if along is None:
            return Flow(places, (None,)) if not any(p is not None for p in others) else None
        rank = tensors(tensor_args(node)[0])[0].dim()
        if along in {d % rank for d in dims(node)} or any(p is not None for p in others):
            return None
        return Flow(places, (along,))

    return rule


def _scan_dims(node: fx.Node) -> list[int]:
    return [node.args[1]]


def _listed_dims(node: fx.Node) -> list[int]:
    dims = node.args[2] if len(node.args) > 2 else node.kwargs.get("dims", ())
    return list(dims) or list(range(tensors(tensor_args(node)[0])[0].dim()))


def _flip_dims(node: fx.Node) -> list[int]:
    return list(node.args[1])


def _like_source(node: fx.Node, places: tuple[Place, ...]) -> Flow | None:
    """Scatters along one dimension: self, index and source are sliced along any other."""
    along = {p for p in places if p is not None}
    if len(along) != 1:
        return Flow(places, (None,)) if not along else None
    (dim,) = along
    values = [tensors(a)[0] for a in tensor_args(node)]
    if dim == int(node.args[1]) % values[0].dim():
        return None
    if any(v.shape[dim] != values[0].shape[dim] for v in values):
        return None
    return Flow(tuple(dim for _ in values), (dim,))


def _index_add(node: fx.Node, places: tuple[Place, ...]) -> Flow | None:
    """``index_add(self, dim, index, source)``: sliced along any dimension but ``dim``."""
    _, index, _ = places
    along = {p for p in (places[0], places[2]) if p is not None}
    if len(along) != 1 or index is not None:
        return Flow(places, (None,)) if not along and index is None else None
    (dim,) = along
    rank = tensors(tensor_args(node)[0])[0].dim()
    if dim == int(node.args[1]) % rank:
        return None
    return Flow((dim, None, dim), (dim,))


def _cat(node: fx.Node, places: tuple[Place, ...]) -> Flow | None:
    """All operands are sliced along one dimension, any but the one they are joined along."""
    along = {p for p in places if p is not None}
    if len(along) != 1:
        return Flow(places, (None,)) if not along else None
    (dim,) = along
    (out,) = tensors(node)
    joined = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
    if dim == int(joined) % out.dim():
        return None
    return Flow(tuple(dim for _ in places), (dim,))


OWN: dict[str, Callable[[fx.Node, tuple[Place, ...]], Flow | None]] = {
    "full": _factory,
    "inductor_random": _draw,
    "inductor_randint": _draw,
    "cat": _cat,
    "fma": _pointwise,
    "convert_element_type": _pointwise,
    "cumsum": _same_dims(_scan_dims),
    "cumprod": _same_dims(_scan_dims),
    "roll": _same_dims(_listed_dims),
    "flip": _same_dims(_flip_dims),
    "_fft_r2c": _same_dims(_flip_dims),
    "_fft_c2r": _same_dims(_flip_dims),
    "_fft_c2c": _same_dims(_flip_dims),
    "scatter_add": _like_source,
    "scatter_reduce": _like_source,
    "index_add": _index_add,
}

#: Ops whose rules are asked of DTensor. Each is audited by running it whole and in parts: not
#: all of DTensor's are right (``any``, ``cat``), and what nobody has checked stops the flow.
AUDITED = frozenset(
    """
    _softmax _unsafe_view abs acos acosh add addmm alias amax amin any argmax asin asinh atan
    atan2 atanh avg_pool2d baddbmm bitwise_and bitwise_not bitwise_or bitwise_xor bmm ceil
    clamp clamp_max clamp_min clone constant_pad_nd convolution cos cosh div embedding eq erf
    erfc exp exp2 expand expm1 floor fmod gather ge gt hypot index index_select isnan le log
    log10 log1p log2 logical_and logical_not logical_or logical_xor lt max_pool2d_with_indices
    maximum mean minimum mm mul native_layer_norm ne neg permute pow prod reciprocal relu
    remainder repeat reshape round rsqrt scatter select select_scatter sgn sigmoid sign sin
    sinh slice slice_scatter sort split sqrt squeeze sub sum tan tanh tril trunc unsqueeze
    upsample_bilinear2d upsample_nearest2d var_mean view view_as_complex view_as_real where
    """.split()  # noqa: SIM905
)

#: The rules for a length, with all that was asked of them before.
rules_for = functools.lru_cache(maxsize=64)(Rules)
