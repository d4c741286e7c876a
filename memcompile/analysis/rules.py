"""The rules added by name: what DTensor has none for, not in every release, or a wrong one.

A rule is asked with the places of an op's tensor arguments, as known, and answers with a
flow through the op, or with ``None`` where there is none.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable

from torch import fx

from memcompile.step import tensors


@dataclasses.dataclass(frozen=True)
class Merged:
    """What is sliced stands behind others in one dimension: (outer, sliced) flattened."""

    dim: int
    outer: int  #: how many whole turns of what is sliced the dimension holds; more than one


#: A dimension (sliced), a part of one (likewise), ``None`` (whole), or "sum", "max", "min"
#: (carried by the loop).
Place = int | Merged | str | None


def dim_of(place: Place) -> int | None:
    """The dimension of a sliced tensor that is cut; ``None`` of one that is not sliced."""
    if isinstance(place, Merged):
        return place.dim
    return place if isinstance(place, int) else None


def is_sliced(place: Place) -> bool:
    """Whether a trip reads or makes a part of the tensor."""
    return dim_of(place) is not None


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


#: Make a tensor along any dimension of which any part can be made alone: of one number,
#: or of a seed and each element's place.
FACTORIES = frozenset({"full", "inductor_random", "inductor_randint"})


#: Go by where in the whole an element stands.
DRAWS = frozenset({"inductor_random", "inductor_randint"})


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
        number = len(tensors(node))
        if along is None:
            return (
                Flow(places, (None,) * number) if not any(p is not None for p in others) else None
            )
        rank = tensors(tensor_args(node)[0])[0].dim()
        if along in {d % rank for d in dims(node)} or any(p is not None for p in others):
            return None
        return Flow(places, (along,) * number)

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


def _reduced(node: fx.Node, places: tuple[Place, ...]) -> Flow | None:
    """Reductions of one argument: sliced along what is kept."""
    (along,), number = places, len(tensors(node))
    if not isinstance(along, int):
        return Flow(places, (None,) * number)
    gone = reduced_dims(node)
    if along in gone:
        return None
    (argument,), (rest, *_) = tensor_args(node), tensors(node)
    kept = rest.dim() == tensors(argument)[0].dim()
    return Flow(places, (along if kept else along - sum(d < along for d in gone),) * number)


def reduced_dims(node: fx.Node) -> set[int]:
    """The dimensions that ``op(x, dim)`` reduces, none below zero; all where none are given."""
    rank = tensors(tensor_args(node)[0])[0].dim()
    dims = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
    if isinstance(dims, int):
        dims = [dims]
    if rank and dims and isinstance(dims, (list, tuple)):
        return {d % rank for d in dims}
    return set(range(rank))


def _squeeze(node: fx.Node, places: tuple[Place, ...]) -> Flow | None:
    """Sliced along what is not named: a chunk of length one would lose that dimension too."""
    (along,), shape = places, tensors(tensor_args(node)[0])[0].shape
    named = reduced_dims(node)
    if not isinstance(along, int):
        return Flow(places, (None,))
    if along in named:
        return None
    return Flow(places, (along - sum(d < along and shape[d] == 1 for d in named),))


def _padded_dims(node: fx.Node) -> list[int]:
    pad = node.args[1]
    return [-1 - k // 2 for k in range(0, len(pad), 2) if pad[k] or pad[k + 1]]


def _pooled_dims(node: fx.Node) -> tuple[int, int]:
    return -1, -2


def _select_scatter(node: fx.Node, places: tuple[Place, ...]) -> Flow | None:
    """``select_scatter(self, source, dim, index)``: the source lacks that dimension."""
    own, source = places
    at = int(node.args[2]) % tensors(node)[0].dim()
    given = {own} if isinstance(own, int) else set()
    if isinstance(source, int):
        given.add(source + (source >= at))
    if len(given) != 1 or at in given:
        return Flow(places, (None,)) if not given else None
    (along,) = given
    return Flow((along, along - (along > at)), (along,))


def _convolution(node: fx.Node, places: tuple[Place, ...]) -> Flow | None:
    """Sliced along the batch alone."""
    along, *weights = places
    if any(p is not None for p in weights) or along not in (0, None):
        return None
    batched = tensors(tensor_args(node)[0])[0].dim() == tensors(tensor_args(node)[1])[0].dim()
    return Flow(places, (along,)) if batched or along is None else None


OWN: dict[str, Callable[[fx.Node, tuple[Place, ...]], Flow | None]] = {
    "full": _factory,
    "inductor_random": _draw,
    "inductor_randint": _draw,
    "cat": _cat,
    "copy": _pointwise,
    "argmax": _reduced,
    "avg_pool2d": _same_dims(_pooled_dims),
    "constant_pad_nd": _same_dims(_padded_dims),
    "convolution": _convolution,
    "fma": _pointwise,
    "max_pool2d_with_indices": _same_dims(_pooled_dims),
    "ne": _pointwise,
    "scatter": _like_source,
    "select_scatter": _select_scatter,
    "squeeze": _squeeze,
    "var_mean": _reduced,
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
