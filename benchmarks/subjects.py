"""The models that are measured and tested, behind one interface.

``SUBJECTS[name](scale, dtype=..., device=...)`` builds a :class:`Subject`: model and loss as
one module, its inputs, and its repeated blocks. Every subject is in training mode, starts
from random weights that are the same each time, and compiles into one graph.
``scale="default"`` is for measuring, ``"small"`` for tests.

Default scale, float32, CPU, torch 2.13: nodes of the joint graph after Inductor's joint
passes, and step peaks in MB.

=========  =====  =====  ========  =============  ======================
subject    nodes  eager  Inductor  checkpointed,  checkpointed, Inductor
                                   eager
=========  =====  =====  ========  =============  ======================
evoformer   3100    180       166             97                     110
llama       2908    436       327             83                      87
bert        1705    296       204            113                      97
esmfold     2404    259       251            144                     147
=========  =====  =====  ========  =============  ======================
"""

from __future__ import annotations

import copy
import importlib.util
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

Scale = Literal["default", "small"]


@dataclass(frozen=True)
class Subject:
    """One step to measure: ``module(*inputs)`` returns a scalar loss.

    Where it is not ``training``, no gradient is taken and it returns a tuple of tensors.
    """

    name: str
    module: nn.Module
    inputs: tuple[Tensor, ...]
    blocks: list[nn.Module]  #: submodules of ``module``, in the order they run
    training: bool = True


class Build(Protocol):
    """Builds a subject; floating-point parameters and inputs have ``dtype``."""

    def __call__(
        self,
        scale: Scale = "default",
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> Subject: ...


class Checkpointed(nn.Module):
    """``block``, its interior recomputed in the backward."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return checkpoint(self.block, *args, use_reentrant=False, **kwargs)


def checkpointed(subject: Subject) -> Subject:
    """A copy of ``subject`` with each block checkpointed. Parameters keep their order."""
    names = {id(module): name for name, module in subject.module.named_modules()}
    module = copy.deepcopy(subject.module)
    blocks: list[nn.Module] = []
    for block in subject.blocks:
        name = names[id(block)]
        blocks.append(Checkpointed(module.get_submodule(name)))
        module.set_submodule(name, blocks[-1])
    return Subject(f"{subject.name}, checkpointed", module, subject.inputs, blocks)


def evoformer_example() -> ModuleType:
    """``examples/evoformer.py``, wherever the caller runs."""
    name = "evoformer"
    if name not in sys.modules:
        path = Path(__file__).resolve().parent.parent / "examples" / f"{name}.py"
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None and spec.loader is not None
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


def evoformer(
    scale: Scale = "default",
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    residues: int | None = None,
) -> Subject:
    """AlphaFold's: two blocks, tokens (S, R) = (32, 64), with shared-mask dropout.

    ``residues`` is another R.
    """
    example = evoformer_example()
    if scale == "default":
        task = example.build()
        inputs = example.example_inputs(residues=residues or 64, device=device)
    else:
        task = example.build(c_m=16, c_z=16, heads=2, width=8, c_outer=4)
        inputs = example.example_inputs(residues=residues or 12, msa=5, device=device)
    task.to(device, dtype)
    return Subject("evoformer", task, inputs, list(task.evoformer.blocks))


class LlamaBlock(nn.Module):
    """Causal attention with rotary positions, then SwiGLU, each behind an RMSNorm."""

    def __init__(self, dim: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_attention = nn.RMSNorm(dim, eps=1e-5)
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.out = nn.Linear(dim, dim, bias=False)
        self.norm_mlp = nn.RMSNorm(dim, eps=1e-5)
        self.gate = nn.Linear(dim, hidden, bias=False)
        self.up = nn.Linear(dim, hidden, bias=False)
        self.down = nn.Linear(hidden, dim, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """``x`` (B, L, dim), ``cos`` and ``sin`` (L, dim / heads) -> (B, L, dim)."""
        heads = self.qkv(self.norm_attention(x)).unflatten(-1, (3, self.heads, -1))
        q, k, v = heads.permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(
            rotate(q, cos, sin), rotate(k, cos, sin), v, is_causal=True
        )
        x = x + self.out(attended.transpose(1, 2).flatten(-2))
        y = self.norm_mlp(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the halves of ``x`` (..., L, D) as planes, by ``cos`` and ``sin`` (L, D)."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


class Llama(nn.Module):
    """A Llama-style language model with its next-token loss."""

    cos: Tensor
    sin: Tensor

    def __init__(
        self, layers: int, dim: int, heads: int, hidden: int, vocabulary: int, length: int
    ) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, dim)
        self.blocks = nn.ModuleList(LlamaBlock(dim, heads, hidden) for _ in range(layers))
        self.norm = nn.RMSNorm(dim, eps=1e-5)
        self.head = nn.Linear(dim, vocabulary, bias=False)
        width = dim // heads
        frequency = 10_000.0 ** -(torch.arange(0, width, 2) / width)
        angle = torch.outer(torch.arange(length), frequency).repeat(1, 2)
        self.register_buffer("cos", angle.cos())
        self.register_buffer("sin", angle.sin())

    def forward(self, tokens: Tensor) -> Tensor:
        """``tokens`` (B, L + 1), int64 -> the mean loss of predicting the last L."""
        x = self.embed(tokens[:, :-1])
        for block in self.blocks:
            x = block(x, self.cos, self.sin)
        logits = self.head(self.norm(x)).float()
        return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


def llama(
    scale: Scale = "default",
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Subject:
    """Sixteen Llama-style layers, tokens (B, L) = (4, 256)."""
    torch.manual_seed(0)
    if scale == "default":
        batch, length, vocabulary = 4, 256, 4096
        model = Llama(16, 256, 8, 688, vocabulary, length)
    else:
        batch, length, vocabulary = 2, 64, 64
        model = Llama(3, 32, 2, 88, vocabulary, length)
    tokens = torch.randint(vocabulary, (batch, length + 1)).to(device)
    model.to(device, dtype)
    return Subject("llama", model, (tokens,), list(model.blocks))


class MaskedLanguageModel(nn.Module):
    """A ``transformers`` model with its own loss."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor, labels: Tensor) -> Tensor:
        """``tokens`` and ``labels`` (B, L), int64; -100 labels what is not predicted."""
        return self.model(input_ids=tokens, labels=labels).loss.float()


def bert(
    scale: Scale = "default",
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Subject:
    """transformers' BERT, six layers, tokens (B, L) = (8, 128), with dropout 0.1."""
    from transformers import BertConfig, BertForMaskedLM

    torch.manual_seed(0)
    if scale == "default":
        batch, length, vocabulary = 8, 128, 8192
        config = BertConfig(
            vocab_size=vocabulary,
            hidden_size=256,
            num_hidden_layers=6,
            num_attention_heads=8,
            intermediate_size=1024,
            max_position_embeddings=length,
        )
    else:
        batch, length, vocabulary = 2, 64, 64
        config = BertConfig(
            vocab_size=vocabulary,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=64,
            max_position_embeddings=length,
        )
    model = BertForMaskedLM(config).train()
    labels = torch.randint(1, vocabulary, (batch, length))
    masked = torch.rand(batch, length) < 0.15
    tokens = labels.masked_fill(masked, 0).to(device)
    labels = labels.masked_fill(~masked, -100).to(device)
    model.to(device, dtype)
    module = MaskedLanguageModel(model)
    return Subject("bert", module, (tokens, labels), list(model.bert.encoder.layer))


class FoldingTrunk(nn.Module):
    """ESMFold's repeated blocks, with a mean square loss on both of their outputs."""

    def __init__(self, blocks: list[nn.Module]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(
        self, sequence: Tensor, pair: Tensor, mask: Tensor, to_sequence: Tensor, to_pair: Tensor
    ) -> Tensor:
        """``sequence`` (B, L, c_s), ``pair`` (B, L, L, c_z), a ``mask`` (B, L) of ones where
        there are residues, and what the blocks should turn the first two ``to``."""
        for block in self.blocks:
            sequence, pair = block(sequence, pair, mask=mask)
        loss = F.mse_loss(sequence, to_sequence) + F.mse_loss(pair, to_pair)
        return loss.float()


def esmfold(
    scale: Scale = "default",
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    residues: int | None = None,
) -> Subject:
    """transformers' ESMFold trunk: two blocks, L = 64 residues; no dropout, as released.

    ``residues`` is another L. The layers it starts at zero get small noise, or they would hide
    most gradients.
    """
    from transformers.models.esm import modeling_esmfold
    from transformers.models.esm.configuration_esm import TrunkConfig

    # In bfloat16 its layers try to import deepspeed as they run, which breaks the graph.
    modeling_esmfold.is_deepspeed_initialized = lambda: False

    torch.manual_seed(0)
    if scale == "default":
        length, c_s, c_z, width = 64, 256, 128, 32
    else:
        length, c_s, c_z, width = 10, 32, 16, 8
    length = residues or length
    config = TrunkConfig(
        sequence_state_dim=c_s,
        pairwise_state_dim=c_z,
        sequence_head_width=width,
        pairwise_head_width=width,
    )
    block = modeling_esmfold.EsmFoldTriangularSelfAttentionBlock
    module = FoldingTrunk([block(config) for _ in range(2)])
    evoformer_example().perturb_zeros_(module, 0.02)
    module.to(device, dtype).train()

    states = [
        torch.randn(shape).to(device, dtype)
        for shape in ((1, length, c_s), (1, length, length, c_z)) * 2
    ]
    mask = torch.ones(1, length).to(device, dtype)
    inputs = (states[0], states[1], mask, states[2], states[3])
    return Subject("esmfold", module, inputs, list(module.blocks))


SUBJECTS: dict[str, Build] = {
    "evoformer": evoformer,
    "llama": llama,
    "bert": bert,
    "esmfold": esmfold,
}
