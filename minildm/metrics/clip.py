"""``python -m minildm clip-score FAKE``: how well images match their prompts, according to a CLIP model.

    CLIP score = mean over pairs of 100 * max(cos(image embedding, text embedding), 0)

(Hessel et al. 2021, arXiv:2104.08718, Eq. 1, with the weight 100 of torchmetrics and the SeLoRA paper instead of 2.5.)
The score depends on the model as much as on the images, so the model is printed with it. So is the score of the same
images with *other* images' prompts: if the two are close, this CLIP does not see what the prompts say, as with most
medical terms.
"""

import csv
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from PIL import Image
from torch.nn import functional as F

from minildm.errors import InputError
from minildm.loading import usable_device
from minildm.metrics.extractors import FeatureSettings, load_clip
from minildm.metrics.sources import list_images, open_rgb, write_json
from minildm.settings import Parser, add_flags, from_flags


@dataclass(frozen=True)
class ClipScore:
    score: float
    low: float  # 95 % interval of the mean, normal approximation
    high: float
    mismatched: float  # mean over all pairs of an image with another image's (different) prompt; nan without any
    n: int
    cut: int  # prompts longer than the text encoder's context, cut at its end
    model: str
    pretrained: str


def clip_score(images, prompts, model_name="ViT-L-14", pretrained="openai", device="cpu", batch_size=16, progress=None):
    """CLIP score of images (paths) with one prompt each: ClipScore."""
    from tqdm import tqdm

    if len(images) != len(prompts) or not images:
        raise InputError(f"{len(images)} images and {len(prompts)} prompts: expected one prompt per image")
    model, preprocess, tokenize = load_clip(model_name, pretrained, device)
    image_embeddings, text_embeddings, cut = [], [], 0
    for start in tqdm(range(0, len(images), batch_size), desc=progress, disable=progress is None, delay=1):
        batch = torch.stack([preprocess(open_rgb(image)) for image in images[start : start + batch_size]])
        token_ids = tokenize(prompts[start : start + batch_size])  # (B, 77), padded with 0 after the end-of-text
        longer = tokenize(prompts[start : start + batch_size], context_length=4 * token_ids.shape[1])
        cut += int((longer[:, token_ids.shape[1] :] != longer[:, -1:]).any(1).sum())  # the last column is padding
        with torch.inference_mode():
            image_embeddings.append(F.normalize(model.encode_image(batch.to(device)).float(), dim=1).cpu())
            text_embeddings.append(F.normalize(model.encode_text(token_ids.to(device)).float(), dim=1).cpu())
    cosines = torch.cat(image_embeddings) @ torch.cat(text_embeddings).T
    scores = 100 * cosines.clamp(min=0).double()  # (n, n): image i, prompt j
    if not scores.isfinite().all():
        raise InputError(f"{model_name} with {pretrained} gives NaN embeddings; check the checkpoint")
    matched = scores.diagonal()
    different = torch.tensor([[one != other for other in prompts] for one in prompts])
    mean = matched.mean().item()
    half = 1.96 * (matched.std() / len(matched) ** 0.5).item() if len(matched) > 1 else float("nan")
    return ClipScore(
        score=mean,
        low=mean - half,
        high=mean + half,
        mismatched=scores[different].mean().item(),
        n=len(matched),
        cut=cut,
        model=model_name,
        pretrained=str(pretrained),
    )


def read_prompts(images, table=None):
    """The prompt of each image, from a CSV file or, without one, from the PNG's own ``parameters`` text.

    Args: table: columns ``file`` or ``file_name``, and ``prompt`` or ``text``.
    Raises: InputError for an image without a prompt.
    """
    if table is None:
        return [png_prompt(path) for path in images]
    try:
        with open(table, newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            rows, names = list(reader), reader.fieldnames or []
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{table} cannot be read as CSV ({error}); save it as UTF-8 CSV") from None
    file_column = next((name for name in ("file", "file_name") if name in names), None)
    prompt_column = next((name for name in ("prompt", "text") if name in names), None)
    if file_column is None or prompt_column is None:
        raise InputError(f"{table} has columns {names}; expected file (or file_name) and prompt (or text)")
    prompts = {Path(row[file_column]).name: row[prompt_column] for row in rows}
    missing = [path.name for path in images if not prompts.get(path.name)]
    if missing:
        raise InputError(f"{table} has no prompt for {len(missing)} of {len(images)} images, first {missing[0]}")
    return [prompts[path.name] for path in images]


def png_prompt(path):
    """The prompt that a PNG was generated with, from its ``parameters`` text in AUTOMATIC1111's form (the prompt,
    ``Negative prompt: ...``, ``Steps: ...``)."""
    with Image.open(path) as image:
        text = getattr(image, "text", {}).get("parameters")
    if not text:
        raise InputError(f"{path} holds no prompt (PNG text 'parameters'); give a CSV of file,prompt with --prompts")
    lines = text.splitlines()
    ends = [i for i, line in enumerate(lines) if i > 0 and line.startswith(("Negative prompt:", "Steps:"))]
    return "\n".join(lines[: ends[0]] if ends else lines)


def main(argv):
    description = "How well do images match their prompts, according to a CLIP model?"
    parser = Parser(prog="python -m minildm clip-score", description=description)
    parser.add_argument("images", help="folder of images")
    parser.add_argument(
        "--prompts", type=Path, metavar="FILE", help="CSV of file,prompt (default: the prompt stored in each PNG)"
    )
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="JSON file of results (default: clip_score.json beside the images)"
    )
    add_flags(parser, FeatureSettings, "model", skip=("features", "weights", "base", "seed"))
    parser.set_defaults(clip_model="ViT-L-14")
    arguments = parser.parse_args(argv)
    settings = from_flags(FeatureSettings, arguments)

    images = list_images(arguments.images)
    if not isinstance(images[0], Path):
        raise InputError(f"{arguments.images} is a data set; clip-score expects a folder of images")
    result = clip_score(
        images,
        read_prompts(images, arguments.prompts),
        settings.clip_model,
        settings.clip_pretrained,
        usable_device(settings.device),
        settings.batch_size,
        progress="images",
    )
    print(
        f"CLIP score ({result.model}, {result.pretrained}): {result.score:.3f}, 95 % interval {result.low:.3f} - "
        f"{result.high:.3f}, n = {result.n}; with other images' prompts: {result.mismatched:.3f}"
    )
    if result.cut:
        print(f"warning: {result.cut} of {result.n} prompts are too long for the text encoder; their ends were cut")
    out = images[0].parent / "clip_score.json" if arguments.out is None else arguments.out
    write_json(out, asdict(result))
    print(f"wrote {out}")
    return 0
