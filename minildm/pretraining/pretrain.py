"""Latent diffusion from nothing: ``python -m minildm pretrain``, on any data set; weights/tiny is its work.

Rombach et al. 2022, arXiv:2112.10752, in stages of the loop that fine-tuning uses too (loop.py):

1. The autoencoder learns to give pictures back through a code of 4 numbers for 8 x 8 pixels; the code is then whitened.
2. The text encoder learns to tell a picture's code from its caption; from then on it is frozen, as CLIP's is in Stable
   Diffusion (the paper trains its own together with the U-Net).
3. The U-Net learns to denoise those codes, told their captions.
4. The decoder learns on, alone: sharper pictures from the same codes, whatever was learnt on them.

RUN/autoencoder, RUN/text_encoder, RUN/diffusion and RUN/decoder hold the stages' states and sheets (those of all but
the diffusion show pictures of the data set), RUN/model the result in diffusers' layout with a card.
"""

import argparse
import contextlib
import dataclasses
import math
import shlex
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.data import default_collate
from tqdm import tqdm

from minildm.checkpoint import NETWORKS, save_folder
from minildm.config import ModelConfig, ScheduleConfig, TextEncoderConfig, UNetConfig, VAEConfig
from minildm.data.cache import context_cache
from minildm.data.flags import add_data_flags, data_set_from, transform_from
from minildm.data.loader import TrainingPairs, training_batches
from minildm.data.prompts import prompts_for
from minildm.data.reading import read
from minildm.data.splits import classes_of, split_by_patient
from minildm.errors import InputError
from minildm.files import sha256, written_beside
from minildm.images import FROM_DATA, contact_sheet, save_png
from minildm.latent_diffusion import LatentDiffusion, to_pil
from minildm.layers import Attention, FeedForward, to_map
from minildm.loading import usable_device
from minildm.settings import Help, at_least
from minildm.training.config import TrainingConfig
from minildm.training.finetune import Pictures, draw_sheet, encode
from minildm.training.loop import train
from minildm.training.loss import Captions, checkpoint_blocks, draw, sample_losses, seeded, validation_loss
from minildm.training.run import Run, fingerprint, read_settings

# Fewer groups than the 32 of the large models: in levels so narrow each would have one channel or two, and a norm over
# one channel takes back what the time embedding added to it.
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
FREE = ("device", "workers", "cache", "micro_batch", "checkpointing", "sample_interval", "save_interval")  # as resumed
STAGES = {"autoencoder": "vae_", "text_encoder": "text_", "diffusion": "", "decoder": "decoder_"}  # flags' prefixes
HELD_OUT = 256  # pictures at most that validation and the card look at
SLACK = 0.02  # a rise of the held-out loss, in parts, that does not send a stage back to its best weights
MANY_EPOCHS = 100  # after which a user is told that pictures can be learnt by heart

# Words keep the random vectors they are drawn with, so that words never seen in pretraining are as distinct to the text
# encoder as all others, and an adapter can give them a meaning. Positions start as large and are learnt.
WORD = 0.2  # standard deviation

# Weights of the autoencoder's loss beside |d|, each term a mean: over pixels, for the last over the code's numbers.
EDGES, SQUARES, KL = 1.0, 1.0, 1e-4


def parser():
    parser = argparse.ArgumentParser(
        prog="python -m minildm pretrain",
        description="Train a latent diffusion model from nothing.",
        formatter_class=Help,
    )
    add = parser.add_argument_group("what").add_argument
    add("--shape", default="tiny", choices=tuple(SHAPES), help="the networks' sizes: as weights/tiny, or as published")
    add("--data", default="procedural", metavar="NAME:PATH", help="procedural, phantom, folder:..., padchest:..., ...")
    add("--out", type=Path, default=Path("runs/pretrain"), help="folder for the run")
    add("--resume", type=Path, metavar="RUN", help="continue this run, exactly")
    add_data_flags(parser)
    for stage, name, steps, batch_size, lr in (
        ("autoencoder", "--vae-", 6000, 8, 1e-3),
        ("text encoder", "--text-", 3000, 32, 1e-3),
        ("U-Net", "--", 10000, 32, 1e-3),
        ("decoder alone", "--decoder-", 2000, 8, 5e-4),
    ):
        add = parser.add_argument_group(stage).add_argument
        add(name + "steps", type=int, default=steps, help="of the optimizer")
        add(name + "batch-size", type=int, default=batch_size, help="pictures a step")
        add(name + "lr", type=float, default=lr, help="learning rate: linear warm-up, then a cosine to 0")
        if name == "--vae-":
            add("--vae-crop", type=int, help="learn from squares of this side, cut at random; a multiple of 8")
    add = parser.add_argument_group("all stages").add_argument
    add("--micro-batch", type=int, help="samples at a time, a divisor of the batch sizes: less memory, same result")
    add("--warmup", type=int, default=200, help="steps")
    add("--ema-decay", type=float, default=0.999, help="of the average of weights that is kept; 0 = off")
    add(
        "--caption-dropout",
        type=float,
        default=0.1,
        help="share of samples with an empty prompt, for guidance (text encoder, U-Net)",
    )
    add("--min-snr-gamma", type=float, default=0.0, help="weight the U-Net's loss by min-SNR, 5 is usual; 0 = off")
    add("--clip", type=float, default=1.0, help="largest norm of the gradient, 0 = off")
    add("--seed", type=int, default=0, help="of everything random")
    add("--checkpointing", action="store_true", help="compute activations twice instead of keeping them: less memory")
    add("--sample-interval", type=int, default=1000, help="steps between sheets of pictures; 0 = none")
    add("--save-interval", type=int, default=200, help="steps between saved states")
    add = parser.add_argument_group("machine").add_argument
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda, ...")
    add(
        "--dtype",
        default="bfloat16" if has_bfloat16() else "float32",
        choices=("float32", "bfloat16"),
        help="of the products; weights are float32",
    )
    add("--workers", type=at_least(0), default=0, help="processes that read ahead")
    add("--cache", type=Path, default=Path.home() / ".cache" / "minildm", help="folder for latents and contexts")
    parser.set_defaults(size=128, split="98/2")
    return parser


def parse(arguments):
    given, _ = parser().parse_known_args(arguments)
    flags = parser()
    if given.resume:
        flags.set_defaults(**read_settings(given.resume / "autoencoder")["flags"], out=given.resume)
    args = flags.parse_args(arguments)
    if args.resume and args.out != args.resume:
        raise InputError(f"--resume {args.resume} goes on in its own folder; leave --out {args.out} out")
    return args


def main(arguments):
    args = parse(arguments)
    transform = transform_from(args)
    for prefix in STAGES.values():
        stage_config(args, prefix)  # a wrong flag of the last stage must not wait for the first to end
    if args.vae_crop is not None and (args.vae_crop % 8 or not 8 <= args.vae_crop <= args.size):
        raise InputError(f"--vae-crop {args.vae_crop} must be a multiple of 8, from 8 to --size {args.size}")
    usable_device(args.device)
    flags = {
        name: str(value) if isinstance(value, Path) else value
        for name, value in vars(args).items()
        if name not in ("resume", "out")
    }
    runs = {stage: open_stage(args, stage, flags) for stage in STAGES}
    data = data_set_from(args, args.data)
    prompts_for(data, args.prompt_template)  # if there are no captions, say so before all is read
    data, contents = whole_files(data, transform, args.skip_bad, args.resume)
    prompts = tuple(prompts_for(data, args.prompt_template))
    parts = split_by_patient(data.records, args.split, args.seed)
    if "validation" not in parts:
        raise InputError(f"--split {args.split} leaves no picture to validate on; take 98/2, 80/16/4 or 70/10/20")
    parts["validation"] = parts["validation"][:: math.ceil(len(parts["validation"]) / HELD_OUT)]
    for note in data.notes:
        print(f"note: {note}")
    print(
        f"{data.name}: " + ", ".join(f"{len(part):,} {name}" for name, part in parts.items()) + f" pictures of "
        f"{args.size} px; run: {args.out}"
    )

    config = SHAPES[args.shape]
    config = dataclasses.replace(config, unet=dataclasses.replace(config.unet, latent_size=args.size // 8))
    model = new_model(config, args.seed, args.device)
    if args.checkpointing:
        checkpoint_blocks(model.vae, model.unet, model.text_encoder)
    found = fingerprint(data.records, prompts, [contents.get(record.name, b"") for record in data.records])

    def begin(stage):
        runs[stage].begin(data=found)
        config, n = stage_config(args, STAGES[stage]), len(parts["train"])
        print(
            f"stage {list(STAGES).index(stage) + 1} of {len(STAGES)}, {stage.replace('_', ' ')}: {config.steps:,} "
            f"steps of {config.batch_size}; {runs[stage].folder}"
        )
        if stage in ("text_encoder", "diffusion") and config.steps * config.batch_size > MANY_EPOCHS * n:
            print(
                f"note: that is {config.steps * config.batch_size // n:,} times each of {n:,} pictures, which can be "
                "learnt by heart; python -m minildm audit finds copies"
            )
        return runs[stage]

    seconds = [train_autoencoder(model, [model.vae], data, parts, transform, args, begin("autoencoder"), "vae_")]
    whiten_codes(model.vae, TrainingPairs(data.records, prompts, transform), parts["train"], args.device)

    pictures = Pictures(data.records, prompts, encode(model, data.records, transform, args.cache))
    pictures = {name: pictures.some(parts[name]) for name in ("train", "validation")}
    model.config = dataclasses.replace(
        model.config, vae=dataclasses.replace(model.config.vae, scaling_factor=unit_scale(pictures["train"].latents))
    )
    seconds.append(train_text_encoder(model, pictures, args, begin("text_encoder")))
    seconds.append(train_diffusion(model, pictures, args, begin("diffusion")))
    seconds.append(
        train_autoencoder(
            model,
            [model.vae.decoder, model.vae.post_quant_conv],
            data,
            parts,
            transform,
            args,
            begin("decoder"),
            "decoder_",
        )
    )

    folder = args.out / "model"
    save_folder({name: getattr(model, name) for name in NETWORKS}, model.config, folder)
    psnr = autoencoder_psnr(model, data.records, parts, transform, args)
    write_card(folder, args, flags, runs, seconds, psnr)
    print(f"reconstructions of held-out pictures: PSNR {psnr:.2f} dB; losses and hashes: {folder / 'README.md'}")
    print(f"next: python sample.py {shlex.quote(pictures['validation'].prompts[0])} --base {shlex.quote(str(folder))}")
    return 0


def has_bfloat16():
    """Whether bfloat16 products are fast here: on a GPU, and on processors that have them; on others they take up to
    ten times as long as those in float32."""
    if torch.cuda.is_available():
        return True
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def open_stage(args, stage, flags):
    folder = args.out / stage
    resume = args.resume is not None and (folder / "config.json").exists()
    return Run(folder, flags, resume, FREE, f"python -m minildm pretrain --resume {shlex.quote(str(args.out))}")


def whole_files(data, transform, skip_bad, resume=None):
    """Decode every file once, so that none fails hours later; drawn pictures have none. Returns: (the DataSet, with
    ``skip_bad`` without those that cannot be read, the contents' hashes by name)."""
    files = [record for record in data.records if record.render is None]
    contents, bad = {}, {}

    def look(record):
        try:
            contents[record.name] = read(record, transform)[2]
        except InputError as error:
            bad[record.name] = str(error)

    with ThreadPoolExecutor() as pool:
        list(tqdm(pool.map(look, files), total=len(files), desc="looking at all pictures", delay=2, disable=None))
    if bad and not skip_bad:
        raise InputError(
            f"{len(bad):,} of {len(data):,} pictures cannot be used: {'; '.join(list(bad.values())[:5])}; "
            + ("restore them, or begin a new run with --skip-bad" if resume else "--skip-bad goes on without them")
        )
    kept = tuple(record for record in data.records if record.name not in bad)
    return dataclasses.replace(data, records=kept), contents


def new_model(config, seed, device):
    """LatentDiffusion with fresh weights, those of each network drawn from ``seed`` and its name."""
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


def stage_config(args, prefix):
    """TrainingConfig of a stage: the command line's flags with this prefix, and those of all stages."""
    shared = {
        name: getattr(args, name)
        for name in (
            "micro_batch",
            "warmup",
            "ema_decay",
            "caption_dropout",
            "clip",
            "min_snr_gamma",
            "checkpointing",
            "seed",
            "sample_interval",
            "save_interval",
        )
    }
    own = {name: getattr(args, prefix + name) for name in ("steps", "batch_size", "lr")}
    if args.micro_batch is not None:
        shared["micro_batch"] = min(args.micro_batch, own["batch_size"])
    try:
        return TrainingConfig(**shared, **own, lr_schedule="cosine")
    except InputError as error:
        named = any(f"--{name.replace('_', '-')} " in str(error) for name in own)
        raise InputError(f"{error}" + f" (of --{prefix[:-1]}-... flags)" * bool(prefix and named)) from None


def validation_steps(config):
    """Between looks at what was held out: a twelfth of the stage, within 50 and 1,000 steps."""
    return min(1000, max(50, config.steps // 12))


def keep_weights(network):
    """For the loop's ``keep``: (path) writes the network's weights."""
    return lambda path: save_file({name: p.contiguous() for name, p in network.state_dict().items()}, path)


def end_with_average(state, network, run):
    """Leave ``network`` with its averaged weights: the last, or, where the held-out loss has risen by more than SLACK
    since, the best: a few hundred pictures are soon learnt by heart. Returns: seconds of training."""
    state.swap_average()
    last = [entry["validation"] for entry in run.entries() if "validation" in entry][-1]
    if state.best and not last <= (1 + SLACK) * state.best[0]:
        best, step = state.best
        network.load_state_dict(load_file(run.adapter))
        print(
            f"note: the held-out loss rose from {best:.4f} at step {step:,} to {last:.4f}: going on with the weights "
            "of that step"
        )
    network.requires_grad_(False)
    return state.seconds


def batches_of(pairs, config, args):
    """(first step, last step) -> the training batches of these steps."""
    classes = None if args.balance is None else classes_of(pairs.records, args.balance)
    return lambda first, last: training_batches(pairs, config.batch_size, args.seed, first, last, args.workers, classes)


def low_precision(args):
    """Inside, products are computed in --dtype; weights, norms' sums and losses stay float32."""
    device = torch.device(args.device).type
    return torch.autocast(device, torch.bfloat16) if args.dtype == "bfloat16" else contextlib.nullcontext()


# --- stages 1 and 4 ---------------------------------------------------------------------------------------------------
def autoencoder_losses(images, reconstructions, code):
    """(B,) losses: what a picture loses through its code, and how far the code is from a standard normal.

        |d| + SQUARES d^2 + EDGES |grad d| + KL divergence        d = x - x', grad: differences of neighbouring pixels

    The gradient's term stands in for the perceptual loss of the paper (3.1), which needs a trained network: it asks
    for edges where the others are content with the right grey on both sides.
    """
    d = reconstructions.float() - images
    edges = (d.diff(dim=2).abs().mean((1, 2, 3)) + d.diff(dim=3).abs().mean((1, 2, 3))) / 2
    mean, logvar = code.mean.float(), code.logvar.float()
    kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean((1, 2, 3))  # nats for each number of the code
    return d.abs().mean((1, 2, 3)) + SQUARES * d.square().mean((1, 2, 3)) + EDGES * edges + KL * kl


def train_autoencoder(model, learners, data, parts, transform, args, run, prefix):
    """Stage 1, and with the decoder's modules as only ``learners`` stage 4. The model is left with the averaged
    weights. ``prefix``: of the stage's flags. Returns: seconds of training."""
    config, vae = stage_config(args, prefix), model.vae
    for learner in learners:
        learner.requires_grad_(True)
    crop = args.vae_crop if prefix == "vae_" and args.vae_crop else transform.size

    def pairs(indices):
        records = [data.records[i] for i in indices]
        return TrainingPairs(records, [""] * len(records), transform)

    def reconstruct(images, noise):
        with low_precision(args):
            code = vae.encode(images)
            return vae.decode(code.mean + (0.5 * code.logvar).exp() * noise), code

    def losses(batch, numbers):
        images = random_crops(batch["images"], crop, args.seed, numbers).to(args.device)
        noise = draw(args.seed, run.folder.name, numbers, (4, crop // 8, crop // 8), 1).noise.to(args.device)
        return autoencoder_losses(images, *reconstruct(images, noise))

    training, held_out = pairs(parts["train"]), pairs(parts["validation"])

    def draw_reconstructions(step):
        images = torch.stack([held_out[i]["images"] for i in range(min(8, len(held_out)))])
        with torch.no_grad():
            given_back = vae.decode(vae.encode(images.to(args.device)).mean).float().cpu()
        both = torch.stack([images, given_back], 1).flatten(0, 1)  # a picture, what came back, the next picture ...
        save_png(
            contact_sheet(to_pil(both)),
            run.folder / "samples" / f"step-{step:06}.png",
            f"pictures and reconstructions, step {step}",
            FROM_DATA,
        )

    state = train(
        vae,
        losses,
        batches_of(training, config, args),
        config.steps,
        config,
        run,
        lambda: mean_square_error(vae, held_out, args),
        1000,
        draw=draw_reconstructions,
    )
    state.swap_average()
    vae.requires_grad_(False)
    return state.seconds


def random_crops(images, side, seed, numbers):
    """(B, 3, H, W) -> (B, 3, side, side), each from a place that the sample's number decides."""
    crops = []
    for image, number in zip(images, numbers):
        generator = seeded(seed, "crop", number)
        top, left = (torch.randint(length - side + 1, (), generator=generator).item() for length in image.shape[1:])
        crops.append(image[:, top : top + side, left : left + side])
    return torch.stack(crops)


def mean_square_error(vae, pairs, args):
    """Of reconstructions from the code's mean, of pixels in [-1, 1]."""
    return sum(map(sum, squared_errors(vae, pairs, args))) / len(pairs)


@torch.no_grad()
def squared_errors(vae, pairs, args, batch_size=8):
    """Batches of each picture's mean squared error, in float32, pixels in [-1, 1]."""
    for first in range(0, len(pairs), batch_size):
        images = torch.stack([pairs[i]["images"] for i in range(first, min(first + batch_size, len(pairs)))])
        images = images.to(args.device)
        given_back = vae.decode(vae.encode(images).mean).clamp(-1, 1)
        yield (given_back - images).square().mean((1, 2, 3)).tolist()


def autoencoder_psnr(model, records, parts, transform, args):
    """Mean over held-out pictures of each one's peak signal-to-noise ratio, dB: 10 log10(2^2 / mean squared error)."""
    pairs = TrainingPairs([records[i] for i in parts["validation"]], [""] * len(parts["validation"]), transform)
    errors = [error for batch in squared_errors(model.vae, pairs, args) for error in batch]
    return sum(10 * math.log10(4 / max(error, 1e-10)) for error in errors) / len(errors)


@torch.no_grad()
def whiten_codes(vae, pairs, indices, device, most=1024):
    """Turn and scale the code so that its 4 numbers are uncorrelated, each of mean 0 and deviation 1. What the decoder
    makes of it stays as it was: the 1x1 convolutions around the code take the change in.

        mean' = A^-1 (mean - m)    z = A z' + m    A = V diag(e)^1/2    V diag(e) V^T = covariance of z

    Nothing in the autoencoder's loss keeps its channels from saying nearly the same, with hue and edges in their small
    differences (e from 45 to 0.02 seen here), where diffusion's noise, as large in all directions, drowns them. The
    posterior's variances become constants, those of z' on average: turned, they would not be diagonal.
    """
    indices, count = indices[:: math.ceil(len(indices) / most)], 0
    total, products, variances = 0.0, 0.0, 0.0
    for first in range(0, len(indices), 8):
        code = vae.encode(torch.stack([pairs[i]["images"] for i in indices[first : first + 8]]).to(device))
        mean, variance = (x.cpu().double().movedim(1, -1).flatten(0, 2) for x in (code.mean, code.logvar.exp()))
        total, products, variances = total + mean.sum(0), products + mean.T @ mean, variances + variance.sum(0)
        count += len(mean)
    m, noise = total / count, (variances / count).diag()  # (4,), (4, 4)
    e, V = torch.linalg.eigh(products / count - torch.outer(m, m) + noise)
    V = V * V.gather(0, V.abs().argmax(0, keepdim=True)).sign()  # each direction's largest entry is positive
    m, A, noise = (x.clone().apply_(lambda v: float(f"{v:.4g}")) for x in (m, V * e.sqrt(), noise))  # stable at a rerun
    back, n = A.inverse(), len(m)
    into, out = (
        {name: p.cpu().double() for name, p in conv.named_parameters()}
        for conv in (vae.quant_conv, vae.post_quant_conv)
    )
    into["weight"][:n] = torch.einsum("ij,jckl->ickl", back, into["weight"][:n])
    into["weight"][n:] = 0
    into["bias"] = torch.cat([back @ (into["bias"][:n] - m), (back @ noise @ back.T).diag().log()])
    out["bias"] += out["weight"][:, :, 0, 0] @ m
    out["weight"] = torch.einsum("ijkl,jc->ickl", out["weight"], A)
    vae.quant_conv.load_state_dict(into)
    vae.post_quant_conv.load_state_dict(out)


def unit_scale(latents, most=2000):
    """The scaling factor: 1 / the standard deviation of the codes of up to ``most`` pictures."""
    indices = np.linspace(0, len(latents) - 1, min(most, len(latents))).astype(int)
    total, squares, count = 0.0, 0.0, 0
    for i in indices:
        mean, logvar = (moment.double() for moment in latents.moments(i))
        total, squares = total + mean.sum().item(), squares + (mean.square() + logvar.exp()).sum().item()
        count += mean.numel()
    return float(f"{(squares / count - (total / count) ** 2) ** -0.5:.5g}")


# --- stage 2 ---------------------------------------------------------------------------------------------------------
class CaptionReader(nn.Module):
    """What a caption says of the picture's code: context (B, 77, D) -> (B, 4, side, side).

    A learnt query for each of at most 8 x 8 patches looks at the words and answers with the patch's code. It teaches
    the text encoder and is then thrown away, as the picture half of CLIP is.
    """

    def __init__(self, dim, n_heads, side, n_layers=2):
        super().__init__()
        self.side, self.patch = side, math.ceil(side / 8)
        self.grid = math.ceil(side / self.patch)
        self.places = nn.Parameter(torch.randn(self.grid**2, dim))
        self.layers = nn.ModuleList(
            nn.ModuleDict(
                {
                    "norm1": nn.LayerNorm(dim),
                    "attention": Attention(dim, n_heads, dim),
                    "norm2": nn.LayerNorm(dim),
                    "mlp": FeedForward(dim),
                }
            )
            for _ in range(n_layers)
        )
        self.out = nn.Linear(dim, 4 * self.patch**2)

    def forward(self, context):
        x = self.places.expand(len(context), -1, -1)  # (B, places, D)
        for layer in self.layers:
            x = x + layer["attention"](layer["norm1"](x), context)
            x = x + layer["mlp"](layer["norm2"](x))
        code = F.pixel_shuffle(to_map(self.out(x), self.grid, self.grid), self.patch)
        return code[:, :, : self.side, : self.side]


def train_text_encoder(model, pictures, args, run):
    """Stage 2: least squares between a picture's code and what a CaptionReader makes of its caption.

    On procedural pictures, 6,000 steps of denoising taught a text encoder which colours to draw and not which of two
    shapes is above; in 2,000 steps of this, two minutes, it learns that, and a U-Net takes it over as soon as it draws
    shapes at all. Perhaps because here nothing but the words tells, while a noisy picture mostly tells itself.
    ``pictures``: {"train", "validation": Pictures}. The model is left with averaged weights. Returns: seconds of
    training.
    """
    config, encoder = stage_config(args, "text_"), model.text_encoder
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seeded(args.seed, "weights", "caption reader").initial_seed())
        reader = CaptionReader(encoder.config.width, encoder.config.n_heads, args.size // 8).to(args.device)
    networks = nn.ModuleDict({"text_encoder": encoder, "reader": reader}).requires_grad_(True)
    encoder.text_model.embeddings.token_embedding.requires_grad_(False)
    (training, captions), (held_out, held_out_captions) = (
        (TrainingPairs(part.records, part.prompts, latents=part.latents), Captions(model, part.prompts))
        for part in (pictures["train"], pictures["validation"])
    )
    scale = model.config.vae.scaling_factor

    def read_codes(captions, batch, dropped):
        """(B, 4, h, w), and the codes there are."""
        with low_precision(args):
            codes = reader(captions(batch, dropped))
        return codes.float(), (batch["mean"] * scale).to(args.device)

    def losses(batch, numbers):
        dropped = draw(args.seed, "caption", numbers, (1, 1, 1), 1).caption < config.caption_dropout
        codes, true = read_codes(captions, batch, dropped)
        return (codes - true).square().mean((1, 2, 3))

    def held_out_batches(size, most):
        for first in range(0, most, size):
            batch = default_collate([held_out[i] for i in range(first, min(first + size, most))])
            yield read_codes(held_out_captions, batch, torch.zeros(len(batch["index"]), dtype=torch.bool))

    @torch.no_grad()
    def validate():
        batches = held_out_batches(config.samples_at_a_time, len(held_out))
        return sum((codes - true).square().mean((1, 2, 3)).double().sum().item() for codes, true in batches) / len(
            held_out
        )

    @torch.no_grad()
    def draw_readings(step):
        codes, true = next(held_out_batches(8, min(8, len(held_out))))
        both = torch.stack([true, codes], 1).flatten(0, 1)  # a picture, what its caption says, the next picture ...
        save_png(
            contact_sheet(to_pil(model.vae.decode(both / scale))),
            run.folder / "samples" / f"step-{step:06}.png",
            f"pictures and what their captions say, step {step}",
            FROM_DATA,
        )

    state = train(
        networks,
        losses,
        batches_of(training, config, args),
        config.steps,
        config,
        run,
        validate,
        validation_steps(config),
        keep_weights(networks),
        draw_readings,
    )
    return end_with_average(state, networks, run)


# --- stage 3 ---------------------------------------------------------------------------------------------------------
def train_diffusion(model, pictures, args, run):
    """Stage 3, on cached latents and contexts. ``pictures``: {"train", "validation": Pictures}. The model is left with
    averaged weights. Returns: seconds of training."""
    config = stage_config(args, "")
    data = {}
    for name, part in pictures.items():
        contexts = context_cache([*part.prompts, ""], model.tokenize, model.text_encoder, args.cache)
        data[name] = (
            TrainingPairs(part.records, part.prompts, latents=part.latents, contexts=contexts),
            Captions(model, part.prompts, contexts),
        )
    pairs, captions = data["train"]
    shape = pairs[0]["mean"].shape

    def losses(batch, numbers):
        draws = draw(args.seed, "sample", numbers, shape, model.schedule.n_timesteps)
        with low_precision(args):
            return sample_losses(model, batch, draws, captions, config)

    def validate():
        with low_precision(args):
            return validation_loss(model, *data["validation"], dataclasses.replace(config, validation_pairs=HELD_OUT))

    prompts = list(dict.fromkeys(pictures["validation"].prompts))[:16]
    model.unet.requires_grad_(True)
    state = train(
        model.unet,
        losses,
        batches_of(pairs, config, args),
        config.steps,
        config,
        run,
        validate,
        validation_steps(config),
        keep_weights(model.unet),
        lambda step: draw_sheet(model, prompts, args.size, config, run, step),
    )
    return end_with_average(state, model.unet, run)


# --- the card --------------------------------------------------------------------------------------------------------
def write_card(folder, args, flags, runs, seconds, psnr):
    """README.md beside the weights: how they were made, loss curves as numbers, SHA-256 of the files."""
    words = ["python -m minildm pretrain"]
    for name, value in flags.items():
        if value != parser().get_default(name) and name not in FREE:
            words += [f"--{name.replace('_', '-')}"] + [shlex.quote(str(value))] * (value is not True)
    command = " ".join(words)
    lines = [
        f"# {folder.resolve().parent.name}: a latent diffusion model by minildm",
        "",
        f"Made by `{command}`",
        "",
        f"- data: {args.data}, {args.size} px; seed {args.seed}; products in {args.dtype}; PyTorch "
        f"{torch.__version__.split('+')[0]}",
        f"- autoencoder: {args.vae_steps:,} steps of {args.vae_batch_size} pictures in {seconds[0] / 60:.0f} min",
        f"- text encoder: {args.text_steps:,} steps of {args.text_batch_size} in {seconds[1] / 60:.0f} min",
        f"- U-Net: {args.steps:,} steps of {args.batch_size} in {seconds[2] / 60:.0f} min",
        f"- decoder alone: {args.decoder_steps:,} steps of {args.decoder_batch_size} in {seconds[3] / 60:.0f} min",
        f"- on {'a GPU' if 'cuda' in args.device else f'a CPU, threads: {torch.get_num_threads()}'}; PSNR "
        f"{psnr:.2f} dB on held-out pictures",
        "",
        "Not for clinical use.",
        "",
    ]
    for stage, run in runs.items():
        entries = run.entries()
        validation = {entry["step"]: entry["validation"] for entry in entries if "validation" in entry}
        losses = [entry["loss"] for entry in entries if "loss" in entry]
        what = {"diffusion": "loss", "text_encoder": "mean squared error of the code"}.get(stage, "mean squared error")
        lines += [f"| {stage}: step | training loss, mean of the 200 steps before | held-out {what} |", "|---|---|---|"]
        for step, value in validation.items():
            recent = losses[max(step - 200, 0) : step]
            lines.append(f"| {step:,} | {f'{np.mean(recent):.4f}' if recent else ''} | {value:.4f} |")
        lines.append("")
    lines += ["| file | bytes | SHA-256 |", "|---|---|---|"]
    for path in sorted(folder.rglob("*.safetensors")):
        lines.append(f"| `{path.relative_to(folder)}` | {path.stat().st_size:,} | `{sha256(path)}` |")
    with written_beside(folder / "README.md") as path:
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
