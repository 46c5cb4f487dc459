"""The same model by other hands: diffusers' and transformers' networks with our weights, and files in every layout.

Random weights are scaled so that activations stay of order one through the whole network, and some norms are made to
see small activations, or a wrong eps would hide.
"""

import json

import torch
from safetensors.torch import save_file

from minildm import checkpoint
from minildm import config as settings
from minildm.latent_diffusion import LatentDiffusion


def relative_error(ours, theirs):
    """Largest deviation over the reference's largest value."""
    assert ours.shape == theirs.shape, (ours.shape, theirs.shape)
    return ((ours.double() - theirs.double()).abs().max() / theirs.double().abs().max()).item()


def randomize(module, seed=0):
    """Seeded weights: linear and convolution weights keep the variance of what passes, norms are 1 + noise."""
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


def random_model(config, seed=0):
    """A LatentDiffusion of this config with random float32 weights, in eval mode."""
    networks = {name: randomize(build(getattr(config, name)), seed + i).eval().requires_grad_(False)
                for i, (name, build) in enumerate(checkpoint.NETWORKS.items())}
    return LatentDiffusion(config, **networks)


def diffusers_unet(model):
    from diffusers import UNet2DConditionModel
    peer = UNet2DConditionModel.from_config(settings.unet_to_json(model.config.unet))
    peer.load_state_dict(model.unet.state_dict(), strict=True)
    return peer.eval()


def diffusers_vae(model):
    from diffusers import AutoencoderKL
    peer = AutoencoderKL.from_config(settings.vae_to_json(model.config.vae))
    peer.load_state_dict(model.vae.state_dict(), strict=True)
    return peer.eval()


def transformers_text_encoder(model):
    from transformers import CLIPTextConfig, CLIPTextModel
    document = settings.text_encoder_to_json(model.config.text_encoder)
    peer = CLIPTextModel(CLIPTextConfig(**{k: v for k, v in document.items() if k != "architectures"}))
    state = model.text_encoder.state_dict()
    wanted = peer.state_dict()
    if not any(name.startswith("text_model.") for name in wanted):  # transformers 5 has no such prefix
        state = {name.removeprefix("text_model."): tensor for name, tensor in state.items()}
    peer.load_state_dict({**{k: v for k, v in wanted.items() if k.endswith("position_ids")}, **state}, strict=True)
    return peer.eval()


def diffusers_scheduler(model, sampler, karras=False):
    import diffusers
    base = diffusers.PNDMScheduler.from_config(settings.schedule_to_json(model.config.schedule)).config
    kinds = {"ddim": diffusers.DDIMScheduler, "ddpm": diffusers.DDPMScheduler, "plms": diffusers.PNDMScheduler,
             "dpm++": diffusers.DPMSolverMultistepScheduler}
    extra = {"ddim": {"clip_sample": False}, "ddpm": {"clip_sample": False},
             "dpm++": {"use_karras_sigmas": karras, "timestep_spacing": "linspace"}}.get(sampler, {})
    return kinds[sampler].from_config(base, **extra)


def single_file_state(model, extras=True):
    """The model's tensors under single-file names, with what published files carry besides."""
    state = {}
    ours = {name: network.state_dict() for name, network in
            (("unet", model.unet), ("vae", model.vae), ("text_encoder", model.text_encoder))}
    for network, table in checkpoint.single_file_names(model.config).items():
        thirds = {}
        for name, (theirs, third) in table.items():
            tensor = ours[network][name]
            if network == "vae" and "attentions.0.to_" in name and tensor.dim() == 2:
                tensor = tensor[:, :, None, None]
            if third is None:
                state[theirs] = tensor
            else:
                thirds.setdefault(theirs, {})[third] = tensor
        state |= {theirs: torch.cat([parts[i] for i in range(3)]) for theirs, parts in thirds.items()}
    if extras:
        text = model.config.text_encoder
        state |= {"betas": model.schedule.betas, "alphas_cumprod": model.schedule.alphas_cumprod,
                  "model_ema.decay": torch.tensor(0.9999), "model_ema.num_updates": torch.tensor(1),
                  "model_ema.diffusion_modelinput_blocks00weight": torch.zeros(3)}
        if text.activation == "gelu":
            last = f"cond_stage_model.model.transformer.resblocks.{text.n_layers}"
            state |= {f"{last}.ln_1.weight": torch.ones(text.width), "cond_stage_model.model.logit_scale":
                      torch.tensor(4.6), "cond_stage_model.model.text_projection": torch.zeros(text.width, 8)}
        else:
            state["cond_stage_model.transformer.text_model.embeddings.position_ids"] = torch.arange(77)[None]
    return state


def write_single_file(model, path, dtype=torch.float32, extras=True):
    state = {name: (tensor.to(dtype) if tensor.is_floating_point() else tensor).contiguous().clone()
             for name, tensor in single_file_state(model, extras).items()}
    if path.suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save({"state_dict": state}, path)
    return path


def write_folder(model, path, dtype=torch.float32):
    networks = {"unet": model.unet, "vae": model.vae, "text_encoder": model.text_encoder}
    checkpoint.save_folder(networks, model.config, path, dtype)
    return path


def edit_json(path, **changes):
    document = json.loads(path.read_text())
    path.write_text(json.dumps(document | changes))
