"""CLIP score against open_clip called by hand, and where its prompts come from."""

import json

import pytest
import torch
from metrics_helpers import write_images
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from minildm.__main__ import main
from minildm.errors import InputError
from minildm.images import save_png
from minildm.metrics.clip import clip_score, png_prompt, read_prompts
from minildm.metrics.extractors import FeatureSettings, open_extractor
from minildm.metrics.features import collect
from minildm.metrics.fid_score import measure
from minildm.metrics.sources import list_images

MODEL = "ViT-S-32-alt"  # small; parity does not depend on the weights, so they are random


@pytest.fixture(scope="module")
def clip_weights(tmp_path_factory):
    import open_clip

    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("clip") / "clip.pt"
    torch.save(open_clip.create_model(MODEL).state_dict(), path)
    return path


@pytest.fixture
def generated(tmp_path):
    """Five PNGs with their prompts: paths, prompts."""
    prompts = ["chest x-ray, age 47 male", "a\nsecond line", "brain " * 100, "chest x-ray, age 47 male", "Steps: ahead"]
    for i, path in enumerate(sorted(write_images(tmp_path / "samples", 5, seed=0, sizes=((64, 64),)).iterdir())):
        info = PngInfo()
        info.add_text("parameters", f"{prompts[i]}\nNegative prompt: blurry\nSteps: 50, Sampler: DDIM, Seed: {i}")
        with Image.open(path) as image:
            image.convert("RGB").save(path.with_suffix(".png"), pnginfo=info)
        if path.suffix != ".png":
            path.unlink()
    return list_images(tmp_path / "samples"), prompts


def test_clip_score_matches_open_clip_by_hand(generated, clip_weights):
    import open_clip

    paths, prompts = generated
    model, _, preprocess = open_clip.create_model_and_transforms(MODEL, pretrained=str(clip_weights))
    model.eval()
    scores = torch.zeros(5, 5)
    with torch.no_grad():
        for i, path in enumerate(paths):
            image = model.encode_image(preprocess(Image.open(path).convert("RGB"))[None])
            for j, prompt in enumerate(prompts):
                text = model.encode_text(open_clip.get_tokenizer(MODEL)([prompt]))
                scores[i, j] = 100 * max(torch.cosine_similarity(image, text).item(), 0)
    result = clip_score(paths, prompts, MODEL, clip_weights, batch_size=2)
    assert result.score == pytest.approx(scores.diagonal().mean().item(), rel=1e-5)
    mismatched = [scores[i, j].item() for i in range(5) for j in range(5) if prompts[i] != prompts[j]]
    assert len(mismatched) == 18 and result.mismatched == pytest.approx(sum(mismatched) / 18, rel=1e-5)
    half = 1.96 * scores.diagonal().std().item() / 5**0.5
    assert (result.score - result.low, result.high - result.score) == pytest.approx((half, half), rel=1e-4)
    assert result.n == 5 and result.cut == 1 and result.model == MODEL


def test_one_prompt_for_all_images_leaves_nothing_to_compare_with(generated, clip_weights, tmp_path, capsys):
    paths, _ = generated
    result = clip_score(paths[:2], ["chest x-ray"] * 2, MODEL, clip_weights)
    assert result.mismatched is None and result.low < result.score
    assert clip_score(paths[:1], ["chest x-ray"], MODEL, clip_weights).low is None
    table = tmp_path / "prompts.csv"
    table.write_text("file,prompt\n" + "".join(f"{path.name},chest x-ray\n" for path in paths))
    words = ["--prompts", table, "--clip-model", MODEL, "--clip-pretrained", clip_weights, "--out", tmp_path / "c.json"]
    assert main(["clip-score", str(paths[0].parent), *map(str, words)]) == 0
    assert "all prompts are the same" in capsys.readouterr().out
    assert "NaN" not in (tmp_path / "c.json").read_text()


def test_prompts_come_from_the_pngs_themselves(generated):
    paths, prompts = generated
    assert read_prompts(paths) == prompts


def test_prompts_come_from_a_table(generated, tmp_path):
    paths, _ = generated
    table = tmp_path / "prompts.csv"
    table.write_text("file,prompt\n" + "".join(f'samples/{path.name},"a, {i}"\n' for i, path in enumerate(paths)))
    assert read_prompts(paths, table) == [f"a, {i}" for i in range(5)]
    table.write_text("file_name,text\n" + f"{paths[0].name},a\n")
    with pytest.raises(InputError, match="no prompt for 4 of 5"):
        read_prompts(paths, table)
    table.write_text("a,b\n1,2\n")
    with pytest.raises(InputError, match="no column 'file or file_name'"):
        read_prompts(paths, table)


def test_a_row_of_another_folder_does_not_give_its_prompt(tmp_path):
    table, images = tmp_path / "prompts.csv", [tmp_path / "x" / "0001.png"]
    for rows in ("x/0001.png,ours\ny/0001.png,theirs\n", "y\\0001.png,theirs\nx\\0001.png,ours\n"):
        table.write_text("file,prompt\n" + rows)
        assert read_prompts(images, table) == ["ours"]
    table.write_text("file,prompt\n0001.png,ours\ny/0001.png,theirs\n")
    with pytest.raises(InputError, match="2 prompts for 0001"):
        read_prompts(images, table)
    (tmp_path / "prompts.jsonl").write_text('{"file_name": "0001.png", "text": "a, b"}\n')
    assert read_prompts(images, tmp_path / "prompts.jsonl") == ["a, b"]


@pytest.mark.parametrize(
    "rows, says",
    [
        ("0001.png,chest x-ray, PA\n", "row 2: 3 fields where the header has 2; quote"),
        ("0001.png\n", "row 2: 1 field where the header has 2"),
        ('0001.png,"open\nb,c\n', "is a quote never closed"),
        (",a\n", "row 2: no file is named"),
        ("0001.png,NA\n", "no prompt for 1 of 1 images, first 0001.png"),
    ],
)
def test_a_table_that_says_less_than_it_seems_is_refused(tmp_path, rows, says):
    table = tmp_path / "prompts.csv"
    table.write_text("file,prompt\n" + rows)
    with pytest.raises(InputError, match=says):
        read_prompts([tmp_path / "0001.png"], table)


def test_prompts_and_results_are_checked_before_the_model_is_loaded(generated, tmp_path):
    folder = str(generated[0][0].parent)
    calls = [
        (["--prompts", "no.csv"], FileNotFoundError, "--prompts no.csv: no such file"),
        (["--prompts", folder], IsADirectoryError, f"--prompts {folder} is a folder"),
        (["--out", folder], IsADirectoryError, f"--out {folder} is a folder"),
        (["--out", f"{generated[0][0]}/x.json"], NotADirectoryError, "is a file, expected a folder"),
    ]
    for flags, error, says in calls:
        with pytest.raises(error, match=says):
            main(["clip-score", folder, "--clip-model", "none", *flags])


def test_command_prints_the_model_with_the_score(generated, clip_weights, capsys):
    paths, _ = generated
    clip = ["--clip-model", MODEL, "--clip-pretrained", str(clip_weights)]
    assert main(["clip-score", str(paths[0].parent), *clip]) == 0
    output = capsys.readouterr().out
    assert f"({MODEL}, {clip_weights})" in output and "n = 5" in output and "other images' prompts" in output
    assert json.loads((paths[0].parent / "clip_score.json").read_text())["n"] == 5


def test_cmmd_is_given_with_clip_features(generated, clip_weights):
    paths, _ = generated
    settings = FeatureSettings(features="clip", clip_model=MODEL, clip_pretrained=str(clip_weights))
    extractor = open_extractor(settings)
    first, second = collect(paths[:3] * 3, extractor), collect(paths[2:] * 3, extractor)
    assert extractor.label == "FD-clip" and extractor.dims == (256,)
    result = measure(first, second, extractor, replicates=3)
    assert result["cmmd"]["value"] > 0


@pytest.mark.parametrize(
    "text, prompt",
    [
        ("Findings: normal heart, clear lungs", "Findings: normal heart, clear lungs"),
        ("chest x-ray\nview: PA", "chest x-ray\nview: PA"),
        ("chest x-ray\nNegative prompt: blurry", "chest x-ray"),
        ("chest x-ray\nSteps: 20, Seed: 3\nTemplate: {prompt}", "chest x-ray"),
    ],
)
def test_prompts_of_other_tools_are_whole(text, prompt, tmp_path):
    save_png(Image.new("RGB", (8, 8)), tmp_path / "image.png", text)
    assert png_prompt(tmp_path / "image.png") == prompt


def test_mistakes_are_answered_in_one_line(generated, clip_weights, tmp_path):
    paths, prompts = generated
    (tmp_path / "text.pt").write_text("no weights")
    Image.new("RGB", (8, 8)).save(tmp_path / "bare.png")
    calls = [
        (lambda: clip_score(paths, prompts[:2], MODEL, clip_weights), "one prompt per image"),
        (lambda: clip_score(paths, prompts, "ViT-Z", clip_weights), "no model 'ViT-Z'"),
        (lambda: clip_score(paths, prompts, MODEL, "nowhere"), "neither a file"),
        (lambda: clip_score(paths, prompts, MODEL, tmp_path / "text.pt"), "cannot load"),
        (lambda: png_prompt(tmp_path / "bare.png"), "holds no prompt"),
        (lambda: main(["clip-score", f"folder:{paths[0].parent}"]), "is a data set"),
    ]
    for call, message in calls:
        with pytest.raises(InputError) as error:
            call()
        assert message in str(error.value) and "\n" not in str(error.value)
