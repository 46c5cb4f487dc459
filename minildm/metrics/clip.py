"""``python -m minildm clip-score DIR``: does each picture look like its prompt, in CLIP's eyes?

    CLIP score = mean over pairs of 100 * max(cos(image embedding, text embedding), 0)

(Hessel et al. 2021, arXiv:2104.08718, Eq. 1, with the weight 100 of torchmetrics and the SeLoRA paper instead of 2.5.)
The model matters as much as the pictures, so it is printed with the score; so is the score of the same pictures with
*other* pictures' prompts: where the two are close, CLIP does not see what the prompts say, as with most medical terms.
"""

import argparse
import csv
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from PIL import Image
from torch.nn import functional as F

from minildm.errors import InputError
from minildm.loading import usable_device
from minildm.metrics.extractors import list_images, open_rgb
from minildm.settings import Help, at_least


@dataclass(frozen=True)
class ClipScore:
    score: float
    low: float  # 95 % interval of the mean, normal approximation
    high: float
    mismatched: float  # mean over all pairs of a picture with another picture's (different) prompt; nan without any
    n: int
    cut: int  # prompts longer than the text encoder's context, cut at its end
    model: str
    pretrained: str


def load_clip(model_name, pretrained, device="cpu"):
    """open_clip model (frozen), its preprocessing and its tokenizer. ``pretrained``: a tag of open_clip's or a file."""
    import open_clip  # 3 s: only here

    if model_name not in open_clip.list_models():
        raise InputError(f"open_clip has no model {model_name!r}; see open_clip.list_models(), e.g. ViT-L-14")
    is_file = Path(pretrained).is_file()
    tags = open_clip.list_pretrained_tags_by_model(model_name)
    if not is_file and pretrained not in tags:
        raise InputError(
            f"{pretrained!r} is neither a file nor pretrained weights of {model_name}; "
            f"one of: {', '.join(tags) or 'none published'}"
        )
    try:
        model, _, preprocess = open_clip.create_model_and_transforms(
            model_name, pretrained=str(pretrained), device=device
        )
    except Exception as error:  # download and unpickling errors of many types; all mean the weights are not there
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(
            f"cannot load {pretrained} for {model_name} ({reason[:100]}); give a local file of "
            "weights by --clip-pretrained FILE"
        ) from None
    return model.eval().requires_grad_(False), preprocess, open_clip.get_tokenizer(model_name)


def clip_score(
    pictures, prompts, model_name="ViT-L-14", pretrained="openai", device="cpu", batch_size=16, progress=None
):
    """CLIP score of pictures (paths) with their prompts (strings of equal number)."""
    from tqdm import tqdm

    if len(pictures) != len(prompts) or not pictures:
        raise InputError(f"{len(pictures)} pictures and {len(prompts)} prompts: expected one prompt a picture")
    model, preprocess, tokenize = load_clip(model_name, pretrained, device)
    images, texts, cut = [], [], 0
    for start in tqdm(range(0, len(pictures), batch_size), desc=progress, disable=progress is None, delay=1):
        batch = torch.stack([preprocess(open_rgb(path)) for path in pictures[start : start + batch_size]])
        token_ids = tokenize(prompts[start : start + batch_size])  # (B, 77), padded with 0 behind the end-of-text
        longer = tokenize(prompts[start : start + batch_size], context_length=4 * token_ids.shape[1])
        cut += int((longer[:, token_ids.shape[1] :] != longer[:, -1:]).any(1).sum())  # the last column is padding
        with torch.inference_mode():
            images.append(F.normalize(model.encode_image(batch.to(device)).float(), dim=1).cpu())
            texts.append(F.normalize(model.encode_text(token_ids.to(device)).float(), dim=1).cpu())
    scores = 100 * (torch.cat(images) @ torch.cat(texts).T).clamp(min=0).double()  # (n, n): picture i, prompt j
    if not scores.isfinite().all():
        raise InputError(f"{model_name} with {pretrained} gives NaN embeddings; look at the weights")
    own = scores.diagonal()
    different = torch.tensor([[one != other for other in prompts] for one in prompts])
    half = 1.96 * (own.std() / len(own) ** 0.5).item() if len(own) > 1 else float("nan")
    return ClipScore(
        own.mean().item(),
        own.mean().item() - half,
        own.mean().item() + half,
        scores[different].mean().item(),
        len(own),
        cut,
        model_name,
        str(pretrained),
    )


def read_prompts(pictures, table=None):
    """The prompt of each picture: from a CSV (columns ``file`` or ``file_name``, and ``prompt`` or ``text``), or from
    the PNG's own ``parameters`` text (the form of AUTOMATIC1111: prompt, negative prompt, ``Steps: ...``)."""
    if table is None:
        return [png_prompt(path) for path in pictures]
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
    missing = [path.name for path in pictures if not prompts.get(path.name)]
    if missing:
        raise InputError(f"{table} has no prompt for {len(missing)} of {len(pictures)} pictures, first {missing[0]}")
    return [prompts[path.name] for path in pictures]


def png_prompt(path):
    """The prompt a PNG was sampled with."""
    with Image.open(path) as image:
        text = getattr(image, "text", {}).get("parameters")
    if not text:
        raise InputError(f"{path} holds no prompt (PNG text 'parameters'); give a CSV of file,prompt by --prompts")
    lines = text.splitlines()
    ends = [i for i, line in enumerate(lines) if i > 0 and line.startswith(("Negative prompt:", "Steps:"))]
    return "\n".join(lines[: ends[0]] if ends else lines)


def main(argv):
    from minildm.metrics.fid_score import write_json

    parser = argparse.ArgumentParser(
        prog="python -m minildm clip-score", description=__doc__.splitlines()[0], formatter_class=Help
    )
    parser.add_argument("pictures", help="folder of pictures")
    parser.add_argument("--prompts", type=Path, help="CSV of file,prompt (default: what each PNG itself says)")
    parser.add_argument("--clip-model", default="ViT-L-14", help="open_clip architecture")
    parser.add_argument("--clip-pretrained", default="openai", help="open_clip tag or a file of weights")
    parser.add_argument("--batch-size", type=at_least(1), default=16, help="pictures at a time")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda, ...")
    parser.add_argument("--out", type=Path, help="the result as json (default: clip_score.json beside the pictures)")
    arguments = parser.parse_args(argv)
    pictures = list_images(arguments.pictures)
    result = clip_score(
        pictures,
        read_prompts(pictures, arguments.prompts),
        arguments.clip_model,
        arguments.clip_pretrained,
        usable_device(arguments.device),
        arguments.batch_size,
        progress="pictures",
    )
    print(
        f"CLIP score ({result.model}, {result.pretrained}): {result.score:.3f}, 95 % interval {result.low:.3f} - "
        f"{result.high:.3f}, n = {result.n}; with other pictures' prompts: {result.mismatched:.3f}"
    )
    if result.cut:
        print(f"warning: {result.cut} of {result.n} prompts are longer than the text encoder reads; their end was cut")
    out = pictures[0].parent / "clip_score.json" if arguments.out is None else arguments.out
    write_json(out, asdict(result))
    print(f"wrote {out}")
    return 0
