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


class FidelityError(MemcompileError):
    """The step's numbers are further off than allowed, or cannot be compared.

    Attributes:
        error: the largest relative error that was measured, ``None`` where none could be.
        bound: what it was allowed to be.
        nodes: names of the nodes that bring most of it, worst first.
    """

    def __init__(
        self,
        message: str,
        *,
        error: float | None = None,
        bound: float | None = None,
        nodes: tuple[str, ...] = (),
    ) -> None:
        super().__init__(message)
        self.error, self.bound, self.nodes = error, bound, nodes
