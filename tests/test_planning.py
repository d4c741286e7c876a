"""What planning leaves out, and the room that it takes on the interpreter's stack."""

from __future__ import annotations

import gc
import resource
from collections.abc import Callable

import pytest

from memcompile.planning import planning, roomy


def leaf(number: int) -> int:
    """A call that returns at once."""
    return number + 1


def called(times: int) -> None:
    """One call after another."""
    for number in range(times):
        leaf(number)


def at_depth(depth: int, function: Callable[[], None]) -> None:
    """Call the function from so many calls down."""
    if depth:
        at_depth(depth - 1, function)
    else:
        function()


def faults(function: Callable[[], None]) -> int:
    """How often memory was mapped anew meanwhile."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    function()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def test_no_call_maps_memory_at_whatever_depth_planning_starts() -> None:
    """A chunk of that stack holds some hundred frames: at one of these depths it ends."""
    found = []

    @roomy
    def planned() -> None:
        called(1)
        found.append(faults(lambda: called(2000)))

    for depth in range(150):
        at_depth(depth, planned)
    assert max(found) < 200


def test_what_has_room_is_called_as_it_is() -> None:
    @roomy
    def divided(number: int, *, by: int = 2) -> float:
        """A number's part."""
        return number / by

    assert divided(6) == 3
    assert divided(6, by=3) == 2
    assert divided.__name__ == "divided"
    assert divided.__doc__ == "A number's part."
    with pytest.raises(ZeroDivisionError):
        divided(6, by=0)


def test_garbage_is_collected_again_when_the_step_is_planned() -> None:
    assert gc.isenabled()
    with pytest.raises(ValueError, match="met"), planning():
        assert not gc.isenabled()
        raise ValueError("met")
    assert gc.isenabled()
    assert not gc.get_freeze_count()
