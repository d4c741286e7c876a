"""What earlier graphs of the same step hold, where a graph break cut it.

A graph compiled while another one's forward has run and its backward has not, starts
with less room: that graph's inputs and saved values are alive. Its outputs tell: their
``grad_fn`` lets go of saved tensors when its backward has run.
"""

from __future__ import annotations

import dataclasses
import gc
import weakref
from collections.abc import Callable
from typing import Any

import torch

from memcompile import _torch


@dataclasses.dataclass(eq=False)
class _Graph:
    """One compiled training graph and the last call whose backward may be due."""

    label: str
    bytes: int  #: held from its forward to its backward, parameters and inputs included
    last: weakref.ref[Any] | None = None


#: Graphs that are still callable: each lives as long as its compiled function.
_graphs: weakref.WeakSet[_Graph] = weakref.WeakSet()


def held() -> tuple[int, list[str]]:
    """Bytes held now by graphs whose backward is still due, and their labels."""
    due = [graph for graph in _graphs if _is_due(graph)]
    if due:
        gc.collect()  # a dropped loss may still be waiting in a reference cycle
        due = [graph for graph in due if _is_due(graph)]
    return sum(graph.bytes for graph in due), [graph.label for graph in due]


def forget() -> None:
    """Count nothing of what was compiled so far."""
    _graphs.clear()


def _is_due(graph: _Graph) -> bool:
    node = graph.last() if graph.last is not None else None
    if node is None:
        return False
    try:
        return bool(_torch.raw_saved(node))
    except RuntimeError:  # freed: its backward has run
        return False


def watch(compiled: Callable[..., Any], label: str, size: int) -> Callable[..., Any]:
    """``compiled``, remembering the autograd node of its last call."""
    graph = _Graph(label, size)
    _graphs.add(graph)

    def run(*args: Any) -> Any:
        results = compiled(*args)
        for leaf in results if isinstance(results, (list, tuple)) else (results,):
            node = leaf.grad_fn if isinstance(leaf, torch.Tensor) else None
            if node is not None and _torch.keeps_tensors(node):
                graph.last = weakref.ref(node)
                break
        return results

    return run
