"""The errors users catch."""

from __future__ import annotations


class MemcompileError(Exception):
    """Base of all errors this package raises on purpose."""


class PassError(MemcompileError):
    """A pass broke its contract; the message says which pass, which node and what to do."""


class BudgetError(MemcompileError):
    """No plan fits the budget. Raised when the graph is first called, before it runs.

    Attributes:
        budget: total bytes asked for, the reserve taken off.
        floor: total bytes of the least lowered peak found (no proof that none is lower).
        node: name of the node that sets the floor.
        source: its source line, ``""`` when unknown.
    """

    def __init__(self, message: str, *, budget: int, floor: int, node: str, source: str) -> None:
        super().__init__(message)
        self.budget, self.floor, self.node, self.source = budget, floor, node, source
