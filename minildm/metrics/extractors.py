"""Feature extractors: a network, how it reads an image, and the name of the numbers it gives.

Only the published Inception weights make an FID. The number of any other network carries that network's name
(``FD-random``, ``FD-vae``, ``FD-clip``, ``FD-<file>``) and is comparable only with itself.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from PIL import Image
from torch.nn import functional as F

from minildm.errors import InputError, is_out_of_memory
from minildm.files import sha256
from minildm.loading import find_weights, usable_device
from minildm.metrics.inception import DIMS, WEIGHTS_NAME, WEIGHTS_SHA256, InceptionV3, prepare
from minildm.metrics.sources import as_tensor
from minildm.settings import Settings, flag, from_flags, setting


@dataclass(frozen=True)
class Extractor:
    label: str  # name of the distance: "FID", "FD-vae", ...
    dims: tuple  # of the features it gives
    prepare: Callable  # Pillow RGB -> float32 (3, s, s)
    network: Callable  # a batch of these -> {dim: (B, dim)}
    facts: dict = field(default_factory=dict)  # written beside the numbers: weights, hash, resize


@dataclass(frozen=True)
class FeatureSettings(Settings):
    """Which features to compare images by; the flags of ``fid`` and ``audit``, some also of ``clip-score``."""

    features: str = setting(
        "inception",
        "inception | random | vae | clip | FILE.pt (TorchScript: (B,3,224,224) in [0,1] -> (B,d)). TorchScript is a "
        "program and runs with your rights: only from people you trust. Files of weights are data: --weights, --base, "
        "--clip-pretrained",
        metavar="NAME",
    )
    weights: str | None = setting(None, "Inception weights (default: the published file in weights/)", metavar="FILE")
    base: str | None = setting(None, "Stable Diffusion base of --features vae", metavar="PATH")
    clip_model: str = setting("ViT-L-14-336", "open_clip architecture", metavar="NAME")
    clip_pretrained: str = setting("openai", "open_clip tag or checkpoint file", metavar="TAG")
    batch_size: int = setting(16, "images per batch", at_least=1, metavar="N")
    device: str | None = setting(None, "cpu, cuda, ... (default: a GPU if there is one)")
    seed: int = setting(0, "random seed", at_least=0)


NEEDS = {"weights": "inception", "base": "vae", "clip_model": "clip", "clip_pretrained": "clip"}  # flag: --features
WITH_DIMS = ("inception", "random")  # features at several depths


def feature_settings(parser, arguments):
    """The FeatureSettings of parsed flags. Raises: InputError for flags of other features than those that are used.

    Args: parser: with the flags of FeatureSettings. arguments: the command line.
    """
    args, given = parser.parse_args(arguments), parser.given(arguments)
    if "features" not in given and "weights" in given:  # the default may be others, where no weights are found
        args.features = NEEDS["weights"]
    for name, features in NEEDS.items():
        if name in given and args.features != features:
            raise InputError(f"{flag(name)} is for --features {features}, and the features are {args.features}; give "
                             f"--features {features}, or leave {flag(name)} out")  # fmt: skip
    if "dims" in given and args.features not in WITH_DIMS:
        raise InputError(f"--dims is for --features {' and '.join(WITH_DIMS)}; {args.features} has one depth only: "
                         "leave --dims out")  # fmt: skip
    return from_flags(FeatureSettings, args)


def open_extractor(settings, dims=DIMS):
    """The Extractor of a FeatureSettings. ``dims``: depths of the Inception network; the others have one dim each."""
    device = usable_device(settings.device)
    if settings.features == "inception":
        return inception_extractor(settings.weights, dims, device)
    if settings.features == "random":
        return random_extractor(dims, device, settings.seed)
    if settings.features == "vae":
        return vae_extractor(settings.base, device)
    if settings.features == "clip":
        return clip_extractor(settings.clip_model, settings.clip_pretrained, device)
    return script_extractor(settings.features, device)


def inception_extractor(weights=None, dims=DIMS, device="cpu"):
    """The FID network; by default with the file that ``python -m minildm fetch inception`` gets. Weights whose hash is
    not the published file's are labelled as unverified."""
    named = weights  # a path that the user has not given stays out of results
    weights = find_weights(WEIGHTS_NAME) if weights is None else weights
    network = InceptionV3.from_file(weights).to(device)
    digest = sha256(weights)
    label = "FID" if digest == WEIGHTS_SHA256 else "FID (unverified weights)"
    facts = {"weights": str(named or weights.name), "sha256": digest, "resize": "299 x 299 bilinear, no antialias"}
    return Extractor(label, tuple(dims), _for_inception, lambda x: network.features(x, dims), facts)


def random_extractor(dims=DIMS, device="cpu", seed=0):
    """An untrained Inception network, which needs no weights. Its distance is FD-random, not FID."""
    network = InceptionV3.random(seed).to(device)
    facts = {"weights": f"random, seed {seed}", "resize": "299 x 299 bilinear, no antialias"}
    return Extractor("FD-random", tuple(dims), _for_inception, lambda x: network.features(x, dims), facts)


def _for_inception(image):
    return prepare(as_tensor(image)[None])[0]


def vae_extractor(base=None, device="cpu"):
    """The mean latents of a Stable Diffusion VAE at 256 px, averaged to 4 x 8 x 8 = 256 numbers."""
    import minildm

    model = minildm.load(base, device=device, dtype=torch.float32)

    def network(images):
        z = model.vae.encode(2 * images.to(device) - 1).mean  # (B, 4, 32, 32), unscaled
        return {256: F.adaptive_avg_pool2d(z, 8).flatten(1)}

    facts = {"weights": f"{model.files.path.name} {model.base_hash[:10]}", "resize": "256 x 256 bilinear, antialias"}
    return Extractor("FD-vae", (256,), lambda image: _resized(image, 256), network, facts)


def clip_file(model_name, tag):
    """Where the weights of an open_clip tag are in the folder of weights, once fetched."""
    return f"clip/{model_name}-{tag}.safetensors"


def load_clip(model_name, pretrained, device="cpu"):
    """An open_clip model (frozen), its preprocessing and its tokenizer.

    Args: pretrained: one of open_clip's tags for the model (its `clip_file` if there is one, else open_clip's own
        download), or a checkpoint file.
    """
    import open_clip  # here only: importing it takes 3 s

    if model_name not in open_clip.list_models():
        raise InputError(f"open_clip has no model {model_name!r}; see open_clip.list_models(), e.g. ViT-L-14")
    is_file = Path(pretrained).is_file()
    tags = open_clip.list_pretrained_tags_by_model(model_name)
    if not is_file and pretrained not in tags:
        raise InputError(
            f"{pretrained!r} is neither a file nor a tag of {model_name}; choose one of: "
            f"{', '.join(tags) or 'none published'}"
        )
    fetched = find_weights(clip_file(model_name, pretrained)) if not is_file else None
    options = {"pretrained": str(pretrained)}
    if fetched is not None and fetched.is_file():  # a tag brings its activation with it, a file does not
        quick_gelu = bool(open_clip.get_pretrained_cfg(model_name, pretrained).get("quick_gelu"))
        options = {"pretrained": str(fetched), "force_quick_gelu": quick_gelu}
    try:
        model, _, preprocess = open_clip.create_model_and_transforms(model_name, **options, device=device)
    except Exception as error:  # download and unpickling errors of many types; all mean that the weights are missing
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(
            f"cannot load {pretrained} for {model_name} ({reason[:100]}); fetch it (python -m minildm fetch lists what "
            "there is) or give a local checkpoint with --clip-pretrained FILE"
        ) from None
    return model.eval().requires_grad_(False), preprocess, open_clip.get_tokenizer(model_name)


def clip_extractor(model_name, pretrained, device="cpu"):
    """Unit-length image embeddings of an open_clip model, with that model's own resize and crop."""
    model, preprocess, _ = load_clip(model_name, pretrained, device)
    dim = model.encode_image(preprocess(Image.new("RGB", (64, 64)))[None].to(device)).shape[1]

    def network(images):
        return {dim: F.normalize(model.encode_image(images.to(device)), dim=1)}

    facts = {"weights": f"{model_name}, {pretrained}", "resize": "open_clip's for this model"}
    return Extractor("FD-clip", (dim,), preprocess, network, facts)


def script_extractor(path, device="cpu"):
    """A user's TorchScript encoder: (B, 3, 224, 224) float32 in [0, 1] -> (B, d).

    The file is a program: it can read and write files. Raises: InputError if it is none, or fails.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no TorchScript file at {path}; --features is inception, random, vae, clip or FILE.pt")
    try:
        script = torch.jit.load(str(path), map_location=device).eval()
    except Exception as error:  # of many types: archive, code, tensors
        raise InputError(
            f"{path} is not a TorchScript file ({_last_line(error)}); save it with "
            "torch.jit.trace(network, example).save(path)"
        ) from None

    def run(images):
        try:
            features = script(images.to(device))
        except Exception as error:  # the script's own
            if is_out_of_memory(error):
                raise
            shape = (len(images), 3, 224, 224)
            raise InputError(f"the script {path} fails on images {shape} in [0, 1]: {_last_line(error)}") from None
        if not isinstance(features, torch.Tensor):
            form = type(features).__name__
        elif features.ndim == 2 and len(features) == len(images) and features.numel() and features.is_floating_point():
            return features
        else:
            form = f"{str(features.dtype).removeprefix('torch.')} {tuple(features.shape)}"
        raise InputError(f"{path} must map (B, 3, 224, 224) in [0, 1] to (B, d), gave {form}; pool it in the script")

    with torch.inference_mode():
        dim = run(torch.zeros(2, 3, 224, 224)).shape[1]
    facts = {"weights": str(path), "sha256": sha256(path), "resize": "224 x 224 bilinear, antialias"}
    return Extractor(
        f"FD-{path.stem}", (dim,), lambda image: _resized(image, 224), lambda images: {dim: run(images)}, facts
    )


def _last_line(error):
    """What a script's error says: its last line, after those that say where."""
    return ([line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__])[-1][:100]


def _resized(image, size):
    """Pillow RGB -> float32 (3, size, size) in [0, 1], stretched to a square."""
    images = as_tensor(image)[None].float() / 255
    return F.interpolate(images, (size, size), mode="bilinear", antialias=True)[0].clamp(0, 1)
