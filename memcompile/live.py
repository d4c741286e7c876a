"""What earlier graphs of the same step hold, where a graph break or DDP cut it.

A graph compiled while another one's forward has run and its backward has not, starts
with less room: that graph's inputs and saved values are alive. Its outputs tell: their
``grad_fn`` lets go of saved tensors when its backward has run.

Pieces of one captured graph are all compiled before any of them runs. Each starts with
what the pieces before it will hold by then.
"""

from __future__ import annotations

import dataclasses
import gc
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from memcompile import _torch
from memcompile._torch.pieces import any_fake, captured_graph
from memcompile.errors import MemcompileError
from memcompile.step import hint


@dataclasses.dataclass(frozen=True)
class Held:
    """What a graph finds taken when it starts, in bytes, and the graphs that hold it."""

    by_graphs: int = 0
    graphs: tuple[str, ...] = ()
    by_pieces: int = 0
    pieces: tuple[str, ...] = ()

    @property
    def bytes(self) -> int:
        return self.by_graphs + self.by_pieces


@dataclasses.dataclass(eq=False)
class _Graph:
    """One compiled training graph and the last call whose backward may be due."""

    label: str
    bytes: int  #: held from its forward to its backward, parameters and inputs included
    last: weakref.ref[Any] | None = None


@dataclasses.dataclass(eq=False)
class _Piece:
    """A graph as its siblings see it: what it holds, and which of its tensors they may have."""

    graph: _Graph
    shared: dict[Any, int]  #: bytes of its inputs and outputs, by storage
    known: list[StorageWeakRef]  #: to those storages: no key is given anew, no data is kept


@dataclasses.dataclass(eq=False)
class _Capture:
    """One graph that Dynamo captured, and the pieces of it compiled so far."""

    pieces: list[_Piece] = dataclasses.field(default_factory=list)
    errors: list[MemcompileError] = dataclasses.field(default_factory=list)


#: Graphs that are still callable, oldest first: each lives as long as its compiled function.
_graphs: weakref.WeakKeyDictionary[_Graph, None] = weakref.WeakKeyDictionary()


def held(inputs: Sequence[Any]) -> Held:
    """What the graph with these example inputs finds taken when it runs."""
    pieces = _capture().pieces
    siblings = {piece.graph for piece in pieces}
    due = [graph for graph in _graphs if graph not in siblings and _is_due(graph)]
    if due:
        gc.collect()  # a dropped loss may still be waiting in a reference cycle
        due = [graph for graph in due if _is_due(graph)]
    counted = {key for piece in pieces for key in piece.shared}
    by_graphs = sum(graph.bytes for graph in due) - _made_before(inputs, counted)
    return Held(
        max(0, by_graphs) if due else 0,
        _labels(due),
        _held_by(pieces, inputs),
        _labels(piece.graph for piece in pieces),
    )


def forget() -> None:
    """Count nothing of what was compiled so far."""
    _graphs.clear()


def refused() -> MemcompileError | None:
    """The error of an earlier piece of the graph being compiled."""
    return next(iter(_capture().errors), None)


def refuse(error: MemcompileError) -> None:
    """No piece of the graph being compiled is to run."""
    _capture().errors.append(error)


def _capture() -> _Capture:
    """What is noted of the graph being compiled; it goes when torch's own notes of it go."""
    notes = captured_graph()
    return _Capture() if notes is None else notes.setdefault("memcompile", _Capture())


def _labels(graphs: Iterable[_Graph]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(graph.label for graph in graphs))


def _is_due(graph: _Graph) -> bool:
    node = graph.last() if graph.last is not None else None
    if node is None:
        return False
    try:
        return bool(_torch.raw_saved(node))
    except RuntimeError:  # freed: its backward has run
        return False


# -- bytes that two graphs have in common ----------------------------------------------------


def tensor_bytes(values: Iterable[Any]) -> int:
    """Bytes of the dense tensors among example inputs, at hinted sizes."""
    return sum(_bytes(value) for value in values if _is_dense(value))


def _is_dense(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.layout == torch.strided


def _bytes(tensor: torch.Tensor) -> int:
    return hint(tensor.numel()) * tensor.element_size()


def _by_storage(values: Iterable[Any]) -> dict[Any, int]:
    """Bytes of each storage among the values: of the largest tensor in it."""
    found: dict[Any, int] = {}
    for value in values:
        if _is_dense(value):
            key = _torch.storage_key(value)
            found[key] = max(found.get(key, 0), _bytes(value))
    return found


def _made_before(inputs: Sequence[Any], counted: set[Any]) -> int:
    """Inputs that an earlier graph of the step produced, and already counts."""
    return tensor_bytes(
        value
        for value in inputs
        if _is_dense(value) and not value.is_leaf and _torch.storage_key(value) not in counted
    )


def _held_by(pieces: Sequence[_Piece], inputs: Sequence[Any]) -> int:
    """What the pieces hold beside the inputs; what several have in common counts once."""
    total, most = 0, dict[Any, int]()
    for size, shared in [*((p.graph.bytes, p.shared) for p in pieces), (0, _by_storage(inputs))]:
        total += size
        for key, common in shared.items():
            total -= min(common, most.get(key, 0))
            most[key] = max(common, most.get(key, 0))
    return max(0, total)


# -- calls -----------------------------------------------------------------------------------


def watch(
    compiled: Callable[..., Any], label: str, size: int, inputs: Sequence[Any]
) -> Callable[..., Any]:
    """``compiled``, remembering the autograd node of its last call.

    Args:
        compiled: a training graph, as torch will call it.
        label: its name in notes.
        size: bytes it holds from its forward to its backward.
        inputs: its example inputs.
    """
    graph = _Graph(label, size)
    _graphs[graph] = None
    capture = _capture()
    piece = _Piece(graph, {}, [])
    _share(piece, inputs)
    capture.pieces.append(piece)
    errors, place = capture.errors, weakref.ref(piece)

    def run(*args: Any) -> Any:
        if errors:  # a piece compiled after this one was refused
            raise errors[0].with_traceback(None)
        results = compiled(*args)
        leaves = results if isinstance(results, (list, tuple)) else (results,)
        if any_fake(leaves):  # torch wants to know what the next piece is given
            _share(place(), leaves)
        else:
            graph.last = _waiting(leaves) or graph.last
        return results

    return run


def _share(piece: _Piece | None, values: Iterable[Any]) -> None:
    """Note tensors that other pieces may have too."""
    if piece is not None:
        dense = [value for value in values if _is_dense(value)]
        for key, size in _by_storage(dense).items():
            piece.shared[key] = max(size, piece.shared.get(key, 0))
        piece.known += [StorageWeakRef(value.untyped_storage()) for value in dense]


def _waiting(leaves: Iterable[Any]) -> weakref.ref[Any] | None:
    """The autograd node that keeps what a call saved."""
    for leaf in leaves:
        node = leaf.grad_fn if isinstance(leaf, torch.Tensor) else None
        if node is not None and _torch.keeps_tensors(node):
            return weakref.ref(node)
    return None
