"""The sizes of the models that can be pretrained, and their initial weights."""

import torch

from minildm.checkpoint import NETWORKS
from minildm.config import ModelConfig, ScheduleConfig, TextEncoderConfig, UNetConfig, VAEConfig
from minildm.latent_diffusion import LatentDiffusion
from minildm.seeds import seeded

# tiny has fewer norm groups than the large models' 32. With 32, a group of its narrow levels would hold one channel or
# two, and a norm over one channel removes what the time embedding added to it.
SHAPES = {
    "tiny": ModelConfig(
        UNetConfig(
            widths=(80, 160),
            attention=(True, True),
            n_heads=(2, 8),
            layers_per_block=1,
            context_dim=80,
            norm_groups=10,
            latent_size=16,
        ),
        VAEConfig(widths=(32, 32, 64, 64), layers_per_block=1, norm_groups=8),
        TextEncoderConfig(width=80, n_layers=3, n_heads=4, mlp_width=320),
        ScheduleConfig(prediction="v"),
    ),
    "sd15": ModelConfig(),
    "sd21": ModelConfig(
        UNetConfig(n_heads=(5, 10, 20, 20), context_dim=1024, linear_projection=True),
        VAEConfig(),
        TextEncoderConfig(1024, 23, 16, 4096, "gelu"),
        ScheduleConfig(prediction="v"),
        pad_token_id=0,
    ),
}

# Word vectors stay random, so words that pretraining never sees are as distinct to the text encoder as all others, and
# an adapter can give them a meaning. Position vectors start at the same scale and are trained.
WORD = 0.2  # standard deviation


def new_model(config, seed, device):
    """LatentDiffusion with random weights; those of each network depend on ``seed`` and its name alone."""
    networks = {}
    with torch.random.fork_rng(devices=[]):
        for name, build in NETWORKS.items():
            torch.manual_seed(seeded(seed, "weights", name).initial_seed())
            networks[name] = build(getattr(config, name))
        embeddings = networks["text_encoder"].text_model.embeddings
        for embedding in (embeddings.token_embedding, embeddings.position_embedding):
            torch.nn.init.normal_(embedding.weight, std=WORD)
    model = LatentDiffusion(config, **networks).to(device, memory_format=torch.channels_last)
    return model.requires_grad_(False)
