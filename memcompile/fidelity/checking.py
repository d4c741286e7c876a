"""``check``: the step beside float64, eager and Inductor."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from memcompile import _torch
from memcompile.fidelity.data import Compared, Fidelity, NodeError
from memcompile.fidelity.steps import Walked, compiled, inexact, recorded
from memcompile.fidelity.subject import Ran, Subject
from memcompile.fidelity.values import apart
from memcompile.options import Options
from memcompile.registry import resolve, spell
from memcompile.testing.numbers import norms
from memcompile.watch import Seen

#: So many nodes are told.
WORST = 10
#: A tensor whose norm is below this share of its group's largest is judged by that.
FLOOR = 1e-4


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
    passes = resolve(parsed.passes)
    subject = Subject(model, inputs, loss)
    with _torch.inductor_config.patch(fallback_random=True):
        eager, exact = subject.eager(), subject.reference()
        missed = subject.draws.missed
        plain, known = recorded(subject)
        if parsed.lower == "inductor":
            patches = {**_torch.mode_patches(parsed.mode), **parsed.inductor}
            plain = subject.compiled("inductor", options=patches)
        ours, graphs = compiled(subject, options)
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
    scales = norms(exact.results)
    rows = []
    for wanted, *others in zip(
        exact.results, eager.results, plain.results, ours.results, strict=True
    ):
        scale = scales[wanted.group]
        one, two, three = (apart(other.value, wanted.value, scale) for other in others)
        norm = norms([wanted])[wanted.group]
        below = norm < FLOOR * scale or norm == 0
        rows.append(Compared(wanted.group, wanted.label, norm, one, two, three, below))
    return tuple(rows)


def _worst(
    graphs: Sequence[Seen], known: Sequence[Seen], passes: Sequence[Any]
) -> tuple[tuple[NodeError, ...], list[str]]:
    """The nodes that bring most error: of inexact passes, or where these did nothing, of all."""
    walked = Walked(graphs, known, passes)
    if not walked.found:
        walked = Walked(graphs, known, passes, all_nodes=True)
    order = sorted(walked.found, key=lambda each: -each[1].error)
    return tuple(walked.row(*each) for each in order[:WORST]), walked.notes
