"""An AlphaFold 2 Evoformer, trained side by side with eager, Inductor and memopt.

The stack is written from the algorithms of Jumper et al. 2021 (supplement, algorithms
3, 4 and 6-15; each class names its own). It is plain torch: softmax attention with its
N^3 logits, no checkpointing, no chunking. What fits it into memory is one line::

    model = torch.compile(model, backend="memopt", options={"budget": "60%"})

Shapes are the paper's, one protein at a time: ``m`` (S, R, c_m) is the MSA of S sequences
of R residues, ``z`` (R, R, c_z) the pairs of residues.

The task is a toy with structure to learn. Each protein is a hairpin whose turn lies
anywhere: its two strands lie side by side, and residues that face each other mutate
together. Masked residues follow from the column and from the facing residue, distances
from the sequence separation and from which columns co-vary.

Run ``python examples/evoformer.py`` (a few minutes on two cores), ``--quick`` for a glance,
``--help`` for the sizes.
"""

from __future__ import annotations

import argparse
import copy
import functools
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:
    from rich.table import Table

RESIDUES = 20  #: kinds of residue; token 20 is the mask
MASK = RESIDUES
BINS = 64  #: of the distogram, from 2 to 22 angstrom
IGNORE = -100  #: label of a residue that is not to be predicted


def linear(c_in: int, c_out: int, init: str = "lecun", bias: bool = True) -> nn.Linear:
    """A linear layer started as the supplement says (1.11.4).

    ``"lecun"`` and ``"he"`` (before a ReLU) are normal in the fan-in, ``"glorot"`` (queries,
    keys, values) is uniform, ``"zero"`` is for the last layer of every update, ``"gate"``
    has zero weights and a bias of one.
    """
    layer = nn.Linear(c_in, c_out, bias)
    if init == "lecun":
        nn.init.normal_(layer.weight, std=c_in**-0.5)
    elif init == "he":
        nn.init.normal_(layer.weight, std=(2 / c_in) ** 0.5)
    elif init == "glorot":
        nn.init.xavier_uniform_(layer.weight)
    else:
        nn.init.zeros_(layer.weight)
    if bias:
        nn.init.constant_(layer.bias, 1.0 if init == "gate" else 0.0)
    return layer


def perturb_zeros_(module: nn.Module, std: float) -> None:
    """Give every parameter of ``module`` that is all zeros small normal noise.

    Layers that start at zero hide the gradients of all that comes before them.
    """
    with torch.no_grad():
        for parameter in module.parameters():
            if not parameter.any():
                parameter.normal_(std=std)


class SharedDropout(nn.Module):
    """Dropout whose mask is shared along one dimension (supplement 1.11.6).

    ``dim=0`` is the paper's DropoutRowwise, ``dim=1`` its DropoutColumnwise.
    """

    def __init__(self, p: float, dim: int) -> None:
        super().__init__()
        self.p, self.dim = p, dim

    def forward(self, x: Tensor) -> Tensor:
        shape = list(x.shape)
        shape[self.dim] = 1
        return x * F.dropout(x.new_ones(shape), self.p, self.training)


class GatedAttention(nn.Module):
    """The gated multi-head self-attention that algorithms 7, 8, 13 and 14 share.

    It attends along the second dimension of ``x`` (A, L, c), with a bias (heads, L, L)
    where there is one, and returns (A, L, c).
    """

    def __init__(self, c: int, heads: int, width: int) -> None:
        super().__init__()
        self.heads, self.scale = heads, 1 / math.sqrt(width)
        self.query = linear(c, heads * width, "glorot", bias=False)
        self.key = linear(c, heads * width, "glorot", bias=False)
        self.value = linear(c, heads * width, "glorot", bias=False)
        self.gate = linear(c, heads * width, "gate")
        self.out = linear(heads * width, c, "zero")

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        q = self.query(x).unflatten(-1, (self.heads, -1)) * self.scale
        k = self.key(x).unflatten(-1, (self.heads, -1))
        v = self.value(x).unflatten(-1, (self.heads, -1))
        logits = torch.einsum("aqhc,akhc->ahqk", q, k)
        if bias is not None:
            logits = logits + bias
        update = torch.einsum("ahqk,akhc->aqhc", logits.softmax(-1), v)
        return self.out(self.gate(x).sigmoid() * update.flatten(-2))


class MSARowAttentionWithPairBias(nn.Module):
    """Algorithm 7: every sequence attends along its residues, biased by the pairs."""

    def __init__(self, c_m: int, c_z: int, heads: int, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(c_m)
        self.norm_z = nn.LayerNorm(c_z)
        self.bias = linear(c_z, heads, bias=False)
        self.attention = GatedAttention(c_m, heads, width)

    def forward(self, m: Tensor, z: Tensor) -> Tensor:
        """``m`` (S, R, c_m), ``z`` (R, R, c_z) -> (S, R, c_m)."""
        bias = self.bias(self.norm_z(z)).permute(2, 0, 1)
        return self.attention(self.norm(m), bias)


class MSAColumnAttention(nn.Module):
    """Algorithm 8: every column of the MSA attends along its sequences."""

    def __init__(self, c_m: int, heads: int, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(c_m)
        self.attention = GatedAttention(c_m, heads, width)

    def forward(self, m: Tensor) -> Tensor:
        """``m`` (S, R, c_m) -> (S, R, c_m)."""
        return self.attention(self.norm(m).transpose(0, 1)).transpose(0, 1)


class Transition(nn.Module):
    """Algorithms 9 (MSA) and 15 (pairs): two layers, four times as wide between them."""

    def __init__(self, c: int, factor: int = 4) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(c)
        self.up = linear(c, factor * c, "he")
        self.down = linear(factor * c, c, "zero")

    def forward(self, x: Tensor) -> Tensor:
        """``x`` (..., c) -> (..., c)."""
        return self.down(self.up(self.norm(x)).relu())


class OuterProductMean(nn.Module):
    """Algorithm 10: the mean over sequences of outer products updates the pairs."""

    def __init__(self, c_m: int, c_z: int, c: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(c_m)
        self.left = linear(c_m, c)
        self.right = linear(c_m, c)
        self.out = linear(c * c, c_z, "zero")

    def forward(self, m: Tensor) -> Tensor:
        """``m`` (S, R, c_m) -> (R, R, c_z); between them lies (R, R, c * c)."""
        m = self.norm(m)
        outer = torch.einsum("sic,sjd->ijcd", self.left(m), self.right(m) / m.shape[0])
        return self.out(outer.flatten(-2))


class TriangleMultiplication(nn.Module):
    """Algorithms 11 (outgoing edges) and 12 (incoming): edge ij from edges ik, jk (ki, kj)."""

    def __init__(self, c_z: int, outgoing: bool) -> None:
        super().__init__()
        self.equation = "ikc,jkc->ijc" if outgoing else "kic,kjc->ijc"
        self.norm = nn.LayerNorm(c_z)
        self.left, self.left_gate = linear(c_z, c_z), linear(c_z, c_z, "gate")
        self.right, self.right_gate = linear(c_z, c_z), linear(c_z, c_z, "gate")
        self.gate = linear(c_z, c_z, "gate")
        self.norm_out = nn.LayerNorm(c_z)
        self.out = linear(c_z, c_z, "zero")

    def forward(self, z: Tensor) -> Tensor:
        """``z`` (R, R, c_z) -> (R, R, c_z)."""
        z = self.norm(z)
        a = self.left_gate(z).sigmoid() * self.left(z)
        b = self.right_gate(z).sigmoid() * self.right(z)
        update = torch.einsum(self.equation, a, b)
        return self.gate(z).sigmoid() * self.out(self.norm_out(update))


class TriangleAttention(nn.Module):
    """Algorithms 13 (around the starting node) and 14 (the ending node: 13, transposed)."""

    def __init__(self, c_z: int, heads: int, width: int, starting: bool) -> None:
        super().__init__()
        self.starting = starting
        self.norm = nn.LayerNorm(c_z)
        self.bias = linear(c_z, heads, bias=False)
        self.attention = GatedAttention(c_z, heads, width)

    def forward(self, z: Tensor) -> Tensor:
        """``z`` (R, R, c_z) -> (R, R, c_z); the logits are (R, heads, R, R)."""
        z = self.norm(z)
        if not self.starting:
            z = z.transpose(0, 1)
        update = self.attention(z, self.bias(z).permute(2, 0, 1))
        return update if self.starting else update.transpose(0, 1)


class EvoformerBlock(nn.Module):
    """One block of algorithm 6: the MSA stack, the communication, the pair stack."""

    def __init__(
        self,
        c_m: int,
        c_z: int,
        heads: int,
        width: int = 16,
        c_outer: int = 16,
        msa_dropout: float = 0.15,
        pair_dropout: float = 0.25,
    ) -> None:
        super().__init__()
        self.msa_row = MSARowAttentionWithPairBias(c_m, c_z, heads, width)
        self.msa_column = MSAColumnAttention(c_m, heads, width)
        self.msa_transition = Transition(c_m)
        self.outer_product = OuterProductMean(c_m, c_z, c_outer)
        self.triangle_out = TriangleMultiplication(c_z, outgoing=True)
        self.triangle_in = TriangleMultiplication(c_z, outgoing=False)
        self.triangle_start = TriangleAttention(c_z, heads, width, starting=True)
        self.triangle_end = TriangleAttention(c_z, heads, width, starting=False)
        self.pair_transition = Transition(c_z)
        self.drop_msa = SharedDropout(msa_dropout, dim=0)
        self.drop_rows = SharedDropout(pair_dropout, dim=0)
        self.drop_columns = SharedDropout(pair_dropout, dim=1)

    def forward(self, m: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        """``m`` (S, R, c_m), ``z`` (R, R, c_z) -> the same shapes."""
        m = m + self.drop_msa(self.msa_row(m, z))
        m = m + self.msa_column(m)
        m = m + self.msa_transition(m)
        z = z + self.outer_product(m)
        z = z + self.drop_rows(self.triangle_out(z))
        z = z + self.drop_rows(self.triangle_in(z))
        z = z + self.drop_rows(self.triangle_start(z))
        z = z + self.drop_columns(self.triangle_end(z))
        z = z + self.pair_transition(z)
        return m, z


class Evoformer(nn.Module):
    """Algorithm 6, the Evoformer stack.

    ``noise`` is the standard deviation given to the parameters AlphaFold starts at zero;
    0 leaves them there. The paper has 48 blocks, c_m=256, c_z=128, 8 heads for the MSA and 4
    for the pairs (here one number for both), width=32, c_outer=32. Its last line, the single
    representation, serves the structure module and is left out with it.
    """

    def __init__(
        self,
        blocks: int,
        c_m: int,
        c_z: int,
        heads: int,
        width: int = 16,
        c_outer: int = 16,
        noise: float = 0.02,
    ) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            EvoformerBlock(c_m, c_z, heads, width, c_outer) for _ in range(blocks)
        )
        if noise:
            perturb_zeros_(self, noise)

    def forward(self, m: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        """``m`` (S, R, c_m), ``z`` (R, R, c_z) -> the same shapes."""
        for block in self.blocks:
            m, z = block(m, z)
        return m, z


class InputEmbedder(nn.Module):
    """Algorithms 3 and 4: tokens to ``m`` and ``z``. The first sequence is the target."""

    def __init__(self, c_m: int, c_z: int, reach: int = 32) -> None:
        super().__init__()
        self.reach = reach
        self.msa = nn.Embedding(RESIDUES + 1, c_m)
        self.target = nn.Embedding(RESIDUES + 1, c_m)
        self.left = nn.Embedding(RESIDUES + 1, c_z)
        self.right = nn.Embedding(RESIDUES + 1, c_z)
        self.offset = nn.Embedding(2 * reach + 1, c_z)

    def forward(self, msa: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens ``msa`` (S, R) -> (S, R, c_m), (R, R, c_z)."""
        target = msa[0]
        residue = torch.arange(msa.shape[1], device=msa.device)
        offset = (residue[:, None] - residue).clamp(-self.reach, self.reach) + self.reach
        m = self.msa(msa) + self.target(target)
        z = self.left(target)[:, None] + self.right(target) + self.offset(offset)
        return m, z


class Task(nn.Module):
    """The Evoformer with its embeddings, heads and loss: one function to compile.

    The loss is masked MSA prediction and the distogram's cross entropy, weighted 2 and 0.3
    as in the paper (supplement 1.9).
    """

    def __init__(self, evoformer: Evoformer, c_m: int, c_z: int) -> None:
        super().__init__()
        self.embed = InputEmbedder(c_m, c_z)
        self.evoformer = evoformer
        self.residue = linear(c_m, RESIDUES)
        self.distance = linear(c_z, BINS)

    def forward(self, msa: Tensor, labels: Tensor, bins: Tensor) -> Tensor:
        """Masked tokens ``msa`` (S, R), the ``labels`` (S, R) of what was masked, distance
        ``bins`` (R, R), all int64 -> a scalar."""
        m, z = self.evoformer(*self.embed(msa))
        residue = self.residue(m).float()
        distance = self.distance(z).float()
        distance = distance + distance.transpose(0, 1)
        masked_msa = F.cross_entropy(residue.flatten(0, 1), labels.flatten(), ignore_index=IGNORE)
        distogram = F.cross_entropy(distance.flatten(0, 1), bins.flatten())
        return 2.0 * masked_msa + 0.3 * distogram


def build(
    blocks: int = 2,
    c_m: int = 64,
    c_z: int = 64,
    heads: int = 4,
    width: int = 16,
    c_outer: int = 16,
    noise: float = 0.02,
    seed: int = 0,
) -> Task:
    """A :class:`Task` in training mode, the same for the same seed."""
    torch.manual_seed(seed)
    return Task(Evoformer(blocks, c_m, c_z, heads, width, c_outer, noise), c_m, c_z)


def example_inputs(
    residues: int = 64, msa: int = 32, seed: int = 0, device: torch.device | str = "cpu"
) -> tuple[Tensor, Tensor, Tensor]:
    """One protein for :class:`Task`: masked tokens (S, R), labels (S, R), bins (R, R).

    A hairpin whose turn lies in its middle half. Its sequences are mutants of one ancestor;
    a residue that faces another is always that one's complement.
    """
    draw = torch.Generator().manual_seed(seed)
    place = torch.arange(residues)
    turn = int(torch.randint(residues // 4, residues - residues // 4, (), generator=draw))
    facing = 2 * turn - place

    ancestor = torch.randint(RESIDUES, (residues,), generator=draw)
    mutant = torch.randint(RESIDUES, (msa, residues), generator=draw)
    mutated = torch.rand(msa, residues, generator=draw) < 0.3
    sequences = torch.where(mutated, mutant, ancestor)
    first = place[(place < turn) & (facing < residues)]
    sequences[:, facing[first]] = RESIDUES - 1 - sequences[:, first]

    masked = torch.rand(msa, residues, generator=draw) < 0.15
    tokens = sequences.masked_fill(masked, MASK)
    labels = sequences.masked_fill(~masked, IGNORE)

    along, across = (place - turn).abs() * 3.4, (place > turn) * 5.5
    trace = torch.stack([along, across], dim=1)
    bins = torch.bucketize(torch.cdist(trace, trace), torch.linspace(2, 22, BINS - 1))
    return tokens.to(device), labels.to(device), bins.to(device)


@dataclass
class Side:
    """One way of running the same training, and what it cost."""

    name: str
    model: Callable[..., Tensor]
    optimizer: torch.optim.Optimizer
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)  #: forward and backward, each step
    peak: int = 0  #: bytes above what lived before the step

    @property
    def step_seconds(self) -> float:
        """The median step, the compiling first one left out."""
        return statistics.median(self.seconds[1:])

    def differentiate(self, inputs: Sequence[Tensor]) -> Tensor:
        """Forward and backward: what is compiled, timed and measured."""
        loss = self.model(*inputs)
        loss.backward()
        return loss.detach()

    def train(self, inputs: Sequence[Tensor], seed: int) -> None:
        """One training step, dropout drawn from ``seed``."""
        torch.manual_seed(seed)
        synchronize(inputs[0].device)
        start = time.perf_counter()
        loss = self.differentiate(inputs)
        synchronize(inputs[0].device)
        self.seconds.append(time.perf_counter() - start)
        self.losses.append(loss.item())
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


def synchronize(device: torch.device) -> None:
    """Wait for what was launched on ``device``."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def compare(args: argparse.Namespace) -> None:
    """Train the three sides, print the table and the report, write the picture."""
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TimeElapsedColumn

    import memcompile

    # Compiled dropout draws what eager draws, so that the losses can be compared.
    random = {"fallback_random": True}
    task = build(args.blocks, args.c_m, args.c_z, args.heads, args.width, args.c_outer)
    task.to(args.device)
    compilers: dict[str, Callable[[nn.Module], Callable[..., Tensor]]] = {
        "eager": lambda model: model,
        "Inductor": functools.partial(
            torch.compile, backend="inductor", fullgraph=True, options=random
        ),
        "memopt": functools.partial(
            torch.compile,
            backend="memopt",
            fullgraph=True,
            options={"budget": args.budget, "inductor": random},
        ),
    }
    sides = []
    for name, compiled in compilers.items():
        model = copy.deepcopy(task)
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
        sides.append(Side(name, compiled(model), optimizer))

    console = Console()
    columns = (SpinnerColumn(), *Progress.get_default_columns(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("", total=(args.steps + 1) * len(sides))
        for step in range(args.steps):
            inputs = example_inputs(args.residues, args.msa, step, args.device)
            for turn in range(len(sides)):  # whoever goes first changes from step to step
                side = sides[(step + turn) % len(sides)]
                doing = "training" if step or side.name == "eager" else "compiling"
                progress.update(bar, description=f"{doing} {side.name}")
                side.train(inputs, seed=step)
                progress.advance(bar)
        for side in sides:
            progress.update(bar, description=f"measuring {side.name}")
            peak = memcompile.measure_peak(side.differentiate, inputs, warmup=0, device=args.device)
            side.peak = peak.bytes
            progress.advance(bar)

    report = memcompile.reports()[-1]
    console.print(
        f"Evoformer: {args.blocks} blocks, {args.residues} residues, {args.msa} sequences; "
        f"budget {args.budget}; {args.steps} steps"
    )
    console.print(table(sides))
    print(report)
    report.html(args.out)
    console.print(f"picture: {args.out}")


def table(sides: Sequence[Side]) -> Table:
    """What the sides cost, next to each other. Eager comes first, Inductor second."""
    from rich.table import Table

    eager, inductor = sides[0], sides[1]

    def compiling(side: Side) -> str:
        return "–" if side is eager else f"{side.seconds[0] - side.step_seconds:.0f} s"

    rows: list[tuple[str, Callable[[Side], str]]] = [
        ("step peak", lambda side: f"{side.peak / 1e6:.1f} MB"),
        ("  of eager's", lambda side: f"{side.peak / eager.peak:.0%}"),
        ("  of Inductor's", lambda side: f"{side.peak / inductor.peak:.0%}"),
        ("step time, median", lambda side: f"{side.step_seconds * 1e3:.0f} ms"),
        ("  of Inductor's", lambda side: f"{side.step_seconds / inductor.step_seconds:.0%}"),
        ("compile time", compiling),
        ("first loss", lambda side: f"{side.losses[0]:.4f}"),
        ("final loss", lambda side: f"{side.losses[-1]:.4f}"),
    ]
    result = Table()
    result.add_column("")
    for side in sides:
        result.add_column(side.name, justify="right")
    for label, cell in rows:
        result.add_row(label, *(cell(side) for side in sides))
    return result


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--steps", type=int, default=16, help="training steps of each side")
    parser.add_argument("--blocks", type=int, default=2, help="Evoformer blocks")
    parser.add_argument("--residues", type=int, default=64, help="residues R of the protein")
    parser.add_argument("--msa", type=int, default=32, help="sequences S of the MSA")
    parser.add_argument("--c-m", type=int, default=64, help="channels of the MSA")
    parser.add_argument("--c-z", type=int, default=64, help="channels of the pairs")
    parser.add_argument("--heads", type=int, default=4, help="heads of every attention")
    parser.add_argument("--width", type=int, default=16, help="channels of a head")
    parser.add_argument("--c-outer", type=int, default=16, help="of the outer product's factors")
    parser.add_argument("--budget", default="60%", help="memopt's, in bytes or of Inductor's peak")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--out", default="evoformer.html", help="where the picture goes")
    parser.add_argument("--quick", action="store_true", help="one tiny block, three steps")
    args = parser.parse_args(argv)
    if args.quick:
        args.steps, args.blocks, args.residues, args.msa = 3, 1, 24, 8
    if args.steps < 2:
        parser.error("--steps must be at least 2: the first one compiles")
    return args


if __name__ == "__main__":
    compare(parse())
