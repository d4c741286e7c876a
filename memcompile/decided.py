"""What calibration decided for one captured graph: which of its nodes stay exact.

Decisions are kept on disk beside the reports, under a key of the graph and of all that may
change its numbers. A compilation of that graph reads them back, whatever its budget.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable
from pathlib import Path

from memcompile.folders import calibrations_folder, replace_text


@dataclasses.dataclass(frozen=True)
class Decision:
    """One graph's part of a calibration; errors and bounds are those of the whole step."""

    exact: frozenset[str] = frozenset()  #: names of the nodes whose numbers no pass may change
    error: float = 0.0  #: largest relative error of the loss, an output or a gradient
    grad_error: float = 0.0  #: largest of a gradient
    max_error: float | None = None  #: the bounds asked for
    max_grad_error: float | None = None
    moved: tuple[str, ...] = ()  #: values that inexact moves changed when it was measured

    def key(self) -> str:
        """Changes with what a pass is told."""
        return ",".join(sorted(self.exact))

    def sentence(self, moved: Iterable[str]) -> str:
        """What a report says; ``moved`` are the values that inexact moves change in its plan."""
        count = len(self.exact)
        kept = f"calibrated: {count} {'node' if count == 1 else 'nodes'} kept exact"
        figures = [
            _figure("error", self.error, self.max_error),
            _figure("gradient error", self.grad_error, self.max_grad_error),
        ]
        if self.max_error is None and self.max_grad_error is not None:
            figures.reverse()
        text = ", ".join([kept, *figures])
        others = set(moved) - set(self.moved)
        if others:
            text += f"; this plan changes {len(others)} more values than were measured: unchecked"
        return text


def _figure(what: str, error: float, bound: float | None) -> str:
    return f"{what} {error:.1e}" + (f" <= {bound:g}" if bound is not None else "")


#: What a report says of a pass that may change numbers where nothing was measured.
UNCHECKED = "unchecked: memcompile.calibrate or memcompile.check measures the error"


def _path(key: str) -> Path:
    return calibrations_folder() / f"{key}.json"


def save(key: str, decision: Decision) -> None:
    """Keep a decision for every later compilation. Raises ``OSError``."""
    values = {**dataclasses.asdict(decision), "exact": sorted(decision.exact)}
    replace_text(_path(key), json.dumps(values))


def load(key: str) -> Decision | None:
    """What was decided for the graph of this key, or ``None``."""
    try:
        values = json.loads(_path(key).read_text(encoding="utf-8"))
        values["exact"], values["moved"] = frozenset(values["exact"]), tuple(values["moved"])
        return Decision(**values)
    except (OSError, ValueError, TypeError, KeyError):
        return None
