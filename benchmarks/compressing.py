"""Saved bytes and time with the compress pass: ``python benchmarks/compressing.py [NAME ...]``.

Each subject is compiled by Inductor and with ``passes="compress"`` at ``budget="min"``; the two
are timed in alternated pairs. Pin it to one core where the machine has others' work
(``taskset -c 0``). Gist (Jain et al. 2018) reports 1.8x less at 1.04x the time.

``--frontier 8`` finds the cheapest plans at so many budgets with ``passes="default"`` and with
``"default,compress"``, and times the two in alternated pairs: the second is to be no slower at
any. With ``--drafted`` nothing is run.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import sys
from unittest import mock

import sides
import torch
import torch.nn.functional as F
from memcompile_passes.compress import EXACT
from records import Ratio
from subjects import Subject, evoformer
from torch import Tensor, nn

import memcompile
from memcompile.ladder import Ladder
from memcompile.planner import Planner


@dataclasses.dataclass(frozen=True)
class Limit:
    """What is held against a subject."""

    saved: float  #: Inductor's saved bytes over ours, at least
    time: float | None  #: our time over Inductor's, at most


class GptBlock(nn.Module):
    """GPT-2's: causal attention and a GELU layer, each behind a norm and before a dropout."""

    causal: Tensor

    def __init__(self, width: int, heads: int, length: int, p: float = 0.1) -> None:
        super().__init__()
        self.heads, self.p = heads, p
        self.norm_attention, self.norm_mlp = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.register_buffer("causal", torch.ones(length, length, dtype=torch.bool).tril())

    def forward(self, x: Tensor) -> Tensor:
        """``x`` (B, L, width) -> the same."""
        heads = self.qkv(self.norm_attention(x)).unflatten(-1, (3, self.heads, -1))
        q, k, v = heads.permute(2, 0, 3, 1, 4)
        scores = (q @ k.mT * q.shape[-1] ** -0.5).masked_fill(~self.causal, float("-inf"))
        mixed = F.dropout(scores.softmax(-1), self.p) @ v
        x = x + F.dropout(self.out(mixed.transpose(1, 2).flatten(-2)), self.p)
        hidden = F.gelu(self.up(self.norm_mlp(x)), approximate="tanh")
        return x + F.dropout(self.down(hidden), self.p)


class Regression(nn.Module):
    """Layers and a mean square loss."""

    def __init__(self, layers: nn.Sequential) -> None:
        super().__init__()
        self.layers = layers

    def forward(self, x: Tensor) -> Tensor:
        """``x`` as the first layer takes it -> ()."""
        return self.layers(x).square().mean()


def gpt() -> Subject:
    """Four GPT-2-like blocks, width 256, tokens (B, L) = (4, 256), dropout 0.1."""
    torch.manual_seed(0)
    module = Regression(nn.Sequential(*(GptBlock(256, 8, 256) for _ in range(4))))
    return Subject("gpt", module, (torch.randn(4, 256, 256),), list(module.layers))


def relu() -> Subject:
    """Twelve layers of batch norm, ReLU and dropout, width 512, 2048 rows."""
    torch.manual_seed(0)
    layers = [
        nn.Sequential(nn.Linear(512, 512), nn.BatchNorm1d(512), nn.ReLU(), nn.Dropout(0.1))
        for _ in range(12)
    ]
    module = Regression(nn.Sequential(*layers))
    return Subject("relu", module, (torch.randn(2048, 512),), list(module.layers))


SUBJECTS = {
    "gpt": (gpt, Limit(1.8, 1.04)),
    "relu": (relu, Limit(1.8, 1.04)),
    "evoformer": (evoformer, Limit(1.5, None)),
}


def planned(subject: Subject, budget: str | None) -> tuple[sides.Side, memcompile.Report]:
    """The subject under ``compress``; with no budget the plan is Inductor's own."""
    options = {"budget": budget, "passes": "compress", "strict": True}
    side = sides.compiled(subject, str(budget), backend="memopt", options=options)
    return side, memcompile.reports()[-1]


def saved(report: memcompile.Report) -> int:
    """Bytes held from the forward to the backward, inputs left out."""
    return report.held_after - report.before


def measure(name: str, pairs: int) -> bool:
    """Print one subject's figures; returns whether its limits are met."""
    build, limit = SUBJECTS[name]
    subject = build()
    with sides.planned_anew():
        own, whole = planned(subject, None)
        ours, least = planned(subject, "min")
        (ratio,) = sides.time_pairs([(ours, own)], pairs, lambda: None) if pairs else (None,)
    factor = saved(whole) / saved(least)
    met = factor >= limit.saved
    print(f"{name}: saved {saved(whole) / 1e6:.1f} -> {saved(least) / 1e6:.1f} MB", end="")
    print(f", {factor:.2f}x less; at least {limit.saved}x: {'met' if met else 'MISSED'}")
    if ratio is not None:
        fast = limit.time is None or ratio.median <= limit.time
        print(f"  time over Inductor's: {ratio}", end="")
        print(
            "" if limit.time is None else f"; at most {limit.time}: {'met' if fast else 'MISSED'}"
        )
        met &= fast
    hows = [move.how for move in least.moves]
    print("  moves:", ", ".join(f"{hows.count(how)} {how}" for how in dict.fromkeys(hows)))
    return met


#: What is not running ops again.
CODECS = frozenset(codec.name for codec in EXACT)
#: What the frontier sets side by side.
PIPELINES = ("default", "default,compress")


class Stop(memcompile.MemcompileError):
    """The plans are drafted: nothing need be compiled."""


def ladder(subject: Subject, passes: str) -> tuple[Ladder, Planner]:
    """All plans found for a subject's step, and what found them."""
    found: list[tuple[Ladder, Planner]] = []
    build = Planner.build

    def stop(self: Planner) -> Ladder:
        found.append((build(self), self))
        raise Stop

    options = {"budget": "min", "passes": passes, "strict": True}
    torch.compiler.reset()
    with mock.patch.object(Planner, "build", stop), contextlib.suppress(Stop):
        torch.compile(subject.module, backend="memopt", options=options)(*subject.inputs)
    return found[0]


def frontier(name: str, count: int, pairs: int) -> bool:
    """Print times at even budgets; whether compress costs none anywhere.

    They are predicted. With ``pairs`` the steps are run, too, and what was measured decides.
    """
    (alone, planner), (both, _) = (ladder(SUBJECTS[name][0](), passes) for passes in PIPELINES)
    before, top = planner.draft.before, planner.ground_draft
    floors = alone.floor.peak - before, both.floor.peak - before
    print(f"{name}: least step peak {floors[0] / 1e6:.1f} MB, with compress {floors[1] / 1e6:.1f}")
    least, met = max(alone.floor.peak, both.floor.peak), True
    for place in range(count):
        budget = least + (top.peak - least) * place // (count - 1)
        one, two = alone.fit(budget), both.fit(budget)
        assert one is not None and two is not None
        share = (budget - before) / (top.peak - before)
        one_time, two_time = one.seconds / top.seconds, two.seconds / top.seconds
        print(f"  {share:6.1%} of Inductor's step peak: {one_time:.3f}x, with compress", end=" ")
        print(f"{two_time:.3f}x", end="")
        fast = two_time <= one_time
        if pairs:
            ratio, same = side_by_side(SUBJECTS[name][0](), budget, pairs)
            print(f"; measured, with compress over without: {ratio}", end="")
            print(", the same plan" if same else "", end="")
            fast = same or ratio is None or ratio.median <= 1
        met &= fast
        print("" if fast else " SLOWER", flush=True)
    return met


def side_by_side(subject: Subject, budget: int, pairs: int) -> tuple[Ratio | None, bool]:
    """The time with compress over that without, at one budget; ``None`` where one is refused.

    And whether both are one plan: what differs then is noise.
    """
    found, plans = [], []
    with sides.planned_anew():
        for passes in PIPELINES:
            options = {"budget": budget, "passes": passes, "strict": True}
            with contextlib.suppress(memcompile.BudgetError):
                found.append(sides.compiled(subject, passes, "memopt", options))
                plans.append({(m.value, CODECS & {m.how}) for m in memcompile.reports()[-1].moves})
        if len(found) < len(PIPELINES):
            return None, False
        alone, both = found
        (ratio,) = sides.time_pairs([(both, alone)], pairs, lambda: None)
    return ratio, plans[0] == plans[1]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help=", ".join(SUBJECTS))
    parser.add_argument("--pairs", type=int, default=20, help="of each time ratio; 0 leaves it out")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--frontier", type=int, default=0, metavar="N", help="at N budgets")
    parser.add_argument("--drafted", action="store_true", help="the frontier, without running it")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    if given.frontier:
        names, pairs = given.names or SUBJECTS, 0 if given.drafted else given.pairs
        return 0 if all([frontier(name, given.frontier, pairs) for name in names]) else 1
    return 0 if all([measure(name, given.pairs) for name in given.names or SUBJECTS]) else 1


if __name__ == "__main__":
    sys.exit(main())
