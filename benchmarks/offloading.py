"""Peaks and times with the offload pass, on a GPU: ``python benchmarks/offloading.py [NAME ...]``.

Each subject is compiled by Inductor, and at each budget (a share of Inductor's step peak) by memopt
with recomputation alone, with values on the host alone, and with both. Peaks are the allocator's,
times are ratios to Inductor's in alternated pairs; what lies on the host and the predicted seconds
of its copies are the report's. A budget that a way cannot meet is said to be refused.

It has not been run on a GPU yet, so no limit is held against its figures.
"""

from __future__ import annotations

import argparse

import sides
import torch
from subjects import SUBJECTS, Subject

import memcompile
from memcompile.analysis.cost import calibrate

#: The ways that are put side by side, by the passes of each.
WAYS = {"recompute": "default", "host": "offload", "both": "default,offload"}


def measure(name: str, subject: Subject, budgets: list[str], pairs: int) -> None:
    """Print one subject's figures, a line for each budget and way."""
    own = sides.compiled(subject, "inductor", backend="inductor")
    print(f"{name}: Inductor peaks at {own.peak().bytes / 1e6:.1f} MB")
    for budget in budgets:
        for way, passes in WAYS.items():
            options = {"budget": budget, "passes": passes}
            try:
                side = sides.compiled(subject, way, backend="memopt", options=options)
                peak = side.peak()
            except memcompile.BudgetError as error:
                print(f"  {budget} {way}: refused, the floor is {(error.floor or 0) / 1e6:.1f} MB")
                continue
            report = memcompile.reports()[-1]
            waited = sum(stay.seconds for stay in report.stays)
            (ratio,) = sides.time_pairs([(side, own)], pairs, lambda: None) if pairs else (None,)
            print(
                f"  {budget} {way}: peak {peak.bytes / 1e6:.1f} MB, time {ratio}, "
                f"{len(report.stays)} values of {report.host / 1e6:.1f} MB on the host, copied in "
                f"{1e3 * report.link_seconds:.2f} ms, {1e3 * waited:.2f} ms of it waited for"
            )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help=", ".join(SUBJECTS))
    parser.add_argument("--budgets", nargs="+", default=["75%", "50%", "min"])
    parser.add_argument("--scale", choices=("default", "small"), default="default")
    parser.add_argument("--pairs", type=int, default=20, help="of each time ratio; 0 leaves it out")
    given = parser.parse_args()
    if not torch.cuda.is_available():
        print("needs a GPU: on the CPU values are in the host's memory already")
        return 2
    rates = calibrate("cuda")
    print(f"link: {rates.to_host / 1e9:.1f} GB/s to the host, {rates.from_host / 1e9:.1f} back")
    for name in given.names or SUBJECTS:
        measure(name, SUBJECTS[name](given.scale, device="cuda"), given.budgets, given.pairs)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
