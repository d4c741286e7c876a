"""Mixed precision beside fp32 and autocast: ``python benchmarks/precision.py [NAME ...]``.

Each subject's training step is compiled by Inductor in fp32, by Inductor under autocast, and with
``precision="bf16"``, all in one process. Printed are step peaks, measured, and gradient errors
against float64: the norm of the difference over the norm, all gradients together, at five draws
of the weights: a single one's rounding errors differ by chance. Times are
printed where ``--pairs`` asks for them; on a CPU they say little of 16 bits.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys

import precision_subjects
import sides
import torch
from sides import Side
from subjects import Scale, Subject
from torch import Tensor, nn

#: Weights at which errors are taken: each a few per cent from the one before.
DRAWS = 12
#: Our step peak over fp32's and over autocast's, and our error over autocast's: at most.
OF_FP32, OF_AUTOCAST, ERROR = 0.60, 0.85, 1.0


@dataclasses.dataclass
class Row:
    """One side of one subject."""

    label: str
    peak: int  #: bytes above what lived before the step
    error: float  #: of all gradients together, against float64: root mean square over the draws
    loss: float  #: relative error of the loss, likewise


class Autocast(nn.Module):
    """``module`` under torch's autocast."""

    def __init__(self, module: nn.Module, dtype: torch.dtype = torch.bfloat16) -> None:
        super().__init__()
        self.module, self.dtype = module, dtype

    def forward(self, *inputs: Tensor) -> Tensor:
        with torch.autocast(inputs[0].device.type, self.dtype):
            return self.module(*inputs)


def compiled(subject: Subject) -> list[Side]:
    """fp32, autocast and ours, each as one graph."""
    under = dataclasses.replace(subject, module=Autocast(subject.module))
    options = {"precision": "bf16", "strict": True}
    return [
        sides.compiled(subject, "fp32"),
        sides.compiled(under, "autocast"),
        sides.compiled(subject, 'precision="bf16"', "memopt", options),
    ]


def measure(subject: Subject, found: list[Side]) -> list[Row]:
    """Peaks and errors of each side."""
    rows = [Row(side.label, side.peak().bytes, 0.0, 0.0) for side in found]
    for draw in range(DRAWS):
        for module in [subject.module, *(side.module for side in found)]:
            disturb(module, draw)
        loss, exact = sides.float64(subject)
        for side, row in zip(found, rows, strict=True):
            own_loss, gradients = side.numbers()
            gap = sides.norm([a.double() - b for a, b in zip(gradients, exact, strict=True)])
            row.error += (gap / sides.norm(exact)) ** 2 / DRAWS
            row.loss += (float(own_loss) / float(loss) - 1) ** 2 / DRAWS
    for row in rows:
        row.error, row.loss = row.error**0.5, row.loss**0.5
    return rows


def disturb(module: nn.Module, draw: int) -> None:
    """Multiply every parameter by one plus a little noise, the same for the same ``draw``."""
    generator = torch.Generator().manual_seed(draw)
    with torch.no_grad():
        for parameter in module.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float32)
            parameter.mul_(1 + 0.05 * noise.to(parameter.dtype))


def judge(rows: list[Row]) -> list[tuple[str, float, float]]:
    """What is held against ours: its name, what was found, and the most allowed."""
    fp32, autocast, ours = rows
    return [
        ("peak over fp32's", ours.peak / fp32.peak, OF_FP32),
        ("peak over autocast's", ours.peak / autocast.peak, OF_AUTOCAST),
        ("error over autocast's", ours.error / autocast.error, ERROR),
    ]


def study(name: str, scale: Scale, pairs: int) -> bool:
    """Print one subject's figures; returns whether all limits are met."""
    subject = precision_subjects.SUBJECTS[name](scale)
    with sides.planned_anew():
        found = compiled(subject)
        rows = measure(subject, found)
        for row in rows:
            print(f"{name}, {row.label}: {row.peak / 1e6:.2f} MB,", end=" ")
            print(f"gradient error {row.error:.2e}, loss error {row.loss:.1e}")
        verdicts = judge(rows)
        for what, value, most in verdicts:
            print(f"  {what}: {value:.3f}, at most {most}: {'met' if value <= most else 'MISSED'}")
        if pairs:
            for ratio in sides.time_pairs([(found[2], found[1])], pairs, lambda: None):
                print(f"  time over autocast's: {ratio}")
    sys.stdout.flush()
    return all(value <= most for _, value, most in verdicts)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help=", ".join(precision_subjects.SUBJECTS))
    parser.add_argument("--scale", choices=("default", "small"), default="default")
    parser.add_argument("--pairs", type=int, default=0, help="of each time ratio")
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    names = given.names or list(precision_subjects.SUBJECTS)
    return 0 if all([study(name, given.scale, given.pairs) for name in names]) else 1


if __name__ == "__main__":
    sys.exit(main())
