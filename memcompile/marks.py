"""What users mark in their models, for passes to read: so far, what stays in full precision."""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Callable, Iterator
from typing import Any, TypeVar, overload

import torch
from torch import fx

from memcompile import _torch
from memcompile.step import module_names

F = TypeVar("F", bound=Callable[..., Any])

#: The mark, among what ``torch.fx.traceback.annotate`` puts into ``node.meta["custom"]``.
FULL_PRECISION = "memcompile.full_precision"


@overload
def full_precision() -> contextlib._GeneratorContextManager[None]: ...
@overload
def full_precision(function: F) -> F: ...
def full_precision(function: Callable[..., Any] | None = None) -> Any:
    """Mark a part of a model: its numbers stay in the dtype that the model computes them in.

    For use inside of what is compiled: ``with memcompile.full_precision():`` around a part of a
    ``forward``, or ``@memcompile.full_precision`` on a function or method. The pass ``cast``
    (``precision="bf16"``) leaves what is traced there alone, forward and backward, and no lossy
    codec of ``compress`` touches it. In eager it does nothing, nor for compiled functions that
    are called in a block which is not compiled itself.

    Args:
        function: what to mark; ``None`` for a block.

    Raises:
        TypeError: for a class; mark its ``forward``.
    """
    if function is None:
        return _marking()
    if isinstance(function, type):
        raise TypeError(f"full_precision marks functions: mark {function.__name__}.forward")

    @functools.wraps(function)
    def marked(*args: Any, **kwargs: Any) -> Any:
        with _marking():
            return function(*args, **kwargs)

    return marked


@contextlib.contextmanager
def _marking() -> Iterator[None]:
    # Not annotate itself: that is for one thread, and Dynamo does not return it from a frame.
    if torch.compiler.is_compiling():
        with _torch.annotate({FULL_PRECISION: True}):
            yield
    else:
        if _torch.gave_up():
            warnings.warn(
                "a graph break inside of memcompile.full_precision(): what is compiled there is "
                "not marked; fullgraph=True says where it is",
                stacklevel=3,
            )
        yield


def is_full_precision(node: fx.Node) -> bool:
    """Whether the node comes from what the user has marked, forward or backward."""
    return FULL_PRECISION in (node.meta.get("custom") or {})


def marks(module: fx.GraphModule) -> str:
    """Names the marked nodes of a captured graph: its code does not show them."""
    return ",".join(f"{path}:{n.name}" for path, n in _nodes(module) if is_full_precision(n))


def modules(module: fx.GraphModule) -> str:
    """Names the modules that each node of a captured graph comes from, likewise."""
    return ",".join(f"{path}:{n.name}:{'/'.join(module_names(n))}" for path, n in _nodes(module))


def _nodes(module: fx.GraphModule) -> Iterator[tuple[str, fx.Node]]:
    """The nodes of a captured graph and of the graphs inside of it, and where these are."""
    for path, part in module.named_modules():
        if isinstance(part, fx.GraphModule):
            yield from ((path, node) for node in part.graph.nodes)
