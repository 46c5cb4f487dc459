"""Reference networks of diffusers and transformers around our weights, and checkpoints in every layout.

Random weights are scaled so that activations stay of order one through the whole network. `quieten` makes the norms see
small activations, because otherwise a wrong eps would not show.
"""

import functools
import gzip
import importlib.util
import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from minildm import checkpoint
from minildm.checkpoint import config_json, writing
from minildm.config import ModelConfig, ScheduleConfig, TextEncoderConfig, UNetConfig, VAEConfig
from minildm.latent_diffusion import LatentDiffusion
from minildm.text_encoder import TextEncoder
from minildm.unet import UNet
from minildm.vae import VAE

PARITY = 1e-5  # largest relative error of a network in float32


def small_config():
    """About as large as the embedded model: what the benchmarks call small."""
    unet = UNetConfig(
        widths=(64, 128, 128),
        attention=(True, True, False),
        n_heads=(2, 4, 4),
        layers_per_block=1,
        context_dim=128,
        latent_size=16,
    )
    return ModelConfig(unet, VAEConfig.tiny(), TextEncoderConfig(width=128, n_layers=4, n_heads=4, mlp_width=512))


# config.json as published with stable-diffusion-v1-5 and stable-diffusion-2-1, reduced to what defines the networks.
_CROSS, _PLAIN = "CrossAttnDownBlock2D", "DownBlock2D"
SD15_UNET = {
    "_class_name": "UNet2DConditionModel",
    "act_fn": "silu",
    "attention_head_dim": 8,
    "block_out_channels": [320, 640, 1280, 1280],
    "center_input_sample": False,
    "cross_attention_dim": 768,
    "down_block_types": [_CROSS, _CROSS, _CROSS, _PLAIN],
    "downsample_padding": 1,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "in_channels": 4,
    "layers_per_block": 2,
    "mid_block_scale_factor": 1,
    "norm_eps": 1e-05,
    "norm_num_groups": 32,
    "out_channels": 4,
    "sample_size": 64,
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
}
SD21_UNET = SD15_UNET | {
    "attention_head_dim": [5, 10, 20, 20],
    "cross_attention_dim": 1024,
    "dual_cross_attention": False,
    "only_cross_attention": False,
    "num_class_embeds": None,
    "sample_size": 96,
    "upcast_attention": True,
    "use_linear_projection": True,
}
SD15_VAE = {
    "_class_name": "AutoencoderKL",
    "act_fn": "silu",
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "in_channels": 3,
    "latent_channels": 4,
    "layers_per_block": 2,
    "norm_num_groups": 32,
    "out_channels": 3,
    "sample_size": 512,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
}
SD15_TEXT = {
    "architectures": ["CLIPTextModel"],
    "attention_dropout": 0.0,
    "bos_token_id": 0,
    "dropout": 0.0,
    "eos_token_id": 2,
    "hidden_act": "quick_gelu",
    "hidden_size": 768,
    "initializer_factor": 1.0,
    "initializer_range": 0.02,
    "intermediate_size": 3072,
    "layer_norm_eps": 1e-05,
    "max_position_embeddings": 77,
    "model_type": "clip_text_model",
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "pad_token_id": 1,
    "projection_dim": 768,
    "vocab_size": 49408,
}
SD21_TEXT = SD15_TEXT | {
    "hidden_act": "gelu",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_attention_heads": 16,
    "num_hidden_layers": 23,
    "projection_dim": 512,
}
SD15_SCHEDULER = {
    "_class_name": "PNDMScheduler",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "trained_betas": None,
    "clip_sample": False,
}


SD21 = ModelConfig(
    UNetConfig(n_heads=(5, 10, 20, 20), context_dim=1024, linear_projection=True, latent_size=96),
    VAEConfig(),
    TextEncoderConfig(1024, 23, 16, 4096, "gelu"),
    ScheduleConfig(prediction="v"),
    0,
)


def assert_says(error, *parts):
    """Assert that an error is one line and contains every part."""
    message = str(error.value if hasattr(error, "value") else error)
    assert "\n" not in message, message
    for part in parts:
        assert str(part) in message, f"{part!r} is not in: {message}"


def assert_equal_weights(loaded, model):
    """Assert that two models have the same parameters, to the bit."""
    ours, theirs = loaded.state_dict(), model.state_dict()
    assert ours.keys() == theirs.keys()
    assert [name for name, tensor in ours.items() if not torch.equal(tensor, theirs[name])] == []


def noise(*shape, seed=0):
    """Seeded standard normal numbers."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def single_file_config(v2=False):
    """A small model whose heads are those that a single file implies: 8 everywhere, or 64 channels each for v2."""
    if v2:
        return ModelConfig(
            UNetConfig.tiny(
                widths=(32, 64, 128),
                attention=(True, True, False),
                n_heads=(1, 1, 2),
                layers_per_block=2,
                context_dim=128,
                linear_projection=True,
                latent_size=64,
            ),
            VAEConfig.tiny(layers_per_block=2),
            TextEncoderConfig(width=128, n_layers=3, n_heads=2, mlp_width=256, activation="gelu"),
            pad_token_id=0,
        )
    return ModelConfig(
        UNetConfig.tiny(
            widths=(32, 64, 64),
            attention=(True, True, False),
            n_heads=(8, 8, 8),
            layers_per_block=2,
            context_dim=64,
            latent_size=64,
        ),
        VAEConfig.tiny(layers_per_block=2),
        TextEncoderConfig(width=64, n_layers=3, n_heads=1, mlp_width=128),
    )


@functools.cache
def shared_model(v2=False):
    """One random model for many tests, which must not change it."""
    return random_model(single_file_config(v2), seed=3 if v2 else 1)


def relative_error(ours, theirs):
    """Largest deviation from the reference, divided by the reference's largest value."""
    assert ours.shape == theirs.shape, (ours.shape, theirs.shape)
    return ((ours.double() - theirs.double()).abs().max() / theirs.double().abs().max()).item()


def randomize(module, seed=0):
    """Seeded weights: linear and convolution weights preserve the variance of their input, norms are 1 + noise."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if "norm" in name and name.endswith("weight"):
            parameter.data = (1 + 0.1 * noise).to(parameter)
        elif parameter.dim() < 2:
            parameter.data = (0.02 * noise).to(parameter)
        elif "embedding.weight" in name:
            parameter.data = (0.05 * noise).to(parameter)
        else:
            fan_in = parameter[0].numel()
            parameter.data = (noise / fan_in**0.5).to(parameter)
    return module


def quieten(module, factor=0.03):
    """Scale the layers that feed the norms (first and residual-branch layers, embeddings), so that the norms' input has
    a standard deviation of about ``factor``. At 0.03, eps 1e-5 instead of 1e-6 changes a norm's output by 5e-3."""
    feeding = (
        "conv_in",
        "conv1",
        "conv2",
        "time_emb_proj",
        "proj_in",
        "proj_out",
        "to_out.0",
        "net.2",
        "out_proj",
        "fc2",
        "token_embedding",
        "position_embedding",
    )
    for name, part in module.named_modules():
        if name.endswith(feeding):
            for parameter in part.parameters(recurse=False):
                parameter.data = parameter.data * factor
    return module


def set_eps(module, eps, kind=nn.GroupNorm, where=""):
    """Give the norms of a kind whose name contains ``where`` another eps. There must be at least one."""
    norms = [part for name, part in module.named_modules() if isinstance(part, kind) and where in name]
    assert norms, f"no {kind.__name__} in {where!r}"
    for norm in norms:
        norm.eps = eps


def random_network(config, seed=0, quiet=False):
    """A U-Net, VAE or text encoder of this config with random weights; ``quiet``: its norms see small activations."""
    build = {UNetConfig: UNet, VAEConfig: VAE, TextEncoderConfig: TextEncoder}
    network = randomize(build[type(config)](config), seed).eval().requires_grad_(False)
    return quieten(network) if quiet else network


def random_model(config, seed=0):
    """A LatentDiffusion of this config with random float32 weights, in eval mode."""
    networks = {
        name: randomize(build(getattr(config, name)), seed + i).eval().requires_grad_(False)
        for i, (name, build) in enumerate(checkpoint.NETWORKS.items())
    }
    return LatentDiffusion(config, **networks)


def diffusers_unet(unet, document=None):
    """diffusers' U-Net with the same config (or a published one, ``document``) around the same tensors."""
    from diffusers import UNet2DConditionModel

    return _peer(lambda: UNet2DConditionModel.from_config(document or config_json.unet_to_json(unet.config)), unet)


def diffusers_vae(vae, document=None):
    from diffusers import AutoencoderKL

    return _peer(lambda: AutoencoderKL.from_config(document or config_json.vae_to_json(vae.config)), vae)


def transformers_text_encoder(text_encoder, document=None):
    from transformers import CLIPTextConfig, CLIPTextModel

    document = document or config_json.text_encoder_to_json(text_encoder.config)
    return _peer(
        lambda: CLIPTextModel(CLIPTextConfig(**{k: v for k, v in document.items() if k != "architectures"})),
        text_encoder,
    )


def _peer(build, ours):
    with torch.device("meta"):
        peer = build()
    state, wanted = ours.state_dict(), peer.state_dict()
    if not any(name.startswith("text_model.") for name in wanted):  # transformers 5 has no such prefix
        state = {name.removeprefix("text_model."): tensor for name, tensor in state.items()}
    peer.load_state_dict(state, strict=True, assign=True)
    for name, buffer in list(peer.named_buffers()):
        if name.endswith("position_ids"):  # not in the state dict, so still on the meta device
            owner = peer.get_submodule(name.rpartition(".")[0])
            owner.position_ids = torch.arange(buffer.shape[-1])[None]
    return peer.eval()


def diffusers_scheduler(sampler, prediction="epsilon", karras=False, **changes):
    """diffusers' scheduler for our sampler, derived from SD v1.5's published scheduler file."""
    import diffusers

    names = {"epsilon": "epsilon", "v": "v_prediction"}
    base = diffusers.PNDMScheduler.from_config(SD15_SCHEDULER | {"prediction_type": names[prediction]} | changes).config
    kinds = {
        "ddim": diffusers.DDIMScheduler,
        "ddpm": diffusers.DDPMScheduler,
        "plms": diffusers.PNDMScheduler,
        "dpm++": diffusers.DPMSolverMultistepScheduler,
    }
    extra = {
        "ddim": {"clip_sample": False},
        "ddpm": {"clip_sample": False},
        "dpm++": {"use_karras_sigmas": karras, "timestep_spacing": "linspace"},
    }.get(sampler, {})
    return kinds[sampler].from_config(base, **extra)


def single_file_state(model, extras=True):
    """The model's tensors under single-file names; ``extras``: with the unused tensors of published files."""
    networks = {"unet": model.unet, "vae": model.vae, "text_encoder": model.text_encoder}
    tensors = {name: writing.module_tensors(module, torch.float32) for name, module in networks.items()}
    named = writing.single_file_tensors(tensors, model.config, networks)
    state = {name: tensor.read() for name, tensor in named.items()}
    if extras:
        text = model.config.text_encoder
        state |= {
            "betas": model.schedule.betas,
            "alphas_cumprod": model.schedule.alphas_cumprod,
            "model_ema.decay": torch.tensor(0.9999),
            "model_ema.num_updates": torch.tensor(1),
            "model_ema.diffusion_modelinput_blocks00weight": torch.zeros(3),
        }
        if text.activation == "gelu":
            last = f"cond_stage_model.model.transformer.resblocks.{text.n_layers}"
            state |= {
                f"{last}.ln_1.weight": torch.ones(text.width),
                "cond_stage_model.model.logit_scale": torch.tensor(4.6),
                "cond_stage_model.model.text_projection": torch.zeros(text.width, 8),
            }
        else:
            state["cond_stage_model.transformer.text_model.embeddings.position_ids"] = torch.arange(77)[None]
    return state


def write_single_file(model, path, dtype=torch.float32, extras=True):
    state = {
        name: (tensor.to(dtype) if tensor.is_floating_point() else tensor).contiguous().clone()
        for name, tensor in single_file_state(model, extras).items()
    }
    if path.suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save({"state_dict": state}, path)
    return path


def write_folder(model, path, dtype=torch.float32):
    networks = {"unet": model.unet, "vae": model.vae, "text_encoder": model.text_encoder}
    checkpoint.save_folder(networks, model.config, path, dtype)
    return path


def published(config, path, dtype="F16", metadata=None, rename=lambda name: name, extra=()):
    """A file with the header of a published checkpoint and no data: whoever reads a tensor fails."""
    networks = checkpoint.build_networks(config)
    lazy = {
        name: {
            key: writing.LazyTensor(torch.float16, tuple(value.shape), None)
            for key, value in module.state_dict().items()
        }
        for name, module in networks.items()
    }
    header, at = {"__metadata__": metadata or {}}, 0
    size = 2 if dtype == "F16" else 4
    for name, shape in [
        *((k, v.shape) for k, v in writing.single_file_tensors(lazy, config, networks).items()),
        *extra,
    ]:
        end = at + size * torch.Size(shape).numel()
        header[rename(name)] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(header).encode()
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + at)  # sparse: takes no space
    return path


def edit_json(path, **changes):
    document = json.loads(path.read_text())
    path.write_text(json.dumps(document | changes))


def write_tokenizer(folder):
    """vocab.json and merges.txt for transformers' tokenizer, made like CLIP's own from open_clip's list of merges."""
    package = Path(importlib.util.find_spec("open_clip").submodule_search_locations[0])
    lines = gzip.decompress((package / "bpe_simple_vocab_16e6.txt.gz").read_bytes()).decode().split("\n")
    merges = lines[1 : 49152 - 256 - 2 + 1]
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    symbols = [chr(b) for b in printable] + [chr(256 + i) for i in range(256 - len(printable))]
    names = [
        *symbols,
        *(symbol + "</w>" for symbol in symbols),
        *(merge.replace(" ", "") for merge in merges),
        "<|startoftext|>",
        "<|endoftext|>",
    ]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n", encoding="utf-8")
    (folder / "vocab.json").write_text(json.dumps({name: i for i, name in enumerate(names)}))
    return folder


def diffusers_pipeline(folder):
    """diffusers' StableDiffusionPipeline with DDIM, from a folder that also holds a tokenizer."""
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTokenizer

    kinds = {"unet": UNet2DConditionModel, "vae": AutoencoderKL, "text_encoder": CLIPTextModel}
    parts = {name: kind.from_pretrained(folder, subfolder=name) for name, kind in kinds.items()}
    pipe = StableDiffusionPipeline(
        **parts,
        tokenizer=CLIPTokenizer(
            f"{folder}/tokenizer/vocab.json", f"{folder}/tokenizer/merges.txt", model_max_length=77
        ),
        scheduler=DDIMScheduler.from_pretrained(folder, subfolder="scheduler"),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe
