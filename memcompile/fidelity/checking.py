"""``check``: the step beside float64, eager and Inductor."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from memcompile import _torch
from memcompile._torch.modes import extra_random_decomps, usual_decompositions
from memcompile.fidelity.data import Compared, Fidelity, NodeError
from memcompile.fidelity.sensitivity import Candidate
from memcompile.fidelity.steps import Walked, compiled, inexact, recorded
from memcompile.fidelity.subject import Ran, Subject
from memcompile.fidelity.values import apart, under
from memcompile.options import Options
from memcompile.registry import resolve, spell
from memcompile.testing.numbers import norms
from memcompile.watch import Seen

#: So many nodes are told.
WORST = 10
#: Of those that bring at least this share of what the worst brings, those stand first whose own
#: value is wrong by more than its dtype rounds: others only feed what cancels.
SHARE = 0.1


def check(model: Any, *inputs: Any, loss: Any = None, **options: Any) -> Fidelity:
    """Compare one training step under memopt with float64, beside eager and Inductor.

    The step runs once each way, from seed 0, with the same random draws in all of them, also
    in float64. The model, its gradients and buffers, the inputs and the random state are
    afterwards as they were; what this process has compiled is forgotten
    (``torch.compiler.reset``).

    Args:
        model: an ``nn.Module``, or a function; of a function the modules that it refers to
            are compared.
        inputs: what it is called with.
        loss: of the model's output; ``None``: a scalar output itself, else the sum of all
            outputs, each element with a random sign.
        options: memopt's, as for ``torch.compile``. With ``lower="eager"`` no kernel is built,
            and Inductor stands in as its graphs run op by op.

    Raises:
        OptionsError: an option is unknown or out of range.
        BudgetError: no plan fits.
        FidelityError: the step does not run in float64.
    """
    parsed = Options.parse(options)
    passes = resolve(parsed.pipeline)
    subject = Subject(model, inputs, loss)
    as_eager = _torch.inductor_config.fallback_random or parsed.inductor.get("fallback_random")
    table = None if as_eager else usual_decompositions()
    with _torch.inductor_config.patch(fallback_random=True):
        eager = subject.eager({} if as_eager else extra_random_decomps)
        exact, missed = subject.reference(), subject.draws.missed
        plain, known = recorded(subject, table)
        if parsed.lower == "inductor":
            alone: dict[str, Any] = {"inductor": parsed.inductor, "mode": parsed.mode, "passes": []}
            plain, _ = compiled(subject, alone, {}, table)
        ours, graphs = compiled(subject, options, None, table)
    nodes, notes = _worst(graphs, known, passes)
    if missed:
        notes.append(f"{missed} random draws of float64 were its own: they are no op of torch's")
    return Fidelity(
        tensors=compare(exact, eager, plain, ours),
        nodes=nodes,
        loss=subject.made,
        passes=tuple(spell(each) for each in inexact(passes)),
        lower=parsed.lower,
        graphs=len(graphs),
        exact=tuple(name for seen in graphs for name in sorted(seen.exact)),
        notes=tuple(notes),
    )


def compare(exact: Ran, eager: Ran, plain: Ran, ours: Ran) -> tuple[Compared, ...]:
    """Each tensor's error under each way to run the step."""
    rows = []
    for wanted, *others in zip(
        exact.results, eager.results, plain.results, ours.results, strict=True
    ):
        scale = exact.scale(wanted)
        one, two, three = (apart(other.value, wanted.value, scale) for other in others)
        norm, below = norms([wanted])[wanted.group], under(wanted, scale)
        rows.append(Compared(wanted.group, wanted.label, norm, one, two, three, below))
    return tuple(rows)


def _worst(
    graphs: Sequence[Seen], known: Sequence[Seen], passes: Sequence[Any]
) -> tuple[tuple[NodeError, ...], list[str]]:
    """The nodes that bring most error: of inexact passes, or where these did nothing, of all."""
    walked = Walked(graphs, known, passes)
    if not walked.found:
        walked = Walked(graphs, known, passes, all_nodes=True)
    most = max((one.error for _, one in walked.found), default=0.0)

    def rank(each: tuple[int, Candidate]) -> tuple[bool, float]:
        one = each[1]
        return not (one.broken and one.error >= SHARE * most), -one.error

    order = sorted(walked.found, key=rank)
    return tuple(walked.row(*each) for each in order[:WORST]), walked.notes
