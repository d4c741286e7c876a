"""``calibrate``: a bound on the error, met by leaving as few nodes exact as it takes."""

from __future__ import annotations

import collections
from collections.abc import Sequence
from typing import Any

from memcompile.decided import Decision, save
from memcompile.errors import BudgetError, FidelityError
from memcompile.fidelity.data import Calibration, NodeError
from memcompile.fidelity.sensitivity import Candidate, together, worst_first
from memcompile.fidelity.steps import Walked, compiled, inexact, recorded
from memcompile.fidelity.subject import Ran, Subject
from memcompile.fidelity.values import apart, under
from memcompile.options import Options, OptionsError
from memcompile.registry import resolve, spell
from memcompile.watch import Seen

#: After so many steps all that is left is moved back at once.
STEPS = 10
#: So many steps may go into giving nodes back that were moved for nothing.
GIVEN_BACK = 3

#: An error of infinity counts as so many times its bound.
MOST = 1e12

#: A candidate and the graph it is of.
Placed = tuple[int, Candidate]


def calibrate(
    model: Any,
    *inputs: Any,
    loss: Any = None,
    max_error: float | None = None,
    max_grad_error: float | None = None,
    repair: bool = True,
    **options: Any,
) -> Calibration:
    """Measure what inexact passes do to one training step, and hold them to a bound.

    The step is run as the options have it and without the passes that may change numbers, from
    one seed. Where it is over a bound, what each changed node brings to it is measured, and
    nodes are moved back to exact numbers, those first that bring most error for the bytes and
    seconds they buy, until the step, run again, is within it. What was decided is kept on
    disk: whoever compiles the same graphs with the same options, the budget aside, gets it.

    Args:
        model: an ``nn.Module``, or a function, as it will be given to ``torch.compile``.
        inputs: what it is called with: a sample of the data.
        loss: of the model's output, as for :func:`memcompile.check`.
        max_error: the largest relative error of the loss, an output or a gradient.
        max_grad_error: the largest relative error of a gradient.
        repair: whether nodes may be moved back; else a bound not met is an error.
        options: memopt's, as for ``torch.compile``.

    Raises:
        FidelityError: over the bound, and nothing may be, or is left to be, moved back.
        OptionsError: an option or a bound is out of range.
        BudgetError: no plan fits.
    """
    for name, bound in (("max_error", max_error), ("max_grad_error", max_grad_error)):
        if bound is not None and not (isinstance(bound, (int, float)) and bound > 0):
            raise OptionsError(name, bound, "None, or a number above 0")
    parsed = Options.parse(options)
    passes = resolve(parsed.pipeline)
    subject = Subject(model, inputs, loss)
    search = _Search(subject, options, passes, max_error, max_grad_error)
    within = search.run({})
    before = search.error, search.grad_error
    if not within and not repair:
        raise search.refusal("and repair=False")
    if not within:
        search.repair()
    search.save()
    return Calibration(
        error=search.error,
        grad_error=search.grad_error,
        max_error=max_error,
        max_grad_error=max_grad_error,
        exact=tuple(search.rows),
        before=before,
        loss=subject.made,
        passes=tuple(spell(each) for each in inexact(passes)),
        lower=parsed.lower,
        steps=search.steps,
        graphs=len(search.graphs),
        notes=(*search.notes, *search.under_the_floor()),
    )


class _Search:
    """What is exact so far, and what the step then is."""

    def __init__(
        self,
        subject: Subject,
        options: dict[str, Any],
        passes: Sequence[Any],
        max_error: float | None,
        max_grad_error: float | None,
    ) -> None:
        self.subject, self.options, self.passes = subject, options, passes
        self.max_error, self.max_grad_error = max_error, max_grad_error
        self.notes: list[str] = []
        self.steps = 0
        self.exact: dict[str, frozenset[str]] = {}
        self.rows: list[NodeError] = []
        self.graphs: list[Seen] = []
        self.error = self.grad_error = 0.0
        self.below: dict[str, float] = {}  #: errors of tensors under the floor
        self.known: list[Seen] = []  #: graphs with what they are called with
        self.plain = self._plain()

    def _plain(self) -> Ran:
        """The step without inexact passes; at its least peak where it does not fit with them."""
        kept = [each for each in self.passes if each.exactness != "no"]
        options = {**self.options, "passes": kept, "precision": None}
        self.steps += 1
        try:
            return compiled(self.subject, options, {})[0]
        except BudgetError:
            self.notes.append("the exact plan does not fit the budget: its least peak was taken")
            return compiled(self.subject, {**options, "budget": "min"}, {})[0]

    def run(self, exact: dict[str, frozenset[str]]) -> bool:
        """Run the step with these nodes exact; whether it is within the bounds."""
        ran, self.graphs = compiled(self.subject, self.options, exact)
        self.steps += 1
        self.exact = exact
        self.error, self.grad_error, self.below = _errors(ran, self.plain)
        return self.ratio <= 1

    @property
    def ratio(self) -> float:
        """The error as a multiple of what it may be."""
        return self._ratio(self.error, self.grad_error)

    def _ratio(self, error: float, grad_error: float) -> float:
        ratios = [0.0]
        if self.max_error is not None:
            ratios.append(error / self.max_error)
        if self.max_grad_error is not None:
            ratios.append(grad_error / self.max_grad_error)
        return max(ratios)

    # -- moving back ------------------------------------------------------------------------

    def repair(self) -> None:
        """Move nodes back until the bounds hold. Raises :class:`FidelityError`."""
        while True:
            walked = self._walk()
            order = self._order(walked)
            if not order:
                raise self.refusal("and nothing is left to be moved back")
            few = len(order) if self.steps >= STEPS else self._enough(order)
            start = self.exact
            if self.run(_with(start, order[:few], walked)):
                few = self._given_back(start, order, few, walked)
                self.rows += [walked.row(*each) for each in order[:few]]
                return
            self.rows += [walked.row(*each) for each in order[:few]]

    def _given_back(
        self, start: dict[str, frozenset[str]], order: list[Placed], few: int, walked: Walked
    ) -> int:
        """Fewer nodes that do, by bisection; the least number that was run and did."""
        fails = 0
        for _ in range(GIVEN_BACK):
            if few - fails <= 1:
                break
            middle = (few + fails) // 2
            if self.run(_with(start, order[:middle], walked)):
                few = middle
            else:
                fails = middle
        wanted = _with(start, order[:few], walked)
        if self.exact != wanted:
            self.run(wanted)
        return few

    def _walk(self) -> Walked:
        if not self.known:
            self.known = recorded(self.subject)[1]
            self.steps += 1
        walked = Walked(self.graphs, self.known, self.passes)
        self.notes += [note for note in walked.notes if note not in self.notes]
        return walked

    def _order(self, walked: Walked) -> list[Placed]:
        """What can still be moved back, in that order."""
        place = {id(one): at for at, one in walked.found}
        found = [
            one
            for at, one in walked.found
            if not set(one.names) <= self.exact.get(walked.graphs[at].key, frozenset())
        ]
        ordered = worst_first(found, gradients=self.max_error is None)
        ordered.sort(key=lambda one: self._ratio(one.error, one.grad_error) <= 1)  # alone too much
        return [(place[id(one)], one) for one in ordered]

    def _enough(self, order: list[Placed]) -> int:
        """How many of the first to move back, if what each brings adds up as noise does.

        What was measured of the whole step says how far from that it is.
        """
        scale = min(self.ratio, MOST) / max(self._together(order), 1e-300)
        for few in range(1, len(order)):
            if scale * self._together(order[few:]) <= 1:
                return few
        return len(order)

    def _together(self, left: Sequence[Placed]) -> float:
        """What candidates bring together, each independent of the others, over the bound."""
        graphs = {at: [one for place, one in left if place == at] for at, _ in left}
        error = max((together(each, False) for each in graphs.values()), default=0.0)
        grad_error = max((together(each, True) for each in graphs.values()), default=0.0)
        return min(self._ratio(error, grad_error), MOST)

    def under_the_floor(self) -> list[str]:
        """What is over a bound, and counts for nothing because it is so small."""
        bounds = [b for b in (self.max_error, self.max_grad_error) if b is not None]
        over = [name for name, error in self.below.items() if bounds and error > min(bounds)]
        if not over:
            return []
        return [f"under the floor, and over the bound beside it: {', '.join(over)}"]

    # -- the end ----------------------------------------------------------------------------

    def refusal(self, why: str) -> FidelityError:
        """The error that names the bound, what was measured, and the nodes that bring most."""
        walked = self._walk()
        order = sorted(walked.found, key=lambda each: -each[1].error)
        rows = [walked.row(*each) for each in order[:5]]
        lines = [f"the step is over its bound {why}"]
        for name, error, bound in (
            ("max_error", self.error, self.max_error),
            ("max_grad_error", self.grad_error, self.max_grad_error),
        ):
            if bound is not None:
                lines.append(f"{name}={bound:g}: {error:.3g} was measured")
        lines += [
            f"node {row.node}{f' ({row.source})' if row.source else ''}: brings {row.error:.2g}, "
            f"{row.grad_error:.2g} to a gradient{f', by {row.by}' if row.by else ''}"
            for row in rows
        ]
        if not rows:
            lines.append("no node that a pass changed is known to bring it")
        over = self.max_error is not None and self.error > self.max_error
        return FidelityError(
            "\n".join(lines),
            error=self.error if over else self.grad_error,
            bound=self.max_error if over else self.max_grad_error,
            nodes=tuple(row.node for row in rows),
        )

    def save(self) -> None:
        """Keep what was decided, a file for each graph; without inexact passes there is nothing."""
        if not inexact(self.passes):
            return
        moved: dict[str, list[str]] = collections.defaultdict(list)
        for seen in self.graphs:
            moved[seen.key] += [move.value for move in seen.moves]
        for key, values in moved.items():
            save(
                key,
                Decision(
                    self.exact.get(key, frozenset()),
                    self.error,
                    self.grad_error,
                    self.max_error,
                    self.max_grad_error,
                    tuple(values),
                ),
            )


def _with(
    exact: dict[str, frozenset[str]], more: Sequence[Placed], walked: Walked
) -> dict[str, frozenset[str]]:
    """``exact``, and the nodes of more candidates."""
    found = dict(exact)
    for at, one in more:
        key = walked.graphs[at].key
        found[key] = found.get(key, frozenset()) | frozenset(one.names)
    return found


def _errors(ran: Ran, plain: Ran) -> tuple[float, float, dict[str, float]]:
    """Largest relative error of all, of gradients; and that of each tensor under the floor."""
    largest, below = {"gradient": 0.0, "": 0.0}, {}
    for one, other in zip(ran.results, plain.results, strict=True):
        scale = plain.scale(other)
        error = apart(one.value, other.value, scale)
        if under(other, scale):
            below[other.label] = error
            continue
        group = "gradient" if other.group == "gradient" else ""
        largest[group] = max(largest[group], error)
    return max(largest.values()), largest["gradient"], below
