"""What is left out while a step is planned, which makes many graphs and much garbage."""

from __future__ import annotations

import contextlib
import functools
import gc
from collections.abc import Callable, Iterator
from typing import ParamSpec, TypeVar

from memcompile._torch.symbols import unchecked_nodes

P = ParamSpec("P")
R = TypeVar("R")

#: Words that the frame of a roomy call takes: with them CPython maps two mebibytes, and the calls
#: within have what is left.
ROOM = 2**17


def roomy(function: Callable[P, R]) -> Callable[P, R]:
    """The function, with room on the interpreter's stack for all that it calls.

    CPython (3.11 on) keeps frames in chunks of 16 KiB and unmaps one when its first frame returns:
    a loop whose calls begin at the end of a chunk maps and unmaps one in every call. At an unlucky
    depth that is a third of planning. A large frame makes the interpreter map a large chunk, of
    which only what is used takes memory.
    """

    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        return function(*args, **kwargs)

    call.__code__ = call.__code__.replace(co_stacksize=ROOM)
    return functools.wraps(function)(call)


@contextlib.contextmanager
def planning() -> Iterator[None]:
    """Within the block a step is planned: no garbage is collected, no node checked."""
    with unchecked_nodes(), uncollected():
        yield


@contextlib.contextmanager
def uncollected() -> Iterator[None]:
    """Without cyclic garbage collection: walking all of torch is a quarter of planning.

    What became garbage meanwhile is collected at the end, in one pass over what is new.
    """
    was, frozen = gc.isenabled(), gc.get_freeze_count() > 0  # a user's own freeze is let be
    gc.disable()
    if not frozen:
        gc.freeze()
    try:
        yield
    finally:
        if was and not frozen:
            gc.collect()
        if not frozen:
            gc.unfreeze()
        if was:
            gc.enable()
