"""``python -m minildm clip-score FAKE``: how well images match their prompts, according to a CLIP model.

    CLIP score = mean over pairs of 100 * max(cos(image embedding, text embedding), 0)

(Hessel et al. 2021, arXiv:2104.08718, Eq. 1, with the weight 100 of torchmetrics and the SeLoRA paper instead of 2.5.)
The score depends on the model as much as on the images, so the model is printed with it. So is the score of the same
images with *other* images' prompts: if the two are close, this CLIP does not see what the prompts say, as with most
medical terms.
"""

import os
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch.nn import functional as F

from minildm.errors import InputError, naming
from minildm.files import input_file, writable_file
from minildm.images import read_parameters, split_parameters
from minildm.loading import usable_device
from minildm.metrics.extractors import FeatureSettings, load_clip
from minildm.metrics.sources import list_images, open_rgb, write_json
from minildm.progress import Progress
from minildm.settings import Parser, add_flags, from_flags
from minildm.tables import read_columns


@dataclass(frozen=True)
class ClipScore:
    score: float
    low: float | None  # 95 % interval of the mean, normal approximation; None for one image
    high: float | None
    mismatched: float | None  # mean over all pairs of an image with another image's (different) prompt; None: no pair
    n: int
    cut: int  # prompts longer than the text encoder's context, cut at its end
    model: str
    pretrained: str


def clip_score(images, prompts, model_name="ViT-L-14", pretrained="openai", device="cpu", batch_size=16, progress=None):
    """CLIP score of images (paths) with one prompt each: ClipScore."""
    if len(images) != len(prompts) or not images:
        raise InputError(f"{len(images)} images and {len(prompts)} prompts: expected one prompt per image")
    model, preprocess, tokenize = load_clip(model_name, pretrained, device)
    image_embeddings, text_embeddings, cut = [], [], 0
    starts = range(0, len(images), batch_size)
    for start in Progress(progress, "batch", iterable=starts, hidden=progress is None):
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
    half = 1.96 * (matched.std() / len(matched) ** 0.5).item() if len(matched) > 1 else None
    return ClipScore(
        score=mean,
        low=None if half is None else mean - half,
        high=None if half is None else mean + half,
        mismatched=scores[different].mean().item() if different.any() else None,
        n=len(matched),
        cut=cut,
        model=model_name,
        pretrained=str(pretrained),
    )


def read_prompts(images, table=None):
    """The prompt of each image, from a table or, without one, from the PNG's own ``parameters`` text.

    Args: table: .csv, .tsv or .jsonl with columns ``file`` or ``file_name``, and ``prompt`` or ``text``.
    Raises: InputError for an image without a prompt, or with several.
    """
    if table is None:
        return [png_prompt(path) for path in images]
    rows_of = {}  # file name: [(the folders before it, prompt)]
    for row_number, (file, prompt) in read_columns(table, ("file", "file_name"), ("prompt", "text")):
        if file is None:
            raise InputError(f"{table}, row {row_number}: no file is named")
        *folders, name = file.replace("\\", "/").split("/")
        rows_of.setdefault(name, []).append((folders, prompt))
    prompts = [_prompt_of(path, rows_of.get(path.name, []), table) for path in images]
    missing = [path.name for path, prompt in zip(images, prompts) if prompt is None]
    if missing:
        raise InputError(f"{table} has no prompt for {len(missing)} of {len(images)} images, first {missing[0]}")
    return prompts


def _prompt_of(path, rows, table):
    """The prompt in the rows, (folders, prompt), that name the image's file; of several those that name its folder."""
    if len(rows) > 1:
        parents = Path(os.path.abspath(path)).parts[:-1]
        rows = [row for row in rows if row[0] and parents[-len(row[0]) :] == tuple(row[0])] or rows
    prompts = {prompt for _, prompt in rows}
    if len(prompts) > 1:
        raise InputError(f"{table} has {len(prompts)} prompts for {path.name}; keep one, or name its folder as well")
    return prompts.pop() if prompts else None


def png_prompt(path, advice="give a CSV of file,prompt with --prompts"):
    """The prompt that a PNG was generated with, from its ``parameters`` text in AUTOMATIC1111's form.

    Raises: InputError where there is none, with the ``advice``.
    """
    text = read_parameters(path)
    if not text:
        raise InputError(f"{path} holds no prompt (PNG text 'parameters'); {advice}")
    return split_parameters(text)[0]


def main(argv):
    description = "How well do images match their prompts, according to a CLIP model?"
    parser = Parser(prog="python -m minildm clip-score", description=description)
    parser.add_argument("images", help="folder of images")
    parser.add_argument(
        "--prompts", type=Path, metavar="FILE", help="table of file,prompt (default: the prompt stored in each PNG)"
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
    if arguments.prompts is None:
        prompts = read_prompts(images)
    else:
        with naming("--prompts"):
            prompts = read_prompts(images, input_file(arguments.prompts, "--prompts"))
    out = writable_file(images[0].parent / "clip_score.json" if arguments.out is None else arguments.out)
    result = clip_score(
        images,
        prompts,
        settings.clip_model,
        settings.clip_pretrained,
        usable_device(settings.device),
        settings.batch_size,
        progress="images",
    )
    interval = "no interval" if result.low is None else f"95 % interval {result.low:.3f} - {result.high:.3f}"
    others = "nothing to compare with, as all prompts are the same"
    if result.mismatched is not None:
        others = f"with other images' prompts: {result.mismatched:.3f}"
    print(f"CLIP score ({result.model}, {result.pretrained}): {result.score:.3f}, {interval}, n = {result.n}; {others}")
    if result.cut:
        print(f"warning: {result.cut} of {result.n} prompts are too long for the text encoder; their ends were cut")
    write_json(out, asdict(result))
    print(f"wrote {out}")
    return 0
