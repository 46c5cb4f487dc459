"""Full fine-tuning: all weights of the U-Net, and of the text encoder where asked, are trained.

The weights stay float32; products run in ``--dtype`` under torch.autocast, so bfloat16 costs the weights no precision
(a step of 1e-6 would vanish in a bfloat16 weight of 1). The result is a checkpoint folder in the diffusers layout, not
an adapter: sample with ``--base RUN/model``.

Cost for SD v1.5's U-Net (860 M parameters): 3.4 GB each for weights, gradients and Adam's two means, 13.8 GB before
activations; ``--ema-decay`` adds another 3.4 GB. Uses torch's fused AdamW, because minildm's own holds two spare copies
of the weights during a step.
"""

import json
from dataclasses import dataclass

import torch

from minildm.adapters.inject import NETWORKS, parameter_counts
from minildm.adapters.method import Method
from minildm.checkpoint import save_folder, save_single_file
from minildm.files import replaced_folder
from minildm.optimizer import FusedAdamW
from minildm.settings import Settings, setting


@dataclass(frozen=True)
class FullSettings(Settings):
    targets: tuple[str, ...] = setting(("unet",), "which networks to train", choices=NETWORKS)
    text_encoder_rate: float = setting(1.0, "the text encoder's learning rate, as a multiple of --lr", at_least=0)
    single_file: bool = setting(False, "also write the model as one file, RUN/model/single_file.safetensors")


class Full(Method):
    settings_class = FullSettings
    defaults = {"lr": 1e-5}
    result = "model"
    float32_weights = True

    def __init__(self, model, settings, steps, seed):
        super().__init__(model, settings, steps, seed)
        assert all(p.dtype == torch.float32 for p in model.parameters()), "load the model in float32"
        model.requires_grad_(False)
        for network in settings.targets:
            getattr(model, network).requires_grad_(True)

    def rate(self, name):
        return self.settings.text_encoder_rate if name.startswith("text_encoder.") else 1.0

    def optimizer(self, config, trained):
        return FusedAdamW(list(trained.values()), [self.rate(name) for name in trained], config.weight_decay)

    def describe(self):
        return ["full fine-tuning"] + [
            f"{network}: {trained:,} of {total:,} parameters trained ({percent:.1f} %)"
            for network, (trained, total, percent) in parameter_counts(self.model).items()
        ]

    def save(self, path, about):
        """Write the whole model as a diffusers-layout folder, float32; ``about`` as minildm.json in it."""
        networks = {name: getattr(self.model, name) for name in ("unet", "vae", "text_encoder")}
        with replaced_folder(path) as folder:
            save_folder(networks, self.model.config, folder, torch.float32)
            if self.settings.single_file:
                save_single_file(networks, self.model.config, folder / "single_file.safetensors", torch.float32)
            (folder / "minildm.json").write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
