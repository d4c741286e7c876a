"""What is left out while a step is planned, which makes many graphs and much garbage."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator

from memcompile._torch.symbols import unchecked_nodes


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
