"""Training to the end in fp32, autocast and bf16: ``python benchmarks/training_precision.py``.

A small Evoformer and a small protein language model, some hundred steps of Adam each: fp32 from
five seeds, the other two from the first of them. Printed are first and final losses (the mean of
the last ten steps); ``--picture`` draws the curves. Everything runs op by op (``lower="eager"``):
rounding is what is studied, and generated kernels round no more often.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable

import torch
from precision import Autocast
from precision_subjects import esm2
from subjects import Subject, evoformer_example
from torch import Tensor, nn

#: Steps that the final loss is the mean of.
LAST = 10
SEEDS = range(5)

Batch = tuple[Tensor, ...]
Build = Callable[[int], tuple[nn.Module, list[Batch]]]


def folding(seed: int) -> tuple[nn.Module, list[Batch]]:
    """One Evoformer block of width 32, and four hairpins (S, R) = (8, 16)."""
    example = evoformer_example()
    task = example.build(1, c_m=32, c_z=32, heads=4, width=8, c_outer=8, seed=seed)
    return task, [example.example_inputs(residues=16, msa=8, seed=place) for place in range(4)]


def language(seed: int) -> tuple[nn.Module, list[Batch]]:
    """transformers' ESM-2, two layers of width 64, and masked sequences that repeat a motif."""
    subject: Subject = esm2("small")
    draw = torch.Generator().manual_seed(1)
    batches = []
    for _ in range(4):
        motifs = torch.randint(4, 24, (8, 6), generator=draw)
        labels = motifs.repeat(1, 6)
        masked = torch.rand(labels.shape, generator=draw) < 0.15
        batches.append((labels.masked_fill(masked, 32), labels.masked_fill(~masked, -100)))
    torch.manual_seed(seed)
    for module in subject.module.modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=0.05)
    return subject.module, batches


TASKS: dict[str, Build] = {"Evoformer": folding, "protein language model": language}


def train(build: Build, kind: str, seed: int, steps: int) -> list[float]:
    """The loss of each step."""
    torch._dynamo.reset()
    module, batches = build(seed)
    call: Callable[..., Tensor] = Autocast(module) if kind == "autocast" else module
    if kind == "bf16":
        options = {"precision": "bf16", "lower": "eager", "strict": True}
        call = torch.compile(module, backend="memopt", options=options, fullgraph=True)
    optimizer = torch.optim.Adam(module.parameters(), lr=2e-3)
    losses = []
    for step in range(steps):
        torch.manual_seed(1000 * seed + step)
        optimizer.zero_grad()
        loss = call(*batches[step % len(batches)])
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def final(losses: list[float]) -> float:
    return sum(losses[-LAST:]) / len(losses[-LAST:])


def study(name: str, steps: int) -> tuple[dict[str, list[float]], bool]:
    """The curves of one task, and whether they are as they should be."""
    build = TASKS[name]
    curves = {f"fp32, seed {seed}": train(build, "fp32", seed, steps) for seed in SEEDS}
    spread = [final(losses) for losses in curves.values()]
    halved = all(final(losses) <= losses[0] / 2 for losses in curves.values())
    print(f"{name}: fp32 {curves['fp32, seed 0'][0]:.3f} ->", end=" ")
    print(f"{min(spread):.4f} to {max(spread):.4f} over five seeds; halved: {halved}")
    good = halved
    for kind in ("autocast", "bf16"):
        curves[kind] = train(build, kind, 0, steps)
        inside = min(spread) <= final(curves[kind]) <= max(spread)
        print(f"  {kind}: {final(curves[kind]):.4f}", "inside" if inside else "OUTSIDE", flush=True)
        good &= inside or kind != "bf16"
    print(f"  fp32 from the same seed: {spread[0]:.4f}", flush=True)
    return curves, good


def draw(found: dict[str, dict[str, list[float]]], path: str) -> None:
    """All curves of all tasks, one panel each."""
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, len(found), figsize=(5 * len(found), 3.5), squeeze=False)
    for panel, (name, curves) in zip(panels[0], found.items(), strict=True):
        for kind, losses in curves.items():
            seeds = kind.startswith("fp32")
            label = None if seeds and not kind.endswith(" 0") else kind.split(",")[0]
            colour = {"autocast": "tab:orange", "bf16": "tab:red"}.get(kind, "0.65")
            panel.plot(losses, color=colour, label=label, lw=0.8, zorder=1 if seeds else 2)
        panel.set(title=name, xlabel="step", ylabel="loss", yscale="log")
        panel.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--picture", metavar="OUT", help="write the curves to a PNG (matplotlib)")
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    found, good = {}, True
    for name in TASKS:
        found[name], fine = study(name, given.steps)
        good &= fine
    if given.picture:
        draw(found, given.picture)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
