"""The models that mixed precision is judged on: an Evoformer, ESM-2, Swin, a spectral operator.

``SUBJECTS[name](scale)`` builds a :class:`subjects.Subject`; without dropout, so that gradients
can be held against float64's.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from subjects import MaskedLanguageModel, Scale, Subject, evoformer as with_dropout
from torch import Tensor, nn


def evoformer(scale: Scale = "default") -> Subject:
    """Two blocks, tokens (S, R) = (32, 64); small: widths 32, (16, 24)."""
    import subjects

    if scale == "default":
        subject = with_dropout("default")
    else:
        example = subjects.evoformer_example()
        task = example.build(c_m=32, c_z=32, heads=4, width=8, c_outer=8)
        inputs = example.example_inputs(residues=24, msa=16)
        subject = Subject("evoformer", task, inputs, list(task.evoformer.blocks))
    for module in subject.module.modules():
        if type(module).__name__ == "SharedDropout":
            module.p = 0.0
    return subject


def esm2(scale: Scale = "default") -> Subject:
    """transformers' ESM-2 with its masked language model: rotary positions, 20 residues."""
    from transformers import EsmConfig, EsmForMaskedLM

    torch.manual_seed(0)
    layers, width, batch, length = (6, 256, 4, 256) if scale == "default" else (2, 64, 2, 64)
    config = EsmConfig(
        vocab_size=33,
        mask_token_id=32,
        pad_token_id=1,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=width // 32,
        intermediate_size=4 * width,
        max_position_embeddings=length + 2,
        position_embedding_type="rotary",
        token_dropout=False,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    model = EsmForMaskedLM(config).train()
    labels = torch.randint(4, 24, (batch, length))
    masked = torch.rand(batch, length) < 0.15
    inputs = (labels.masked_fill(masked, 32), labels.masked_fill(~masked, -100))
    return Subject("esm2", MaskedLanguageModel(model), inputs, list(model.esm.encoder.layer))


class Classifier(nn.Module):
    """A ``transformers`` image model with its cross entropy."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        """``images`` (B, 3, H, W) and ``labels`` (B,) -> ()."""
        return F.cross_entropy(self.model(pixel_values=images).logits.float(), labels)


def swin(scale: Scale = "default") -> Subject:
    """transformers' Swin: windows of 7, three stages, images of 112 pixels; small: two, 56."""
    from transformers import SwinConfig, SwinForImageClassification

    torch.manual_seed(0)
    size, batch, depths = (112, 8, (2, 2, 2)) if scale == "default" else (56, 2, (2, 2))
    config = SwinConfig(
        image_size=size,
        embed_dim=48,
        depths=list(depths),
        num_heads=[3 * 2**stage for stage in range(len(depths))],
        drop_path_rate=0.0,
        num_labels=10,
    )
    model = SwinForImageClassification(config).train()
    inputs = (torch.randn(batch, 3, size, size), torch.randint(10, (batch,)))
    return Subject("swin", Classifier(model), inputs, list(model.swin.encoder.layers))


class SpectralConvolution(nn.Module):
    """The lowest modes of a field times a matrix each (Li et al. 2021, section 4)."""

    def __init__(self, width: int, modes: int) -> None:
        super().__init__()
        self.modes = modes
        self.weight = nn.Parameter(torch.randn(width, width, modes, modes, 2) / width)

    def forward(self, x: Tensor) -> Tensor:
        """``x`` (B, width, H, W) -> the same."""
        spectrum = torch.fft.rfft2(x, norm="ortho")
        low = spectrum[..., : self.modes, : self.modes]
        mixed = torch.einsum("bihw,iohw->bohw", low, torch.view_as_complex(self.weight))
        padding = (0, spectrum.shape[-1] - self.modes, 0, spectrum.shape[-2] - self.modes)
        return torch.fft.irfft2(F.pad(mixed, padding), s=x.shape[-2:], norm="ortho")


class FourierLayer(nn.Module):
    """A spectral convolution beside a linear map, then a two-layer perceptron of channels."""

    def __init__(self, width: int, modes: int) -> None:
        super().__init__()
        self.spectral = SpectralConvolution(width, modes)
        self.norm = nn.GroupNorm(1, width)
        self.skip = nn.Conv2d(width, width, 1)
        self.up, self.down = nn.Conv2d(width, 2 * width, 1), nn.Conv2d(2 * width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        """``x`` (B, width, H, W) -> the same."""
        y = F.gelu(self.spectral(self.norm(x)) + self.skip(x))
        return x + self.down(F.gelu(self.up(y)))


class SpectralOperator(nn.Module):
    """A Fourier neural operator with a mean square loss."""

    def __init__(self, layers: int, width: int, modes: int) -> None:
        super().__init__()
        self.lift, self.project = nn.Conv2d(3, width, 1), nn.Conv2d(width, 1, 1)
        self.layers = nn.ModuleList(FourierLayer(width, modes) for _ in range(layers))

    def forward(self, field: Tensor, target: Tensor) -> Tensor:
        """``field`` (B, 3, H, W), ``target`` (B, 1, H, W) -> ()."""
        x = self.lift(field)
        for layer in self.layers:
            x = layer(x)
        return F.mse_loss(self.project(x), target)


def spectral(scale: Scale = "default") -> Subject:
    """Four Fourier layers, width 48, fields of 64 x 64; small: two, width 16, 32 x 32."""
    torch.manual_seed(0)
    layers, width, modes, size, batch = (
        (4, 48, 12, 64, 8) if scale == "default" else (2, 16, 6, 32, 4)
    )
    module = SpectralOperator(layers, width, modes)
    inputs = (torch.randn(batch, 3, size, size), torch.randn(batch, 1, size, size))
    return Subject("spectral", module, inputs, list(module.layers))


SUBJECTS = {"evoformer": evoformer, "esm2": esm2, "swin": swin, "spectral": spectral}
