"""Chunk: run a region around a large value as a loop over one of its dimensions.

Neither the value nor what hangs on it, forward or backward, is ever whole. Cf. AutoChunk
(Zhao et al. 2024), for inference; the backward is looped here too.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable
from typing import ClassVar

import torch
from torch import fx

from memcompile.contract import Context, Exactness, Loop, Proposer
from memcompile.step import Step, hint, in_module, module_names

#: Chunk counts offered, as far as ``max_chunks`` goes.
COUNTS = (4, 12, 24, 64)
#: More of them, for values of which so many bytes would be left in the largest chunk else.
MORE, STILL_LARGE = (192, 512), 2**24


@functools.lru_cache(maxsize=1024)
def _counts(length: int, most: int, many: bool) -> tuple[int, ...]:
    """Chunk counts, at most ``most``, dividing the length if near; ``many``: of a large value.

    A shorter last chunk costs a second loop; up to twice as many chunks avoid it. A symbolic
    length (0) is divided by nothing.
    """
    found: list[int] = []
    counts = COUNTS + MORE if many else COUNTS
    for count in counts:
        near = range(count, min(2 * count, most + 1)) if length else ()
        found += [next((n for n in near if length % n == 0), count)] if count <= most else []
    return tuple(dict.fromkeys(found))


@dataclasses.dataclass(frozen=True)
class Chunk(Proposer):
    """Offer loops over every dimension of every value that owns memory."""

    name: ClassVar[str] = "chunk"
    by_default: ClassVar[bool] = False

    max_chunks: int = 512  #: at most so many trips
    least: float = 0.02  #: only values of at least this share of the largest one's bytes
    only: str | tuple[str, ...] = ()  #: modules whose values loops may grow from; (): any
    skip: str | tuple[str, ...] = ()  #: modules of which no loop takes anything in

    def __post_init__(self) -> None:
        for option in ("only", "skip"):
            given = getattr(self, option)
            names = [given] if isinstance(given, str) else given
            if not isinstance(names, (list, tuple)) or not all(
                isinstance(name, str) and name for name in names
            ):
                raise ValueError(
                    f"{option}={given!r} names no modules; write a module's name or class, such "
                    f"as {option}=decoder, or several as {option}=('decoder','head.*')"
                )
            if isinstance(given, list):
                object.__setattr__(self, option, tuple(given))

    @property
    def exactness(self) -> Exactness:
        """Sums over the chunked dimension are added in another order."""
        return "rounding"

    @property
    def by_module(self) -> bool:
        """Both ``only`` and ``skip`` name modules."""
        return bool(self.only or self.skip)

    def propose(self, step: Step, context: Context) -> Iterable[Loop]:
        """Every dimension long enough, with several chunk counts."""
        only = self._named("only", step, context)
        without = frozenset(self._named("skip", step, context))
        values = [
            n
            for n in step.nodes
            if n.op == "call_function" and isinstance(n.meta.get("val"), torch.Tensor)
        ]
        largest = max((step.bytes(n) for n in values), default=0)
        for value in values:
            if step.roots[value] is not value or step.bytes(value) < self.least * largest:
                continue
            if value in without or (self.only and value not in only):
                continue
            for dim, length in enumerate(value.meta["val"].shape):
                many = step.bytes(value) // COUNTS[-1] > STILL_LARGE
                most = min(hint(length), self.max_chunks)
                most = most if many else min(most, COUNTS[-1])
                for chunks in _counts(length if isinstance(length, int) else 0, most, many):
                    yield Loop(value, dim, chunks, without)

    def _named(self, option: str, step: Step, context: Context) -> set[fx.Node]:
        """The nodes of the modules an option names; a name of none is remarked on."""
        given = getattr(self, option)
        found: set[fx.Node] = set()
        for name in (given,) if isinstance(given, str) else given:
            nodes = {n for n in step.nodes if in_module(n, name)}
            if not nodes:
                context.remark(_unknown(option, name, step))
            found |= nodes
        return found


def _unknown(option: str, name: str, step: Step) -> str:
    """That a name is no module's, and the outermost modules there are."""
    known = dict.fromkeys(m for n in step.nodes for m in module_names(n) if "." not in m)
    there = f"there are {', '.join(known)}" if known else "it has no modules"
    return f"{option}={name!r} is no module of this graph; {there}"
