"""LoRA: a frozen linear layer plus a trainable product of two thin matrices (Hu et al. 2021, arXiv:2106.09685, Eq. 3).

    y = x W^T + b + scale (x A^T) B^T        dW = scale B A        lora_A (rank, in), lora_B (out, rank)

lora_A starts Kaiming-uniform (a = sqrt 5: uniform within 1 / sqrt(in)), lora_B zero, so a new adapter changes nothing.
scale = alpha / rank, alpha = rank unless given. The base keeps its own precision; lora_A and lora_B are float32 and are
cast to the precision of what passes through the layer.

Cost: rank (in + out) parameters per layer, and as many multiplications per token. Differs from the paper: lora_A is
uniform, as in the authors' code (the paper: Gaussian), and all linear layers can be adapted, not only attention's.
"""

import math
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from minildm import kernels
from minildm.adapters.files import save_adapter
from minildm.adapters.fused import LoRAFunction
from minildm.adapters.inject import LAYERS, NETWORKS, adapter_layers, check_fit, parameter_counts, wrap
from minildm.adapters.method import Method
from minildm.adapters.rank_map import rank_map
from minildm.errors import InputError
from minildm.settings import Settings, setting


class LoRALinear(nn.Module):
    """A frozen linear layer, ``base``, with its adapter: (..., in) -> (..., out)."""

    kind = "lora"

    def __init__(self, base, rank, scale, generator):
        super().__init__()
        self.base, self.rank, self.scale = base, rank, scale
        self.lora_A = nn.Parameter(kaiming_rows(rank, base.in_features, generator).to(base.weight.device))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, rank, device=base.weight.device))

    def blocks(self):
        """The products that dW is the sum of, [(A (rows, in), B (out, rows))]: one here, several where ranks grow."""
        return [(self.lora_A, self.lora_B)]

    def forward(self, x):
        if kernels.enabled and not torch.compiler.is_compiling():  # the same result, up to rounding, in less memory
            factors = [factor for block in self.blocks() for factor in block]
            return LoRAFunction.apply(x, self.base, self.scale, *factors)
        y = self.base(x)
        for A, B in self.blocks():
            y = y + self.scale * F.linear(F.linear(x, A.to(x.dtype)), B.to(x.dtype))
        return y

    def factors(self):
        """(lora_A (rank, in), lora_B (out, rank)) without gradient: dW = scale lora_B lora_A. What a file holds."""
        A = torch.cat([A.detach() for A, _ in self.blocks()])
        B = torch.cat([B.detach() for _, B in self.blocks()], dim=1)
        return A[: self.rank], B[:, : self.rank]

    def n_parameters(self):
        """Numbers that the adapter of this layer consists of; unused rows of a block do not count."""
        return sum(factor.numel() for factor in self.factors())

    def merged(self):
        """The plain layer with dW added to its weight, in float32 before the cast to the base's precision."""
        A, B = self.factors()
        self.base.weight.data = (self.base.weight.float() + self.scale * B @ A).to(self.base.weight.dtype)
        return self.base


def kaiming_rows(rows, d_in, generator):
    """(rows, d_in) float32, uniform within 1 / sqrt(d_in), sampled on the CPU: variance 1 / (3 d_in)."""
    return (2 * torch.rand(rows, d_in, generator=generator) - 1) / math.sqrt(d_in)


@dataclass(frozen=True)
class LoRASettings(Settings):
    rank: int = setting(4, "rank of every layer", at_least=1)
    alpha: float | None = setting(None, "scale = alpha / rank (default: alpha = rank, so the scale is 1)", above=0)
    layers: str = setting("all-linear", "which linear layers to adapt", choices=tuple(LAYERS))
    targets: tuple[str, ...] = setting(NETWORKS, "which networks to adapt", choices=NETWORKS)
    rank_stabilized: bool = setting(False, "scale = alpha / sqrt(rank) (rsLoRA, arXiv:2312.03732); needs --alpha")
    text_encoder_rate: float = setting(1.0, "the text encoder's learning rate, as a multiple of --lr", at_least=0)

    def __post_init__(self):
        super().__post_init__()
        if self.rank_stabilized and self.alpha is None:
            raise InputError("--rank-stabilized needs --alpha; alpha = sqrt(rank) gives scale 1")


class LoRA(Method):
    """Low-rank adaptation: wrap the chosen layers, train their factors."""

    settings_class = LoRASettings
    layer_class = LoRALinear

    def __init__(self, model, settings, steps, seed):
        super().__init__(model, settings, steps, seed)
        self.check_fit(model, settings)
        self.layers = wrap(
            model,
            self.layer_class,
            settings.rank,
            settings.alpha,
            settings.targets,
            settings.layers,
            seed,
            settings.rank_stabilized,
        )

    @classmethod
    def check_fit(cls, model, settings):
        check_fit(model, settings.rank, settings.targets, settings.layers)

    def trained(self):
        return {
            f"{path}.{name}": parameter
            for path, layer in self.layers.items()
            for name, parameter in layer.named_parameters()
            if parameter.requires_grad
        }

    def rate(self, name):
        return self.settings.text_encoder_rate if name.startswith("text_encoder.") else 1.0

    def describe(self):
        layers = adapter_layers(self.model)
        ranks = {path: layer.rank for path, layer in layers.items()}
        scale = next(iter(layers.values())).scale
        spread = (
            f"rank {min(ranks.values())}"
            if len(set(ranks.values())) == 1
            else (f"ranks {min(ranks.values())} to {max(ranks.values())} (mean {sum(ranks.values()) / len(ranks):.2f})")
        )
        lines = [f"{self.layer_class.kind} on {len(layers)} layers, {spread}, scale {scale:g}"]
        if len(set(ranks.values())) > 1:
            lines += ["mean rank by block and kind of layer:", rank_map(ranks)]
        for network, (trained, total, percent) in parameter_counts(self.model).items():
            lines.append(f"{network}: {trained:,} of {total:,} parameters trained ({percent:.3f} %)")
        return lines

    def save(self, path, about):
        save_adapter(self.model, path, settings=about)

    def export(self, path, format):
        save_adapter(self.model, path, format)
