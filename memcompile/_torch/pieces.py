"""Private torch that split graphs need: what the pieces of one captured graph share.

Checked by running on torch 2.13.0.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch._guards import TracingContext
from torch._subclasses.fake_tensor import FakeTensor

__all__ = ["any_fake", "captured_graph"]


def captured_graph() -> dict[str, Any] | None:
    """Torch's notes of the captured graph being compiled, with room for ours.

    They are the same for all pieces of it: DDP's optimizer hands a graph to its backend
    piece by piece. An attempt that starts anew has new ones. ``None`` outside of Dynamo.
    """
    context = TracingContext.try_get()
    return None if context is None else vars(context)


def any_fake(values: Iterable[Any]) -> bool:
    """Whether one of the values is a tensor without data, as torch passes while compiling."""
    return any(isinstance(value, FakeTensor) for value in values)
