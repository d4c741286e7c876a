"""Bounds on gradients held with lossy codecs: ``python benchmarks/bounded.py [NAME ...]``.

Small models are calibrated to ``max_grad_error`` with a codec at ``budget="min"``. Then they are
compiled anew, with what was decided and with exact codecs alone, and run from one seed: the
gradients of the two are to be no further apart than the bound.

Ops run one by one (``lower="eager"``): numbers are what is asked, not kernels.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Callable

import precision_subjects
import subjects
import torch
import training_lossy
from torch import Tensor, nn

Step = tuple[nn.Module, tuple[Tensor, ...]]
#: Gradients shorter than this share of the longest are zero but for rounding.
FLOOR = 1e-4


def taken(subject: subjects.Subject) -> Step:
    return subject.module, subject.inputs


def language() -> Step:
    """The language model of ``training_lossy.py``, at its first step."""
    model, batches = training_lossy.language(0)
    return model, next(batches)


SUBJECTS: dict[str, Callable[[], Step]] = {
    "language": language,
    "evoformer": lambda: taken(subjects.evoformer("small")),
    "bert": lambda: taken(subjects.bert("small")),
    "swin": lambda: taken(precision_subjects.swin("small")),
}


def gradients(step: Step, passes: str) -> tuple[dict[str, Tensor], str]:
    """Each parameter's gradient, and what the report says of the bound."""
    import memcompile

    module, inputs = step
    torch._dynamo.reset()
    module.zero_grad()
    torch.manual_seed(0)
    options = {"budget": "min", "passes": passes, "lower": "eager"}
    torch.compile(module, backend="memopt", options=options)(*inputs).backward()
    found = {n: p.grad.double() for n, p in module.named_parameters() if p.grad is not None}
    return found, memcompile.reports()[-1].fidelity


def apart(got: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    """The largest relative error of a gradient, by norms."""
    floor = FLOOR * max(float(gradient.norm()) for gradient in wanted.values())
    return max(
        float((got[name] - gradient).norm() / gradient.norm())
        for name, gradient in wanted.items()
        if gradient.norm() > floor
    )


def study(name: str, codec: str, bound: float) -> bool:
    """Calibrate one subject, measure it without the calibration's help, and print a line."""
    import memcompile

    step = SUBJECTS[name]()
    passes = f"compress{{lossy={codec}}}"
    exact, _ = gradients(step, "compress")
    unbound, _ = gradients(step, passes)
    module, inputs = step
    options = {"budget": "min", "passes": passes, "lower": "eager"}
    try:
        done = memcompile.calibrate(module, *inputs, max_grad_error=bound, **options)
    except memcompile.FidelityError as refused:
        print(f"{name}, {codec}: refused: {refused}", flush=True)
        return True
    held, says = gradients(step, passes)
    error = apart(held, exact)
    print(
        f"{name}, {codec}: off by {apart(unbound, exact):.1e} as it is, by {error:.1e} calibrated "
        f"to {bound:g}: {'held' if error <= bound else 'EXCEEDED'}; {len(done.exact)} values kept "
        f"exact, {done.steps} steps; the report: {says}",
        flush=True,
    )
    return error <= bound


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help=", ".join(SUBJECTS))
    parser.add_argument("--codecs", nargs="*", default=["int8", "int4"])
    parser.add_argument("--bound", type=float, default=1e-2)
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    with tempfile.TemporaryDirectory() as folder:  # no decision of an earlier run
        os.environ["MEMCOMPILE_CACHE"] = folder
        names = given.names or list(SUBJECTS)
        return 0 if all([study(n, c, given.bound) for n in names for c in given.codecs]) else 1


if __name__ == "__main__":
    sys.exit(main())
