"""Training with lossy codecs: ``python benchmarks/training_lossy.py [NAME ...]``.

A tiny language model and a small Evoformer are trained for 300 steps from five seeds without any
pass. The seed in the middle is then trained with each codec. What is held against it: the exact
loss at least halves, and the codec's run ends within the spread of the five. A codec that casts to
fp8 and scales nothing is trained the same way, and must fail.

Norms keep numbers near one, where fp8 needs no scale. So what layers give inside of a block is in
another unit, in thousandths, and what reads it takes that into account.

Ops run one by one (``lower="eager"``): numbers are what is asked, not kernels.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import sys
from collections.abc import Callable, Iterator
from typing import ClassVar

import torch
import torch.nn.functional as F
from memcompile_passes.compress import Compress
from subjects import evoformer_example
from torch import Tensor, fx, nn

from memcompile import Codec, Coding, Step
from memcompile.contract import Exactness

SEEDS = 5
VOCABULARY = 10
#: The loss at the end is the mean of so many steps.
LAST = 20
#: What numbers inside of blocks are multiplied with.
UNIT = 2.0**-12


class Unscaled(Codec):
    """What must not be: floats cast to fp8 as they are."""

    name: ClassVar[str] = "unscaled"
    exactness: ClassVar[Exactness] = "no"

    def coding(self, value: fx.Node, step: Step) -> Coding | None:
        """Every float32."""
        if value.meta["val"].dtype != torch.float32 or not value.meta["val"].dim():
            return None
        return Coding(
            lambda x: x.to(torch.float8_e4m3fn), lambda stored: stored.float(), lambda x: x.numel()
        )


#: The codecs, and whether each is to end within the spread.
CODECS = {
    "int8": (Compress(lossy="int8"), True),
    "fp8": (Compress(lossy="fp8"), True),
    "int4": (Compress(lossy="int4"), None),
    "unscaled fp8": (Compress(codecs=("default", Unscaled())), False),
}


class Block(nn.Module):
    """Causal attention, then a gated layer, inside of which numbers are in thousandths.

    As they are in physical units; what is computed is what it would be with numbers about one.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_attention, self.norm_mlp = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qk, self.v = nn.Linear(width, 2 * width), nn.Linear(width, width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.gate, self.up = nn.Linear(width, 3 * width), nn.Linear(width, 3 * width, bias=False)
        self.down = nn.Linear(3 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """``x`` (B, L, width) -> the same."""
        y = self.norm_attention(x)
        q, k = self.qk(y).unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
        v = self.v(y * UNIT).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        future = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
        scores = (q @ k.mT * q.shape[-1] ** -0.5).masked_fill(future, float("-inf"))
        x = x + self.out((scores.softmax(-1) @ v).transpose(1, 2).flatten(-2)) / UNIT
        y = self.norm_mlp(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y * UNIT)) / UNIT


class LanguageModel(nn.Module):
    """Two blocks, width 64, and the next-token loss."""

    def __init__(self, width: int = 64, length: int = 32) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, width)
        self.place = nn.Embedding(length, width)
        self.blocks = nn.Sequential(*(Block(width, 4) for _ in range(2)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, VOCABULARY)

    def forward(self, tokens: Tensor) -> Tensor:
        """``tokens`` (B, L + 1) -> ()."""
        x = self.embed(tokens[:, :-1]) + self.place.weight
        logits = self.head(self.norm(self.blocks(x)))
        return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


def texts(seed: int, batch: int = 32, length: int = 32) -> Iterator[Tensor]:
    """Endless batches of a language in which two tokens can follow each two, (B, L + 1)."""
    table = torch.Generator().manual_seed(99)
    follow = torch.randint(VOCABULARY, (VOCABULARY, VOCABULARY, 2), generator=table)
    draw = torch.Generator().manual_seed(seed)
    while True:
        tokens = list(torch.randint(VOCABULARY, (2, batch), generator=draw))
        while len(tokens) <= length:
            which = torch.randint(2, (batch,), generator=draw)
            tokens.append(follow[tokens[-2], tokens[-1], which])
        yield torch.stack(tokens, 1)


def language(seed: int) -> tuple[nn.Module, Iterator[tuple[Tensor, ...]]]:
    """The language model and its batches."""
    torch.manual_seed(seed)
    return LanguageModel(), ((tokens,) for tokens in texts(seed))


#: The layers inside an Evoformer block that are in thousandths; those that read what is, and those
#: that read products of two.
SMALLER = ("attention.value", "up", "left", "right")
READERS = ("attention.out", "down")
PRODUCTS = ("outer_product.out", "norm_out")


def thousandths(block: nn.Module) -> None:
    """Multiply what layers of an Evoformer block give with one number, and divide by it behind."""
    for name, layer in block.named_modules():
        if name.endswith(SMALLER):
            layer.register_forward_hook(lambda _, given, made: made * UNIT)
        elif name.endswith(READERS):
            layer.register_forward_pre_hook(lambda _, given: (given[0] / UNIT,))
        elif name.endswith(PRODUCTS):
            layer.register_forward_pre_hook(lambda _, given: (given[0] / UNIT**2,))


def evoformer(seed: int) -> tuple[nn.Module, Iterator[tuple[Tensor, ...]]]:
    """One small Evoformer block on hairpins of 12 residues, dropout included."""
    example = evoformer_example()
    task = example.build(blocks=1, c_m=32, c_z=32, heads=2, width=8, c_outer=8, seed=seed)
    for block in task.evoformer.blocks:
        thousandths(block)

    def proteins() -> Iterator[tuple[Tensor, ...]]:
        step = 0
        while True:
            step += 1
            yield example.example_inputs(residues=12, msa=5, seed=1000 * seed + step % 8)

    return task, proteins()


SUBJECTS: dict[str, Callable[[int], tuple[nn.Module, Iterator[tuple[Tensor, ...]]]]] = {
    "language": language,
    "evoformer": evoformer,
}


@dataclasses.dataclass(frozen=True)
class Run:
    """One training."""

    first: float  #: the loss before the first step
    last: float  #: the mean of the last steps' losses
    lossy: int = 0  #: values that the codec keeps


def train(name: str, seed: int, steps: int, codec: Compress | None = None) -> Run:
    """Train a subject with Adam; with a codec at the least peak."""
    import memcompile

    model, batches = SUBJECTS[name](seed)
    call, lossy = model, 0
    if codec is not None:
        torch._dynamo.reset()
        options = {"budget": "min", "passes": [codec], "lower": "eager"}
        call = torch.compile(model, backend="memopt", options=options)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    losses = []
    torch.manual_seed(seed)
    for _ in range(steps):
        optimizer.zero_grad()
        loss = call(*next(batches))
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    if codec is not None:
        names = {each.name for each in codec._chosen if each.exactness == "no"}
        lossy = sum(move.how in names for move in memcompile.reports()[-1].moves)
    return Run(losses[0], statistics.fmean(losses[-LAST:]), lossy)


def study(name: str, steps: int, codecs: list[str]) -> bool:
    """Train one subject every way and print a row for each; whether all is as it should be."""
    exact = sorted((train(name, seed, steps).last, seed) for seed in range(SEEDS))
    low, high, middle = exact[0][0], exact[-1][0], exact[SEEDS // 2][1]
    whole = train(name, middle, steps)
    halves = whole.last <= whole.first / 2
    print(f"{name}: exact {whole.first:.3f} -> {whole.last:.4f} (seed {middle}),", end=" ")
    print(f"five seeds {low:.4f} to {high:.4f}; halves: {'yes' if halves else 'NO'}", flush=True)
    good = halves
    for each in codecs:
        configured, wanted = CODECS[each]
        run = train(name, middle, steps, configured)
        inside = low <= run.last <= high
        good &= wanted is None or inside == wanted
        print(f"  {each}: {run.lossy} values, ends at {run.last:.4f},", end=" ")
        print("within" if inside else "OUTSIDE", end="")
        says = "not asked" if wanted is None else "as it must be" if inside == wanted else "WRONG"
        print(f", {says}", flush=True)
    return good


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help=", ".join(SUBJECTS))
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--codecs", nargs="*", default=list(CODECS))
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    names = given.names or list(SUBJECTS)
    return 0 if all([study(name, given.steps, given.codecs) for name in names]) else 1


if __name__ == "__main__":
    sys.exit(main())
