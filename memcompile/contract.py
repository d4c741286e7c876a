"""The pass contract: all that the author of a pass must know.

A pass is a frozen dataclass. Its fields are its options, its ``name`` is how
pipelines spell it, and ``exactness`` says what the configured instance does to
numbers. It is one of two kinds: a :class:`Rewrite` changes a graph in place, a
:class:`Proposer` offers moves that the planner may take.
"""

from __future__ import annotations

import abc
import dataclasses
import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import fx
from torch.fx.experimental.proxy_tensor import make_fx

from memcompile import _torch
from memcompile.errors import PassError
from memcompile.step import Step, hint

#: ``"bits"``: identical. ``"rounding"``: the same function, another order of rounding.
#: ``"no"``: numbers may change; such a pass runs only when the user names it.
Exactness = Literal["bits", "rounding", "no"]


@dataclasses.dataclass(frozen=True)
class Context:
    """What a pass may know beside the graph."""

    strict: bool = False
    budget: int | None = None  #: total bytes, or None
    device: str = "cpu"
    exact: frozenset[str] = frozenset()  #: names of nodes whose numbers no pass may change
    recorded: bool = False  #: whether kernels are recorded once and replayed (CUDA graphs)
    remarks: list[str] = dataclasses.field(default_factory=list, compare=False, repr=False)

    def remark(self, text: str) -> None:
        """Tell the user: it is added to what the report says of the pass.

        Raises:
            PassError: under ``strict``.
        """
        if self.strict:
            raise PassError(text)
        self.note(text)

    def note(self, text: str) -> None:
        """Tell the user what is no fault: it is added to what the report says of the pass."""
        self.remarks.append(text)


class Pass(abc.ABC):
    """What both kinds share. Subclasses are frozen dataclasses with a ``name``."""

    name: ClassVar[str]
    by_default: ClassVar[bool] = True  #: a built-in that runs only when named says False

    @property
    def exactness(self) -> Exactness:
        """How exact this configured pass is; override when an option changes it."""
        return "bits"

    @property
    def by_module(self) -> bool:
        """Whether an option names modules: what is done then depends on more than the graph."""
        return False

    @property
    def parts(self) -> tuple[object, ...]:
        """Modules and objects of other files that it works by: an edit of those is a cache miss."""
        return ()


class Rewrite(Pass):
    """A pass that changes a graph in place, before anything is planned."""

    @abc.abstractmethod
    def rewrite(self, module: fx.GraphModule, context: Context) -> bool:
        """Change ``module.graph`` in place; return whether anything changed.

        The pipeline lints, recompiles, checks and records: a pass does none of it.
        """


class Proposer(Pass):
    """A pass that offers moves and rewrites nothing."""

    @abc.abstractmethod
    def propose(self, step: Step, context: Context) -> Iterable[Proposal | Loop]:
        """The moves this pass can make on ``step``; the planner chooses among them."""

    def upon(self, offered: Sequence[Proposal], step: Step, context: Context) -> Iterable[Proposal]:
        """Moves that go further than those that other passes have offered; most have none.

        One made of an offered move by ``dataclasses.replace`` stays the other pass's, and is
        as exact as that pass is.
        """
        return ()


@dataclasses.dataclass(frozen=True)
class Host:
    """What is stored lies in the host's memory from the forward to the backward.

    ``limit`` is in bytes: a plan has at most so many on the host. Copies run beside the device's
    work. What is copied stays on the device until that is drafted to be over, and is on its way
    back so early that its reader need not wait; or else the device ``waits`` for both copies.
    """

    limit: int
    waits: bool = False


@dataclasses.dataclass(frozen=True)
class Rebuild:
    """How late readers get a value back from what was stored instead of it.

    ``encode`` runs early, right after the value, and its outputs are stored;
    ``decode`` runs late, on those outputs followed by the values of ``reads``
    (which are kept anyway, or rebuilt in turn). Both are graphs of plain aten ops.
    With ``host`` they are stored there: the engine writes the copies.
    """

    decode: fx.GraphModule
    encode: fx.GraphModule | None = None
    reads: tuple[fx.Node, ...] = ()
    host: Host | None = None

    @functools.cached_property
    def stored(self) -> tuple[fx.Node, ...]:
        """What is stored: nodes of ``encode``."""
        return tuple(_outputs(self.encode)) if self.encode is not None else ()


@dataclasses.dataclass(frozen=True)
class Coding:
    """How a codec stores one value.

    ``encode(tensor)`` gives what is stored, a tensor or a tuple of them; ``decode(*stored,
    *reads)`` gives the value back, in its own shape and dtype. Both are pure. ``bytes(tensor)``
    is what ``encode`` stores of it, in bytes: a move is offered where that is less than the value.
    """

    encode: Callable[[torch.Tensor], torch.Tensor | tuple[torch.Tensor, ...]]
    decode: Callable[..., torch.Tensor]
    bytes: Callable[[torch.Tensor], int]
    reads: tuple[fx.Node, ...] = ()


class Codec(abc.ABC):
    """A way to store values in fewer bytes, for the ``compress`` pass to offer.

    Registered by an entry point of the group ``memcompile.codecs``, under its ``name``.
    """

    name: ClassVar[str]
    exactness: ClassVar[Exactness] = "bits"  #: ``"no"`` for a lossy one: it runs when named
    error: float = 0.0  #: the largest relative error of a lossy one's values

    @abc.abstractmethod
    def coding(self, value: fx.Node, step: Step) -> Coding | None:
        """How to store ``value``, an early value that owns its memory; ``None``: not this way."""


@dataclasses.dataclass(frozen=True)
class Proposal:
    """One move: late readers of ``value`` read a rebuilt one instead of keeping it.

    ``rebuild=None`` is recomputation: the value's own op runs again. ``how`` names
    the move in reports. The planner re-measures every claim on its own draft.
    """

    value: fx.Node
    how: str = "recompute"
    rebuild: Rebuild | None = None
    by: str = dataclasses.field(default="", compare=False)  #: filled in by the pipeline


@dataclasses.dataclass(frozen=True)
class Loop:
    """The other move: a region around ``value`` runs in ``chunks`` of its dimension ``dim``.

    The engine finds the region, on both sides of the step; where there is none, the move
    is not one. A count that does not divide the dimension leaves a shorter last chunk.
    """

    value: fx.Node
    dim: int
    chunks: int
    without: frozenset[fx.Node] = frozenset()  #: nodes that no loop of the step may take in
    by: str = dataclasses.field(default="", compare=False)  #: filled in by the pipeline


def rebuild(
    value: fx.Node,
    decode: Callable[..., torch.Tensor],
    encode: Callable[[torch.Tensor], torch.Tensor | tuple[torch.Tensor, ...]] | None = None,
    reads: tuple[fx.Node, ...] = (),
) -> Rebuild:
    """Trace two plain functions into a :class:`Rebuild` for ``value``.

    Args:
        value: the node whose tensor is not to be kept.
        decode: ``decode(*encoded, *reads) -> tensor`` with the shape and dtype of ``value``;
            where its strides are others, the value's own are given to it.
        encode: ``encode(tensor) -> tensor or tuple``, what is stored; ``None`` stores nothing.
        reads: other values of the step that ``decode`` needs.

    Raises:
        PassError: when ``decode`` gives back another shape or dtype.
    """
    original = value.meta["val"]
    mode = _torch.detect_fake_mode([original])
    stored: list[torch.Tensor] = []
    traced_encode = None
    if encode is not None:
        traced_encode = _trace(lambda x: _as_tuple(encode(x)), mode, original)
        stored = [out.meta["val"] for out in _outputs(traced_encode)]
    others = [node.meta["val"] for node in reads]
    traced_decode = _trace(lambda *args: (decode(*args),), mode, *stored, *others)
    (result,) = _outputs(traced_decode)
    got = result.meta["val"]
    if got.dtype != original.dtype or tuple(got.shape) != tuple(original.shape):
        raise PassError(
            f"decode for node {value.name} gives {got.dtype}{list(got.shape)}, "
            f"the value is {original.dtype}{list(original.shape)}; return the value's own "
            "shape and dtype"
        )
    if original.layout == torch.strided and _strides(got) != _strides(original):
        traced_decode = _trace(
            lambda *args: (_laid_out(decode(*args), original),), mode, *stored, *others
        )
    return Rebuild(traced_decode, traced_encode, tuple(reads))


def on_host(value: fx.Node, host: Host) -> Rebuild:
    """How late readers get back a value that is stored as it is, on the host."""

    def same() -> fx.GraphModule:
        graph = fx.Graph()
        stored = graph.placeholder("stored")
        stored.meta["val"] = value.meta["val"]
        graph.output((stored,))
        return fx.GraphModule({}, graph)

    return Rebuild(same(), same(), host=host)


def _laid_out(tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """The same elements, in memory in the order of ``like``: views of the value rely on it."""
    strides = _strides(like)
    order = sorted(range(like.dim()), key=lambda dim: -strides[dim])
    back = sorted(range(like.dim()), key=order.__getitem__)
    return tensor.permute(order).contiguous().permute(back)


def _strides(tensor: torch.Tensor) -> list[int]:
    return [hint(stride) for stride in tensor.stride()]


def _as_tuple(value: Any) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, (list, tuple)) else (value,)


def _trace(function: Callable[..., Any], mode: Any, *args: torch.Tensor) -> fx.GraphModule:
    trace = make_fx(function, decomposition_table=_torch.select_decomp_table())
    with torch.no_grad():
        if mode is None:
            return trace(*args)
        with mode:
            return trace(*args)


def _outputs(module: fx.GraphModule) -> list[fx.Node]:
    (output,) = module.graph.find_nodes(op="output")
    return list(output.args[0])
