"""Private torch that fusion needs: Inductor's fusion heuristics.

Checked by running on torch 2.13.0.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch._inductor.virtualized import V

__all__ = ["near_reductions"]


@contextlib.contextmanager
def near_reductions() -> Iterator[None]:
    """Within the block, Inductor fuses no reduction with a reader far below it.

    A reduction is smaller than what it reads, and a kernel runs where its last part does:
    fused into a sum at the other end of the backward, as the gradient of a parameter used
    twice is, it would keep all it reads alive until then (pytorch #193193). Inductor has
    this rule, with its own measure of "far", for kernels that merely share an input.
    """
    given = V.choices
    base: Any = type(given)

    class Near(base):  # a user's own heuristics stay in force
        @staticmethod
        def can_fuse_vertical(scheduler: Any, one: Any, two: Any, score: int) -> bool:
            if one.is_reduction() and scheduler.are_long_distant_nodes(one, two):
                return False
            return bool(base.can_fuse_vertical(scheduler, one, two, score))

    near = object.__new__(Near)
    near.__dict__.update(given.__dict__)
    with V.set_choices_handler(near):
        yield
