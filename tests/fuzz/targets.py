"""What is fuzzed: for each target a generator of cases, each a function without arguments that reads one damaged input.

A target is a function of (folder, rng): it prepares whole inputs in ``folder`` once and yields cases for ever.
"""

import contextlib
import copy
import io
import json
import math
import shutil
import warnings
from functools import partial

import made_data
import numpy as np
import torch
from made_runs import small_model
from mutations import of_bytes, of_document, of_state
from peers import random_model, write_folder, write_single_file
from PIL import Image, PngImagePlugin
from safetensors.torch import save_file

import minildm
import sample
from minildm import record
from minildm.adapters import METHODS, add_adapter, save_adapter
from minildm.adapters.files import merge_file
from minildm.config import ModelConfig
from minildm.data.cache import Rows
from minildm.data.open import open_data_set
from minildm.data.reading import decode
from minildm.images import save_png
from minildm.metrics.extractors import script_extractor
from minildm.metrics.frechet import SavedStatistics, Statistics
from minildm.tables import read_prompts
from minildm.training.command_line import parse
from minildm.training.config import TrainingConfig
from minildm.training.loop import train
from minildm.training.run import Run, read_record
from minildm.training.task import Task


def damaged(rng, path, data):
    """Write ``data`` with some damage to ``path``."""
    path.write_bytes(of_bytes(rng, data))


def checkpoint_file(folder, rng):
    whole, path = folder / "whole.safetensors", folder / "base.safetensors"
    write_single_file(random_model(ModelConfig.tiny()), whole, extras=False)
    data = whole.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header, body = json.loads(data[8 : 8 + length]), data[8 + length :]
    while True:
        if rng.random() < 0.5:
            text = of_document(rng, header)
            path.write_bytes(len(text).to_bytes(8, "little") + text + body)
        else:
            damaged(rng, path, data)
        yield lambda: minildm.load(path, device="cpu")


def pickled_checkpoint(folder, rng):
    path, buffer = folder / "base.ckpt", io.BytesIO()
    model = random_model(ModelConfig.tiny())
    state = {f"model.{name}": value for name, value in model.unet.state_dict().items()}
    torch.save({"state_dict": state, "step": 7}, buffer)
    while True:
        if rng.random() < 0.5:
            torch.save(of_state(rng, {"state_dict": state, "step": 7}), path)
        else:
            damaged(rng, path, buffer.getvalue())
        yield lambda: minildm.load(path, device="cpu")


def checkpoint_folder(folder, rng):
    base = folder / "base"
    write_folder(random_model(ModelConfig.tiny()), base)
    files = sorted(base.rglob("*config.json"))
    documents = {path: json.loads(path.read_text()) for path in files}
    while True:
        path = rng.choice(files)
        path.write_bytes(of_document(rng, documents[path]))
        yield lambda: minildm.load(base, device="cpu")
        path.write_text(json.dumps(documents[path]))


def adapter_file(folder, rng):
    model, whole, path = small_model(), folder / "whole.safetensors", folder / "adapter.safetensors"
    add_adapter(model, "lora", rank=2)
    save_adapter(model, whole)
    data, base = whole.read_bytes(), small_model()
    length = int.from_bytes(data[:8], "little")
    header, body = json.loads(data[8 : 8 + length]), data[8 + length :]
    about = json.loads(header["__metadata__"]["minildm"])
    while True:
        kind = rng.randrange(3)
        if kind == 0:
            damaged(rng, path, data)
        else:
            new = copy.deepcopy(header)
            if kind == 1:
                new["__metadata__"]["minildm"] = of_document(rng, about).decode(errors="replace")
            text = of_document(rng, new) if kind == 2 else json.dumps(new).encode()
            path.write_bytes(len(text).to_bytes(8, "little") + text + body)
        yield lambda: merge_file(base, path)


def images(folder, rng):
    values = (np.arange(40 * 30).reshape(40, 30) * 37) % 4096
    grey = Image.fromarray((values // 16).astype(np.uint8))
    files = [
        ("a.png", made_data.encoded(grey, "PNG")),
        ("deep.png", made_data.encoded(Image.fromarray(values.astype(np.uint16)), "PNG")),
        ("a.jpg", made_data.encoded(grey, "JPEG")),
        ("a.tif", made_data.encoded(Image.fromarray(values.astype(np.uint16)), "TIFF")),
        ("packed.tif", made_data.encoded(grey, "TIFF", compression="tiff_lzw")),
        ("a.bmp", made_data.encoded(grey, "BMP")),
        ("a.dcm", made_data.dicom(values.astype(np.uint16))),
    ]
    while True:
        name, data = rng.choice(files)
        damage = of_bytes(rng, data)
        yield partial(decode, damage, name)


def text_of_png(folder, rng):
    path = folder / "image.png"
    image = Image.new("RGB", (8, 8))
    about = {"schema": 1, "prompt": "a", "sampling": {"steps": 2, "sampler": "ddim"}, "adapters": [{"path": "x"}]}
    while True:
        if rng.random() < 0.5:
            chunks = PngImagePlugin.PngInfo()
            chunks.add_text("minildm", of_document(rng, about).decode("latin-1"), zip=rng.random() < 0.5)
            chunks.add_text("parameters", "x" * rng.choice((1, 10**7)), zip=True)
            image.save(path, pnginfo=chunks)
        else:
            save_png(image, path, "a\nSteps: 2, Seed: 1", record=about)
            damaged(rng, path, path.read_bytes())
        yield lambda: record.read_record(path)
        yield lambda: sample.parse(["--like", str(path)])


def tables(folder, rng):
    table = b'prompt,age\n"chest x-ray, \xc3\xa4",40\nb,50\n'
    lines = b'{"prompt": "a", "age": 40}\n{"text": "b"}\n'
    files = [("a.csv", table), ("a.tsv", table.replace(b",", b"\t")), ("a.jsonl", lines), ("a.txt", table)]
    while True:
        name, data = rng.choice(files)
        damaged(rng, folder / name, data)
        yield partial(read_prompts, folder / name)


def data_sets(folder, rng):
    made_data.folder(folder / "data", 6)
    path = folder / "data" / "metadata.csv"
    data = path.read_bytes()
    while True:
        damaged(rng, path, data)
        yield lambda: open_data_set(f"folder:{folder / 'data'}")


class Parabola(Task):
    """A task that costs nothing: the loss is a sum of squares of what is trained."""

    batch_size = 1

    def __init__(self, model):
        self.model = model

    def batches(self, first_step, last_step):
        for step in range(first_step, last_step):
            yield {"id": torch.tensor([step]), "weight": torch.ones(1)}

    def losses(self, batch):
        return sum(p.square().sum() for p in self.model.parameters() if p.requires_grad)[None]


def trained(folder, resume, method="lora", steps=2):
    """Train the smallest thing there is, or resume it. Returns: the Run."""
    run = Run(folder, {"seed": 0}, resume=resume)
    run.begin(data="none")
    model, settings = small_model(), METHODS[method].settings_class(targets=("unet",))
    config = TrainingConfig(steps=steps, batch_size=1, save_interval=1, sample_interval=0, ema_decay=0.5)
    with contextlib.redirect_stderr(io.StringIO()):
        train(METHODS[method](model, settings, steps, 0), Parabola(model), config, run, steps)
    return run


def resumed(folder, method):
    return trained(folder, True, method, steps=3).entries()


def run_state(folder, rng):
    methods = ("selora", "adalora", "dylora", "full")
    for name in methods:
        trained(folder / name, resume=False, method=name)
    states = {name: torch.load(folder / name / "last" / "state.pt", weights_only=True) for name in methods}
    logs = {name: (folder / name / "log.jsonl").read_bytes() for name in methods}
    while True:
        name = rng.choice(methods)
        path = folder / name / "last" / "state.pt"
        (folder / name / "log.jsonl").write_bytes(logs[name])
        torch.save(states[name], path)
        kind = rng.randrange(3)
        if kind == 0:
            damaged(rng, path, path.read_bytes())
        elif kind == 1:
            torch.save(of_state(rng, states[name]), path)
        else:
            damaged(rng, folder / name / "log.jsonl", logs[name])
        yield partial(resumed, folder / name, name)


def run_config(folder, rng):
    run = folder / "run"
    run.mkdir()
    settings = parse(["--adapter", "selora"]).settings
    document = {"minildm": "0.2.0", "settings": settings, "found": {"splits": {"train": ["a"]}}}
    while True:
        (run / "config.json").write_bytes(of_document(rng, document))
        yield lambda: (read_record(run), parse(["--resume", str(run)]))


def cache_files(folder, rng):
    def fill():
        shutil.rmtree(folder / "cache", ignore_errors=True)
        rows = Rows(folder / "cache", "fuzz", (2, 3))
        rows.add([bytes([i]) * 32 for i in range(4)], torch.ones(4, 2, 3))
        return next(rows.folder.glob("*.safetensors"))

    def read_all():
        rows = Rows(folder / "cache", "fuzz", (2, 3))
        for key in rows.locations:
            row = rows[key]
            assert row.shape == (2, 3) and row.isfinite().all()

    shard = fill()
    data = shard.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    keys = (torch.zeros(4, 32, dtype=torch.uint8), torch.zeros(4, 32), torch.zeros(128, dtype=torch.uint8))
    rows = (
        torch.ones(4, 2, 3),
        torch.full((4, 2, 3), math.nan),
        torch.ones(4, 3, 2),
        torch.ones(3, 2, 3),
        torch.ones(()),
    )
    while True:
        kind = rng.randrange(3)
        if kind == 0:
            text = of_document(rng, header)
            shard.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])
        elif kind == 1:
            save_file({"keys": rng.choice(keys), "rows": rng.choice(rows).half()}, shard)
        else:
            damaged(rng, shard, data)
        yield read_all


def saved_statistics(folder, rng):
    whole, path = folder / "whole.npz", folder / "stats.npz"
    statistics = Statistics(4)
    statistics.add(np.random.default_rng(0).normal(size=(9, 4)))
    statistics.save(whole)
    data = whole.read_bytes()
    odd = ([], "text", np.array(["a"]), np.zeros((2, 2, 2)), np.full(4, np.nan), np.zeros(4, complex), np.array(None))
    while True:
        if rng.random() < 0.3:
            np.savez(path, mu=rng.choice(odd), sigma=rng.choice(odd), n=rng.choice(odd))
        else:
            damaged(rng, path, data)
        yield lambda: SavedStatistics(path).factor()


def scripts(folder, rng):
    whole, path = folder / "whole.pt", folder / "script.pt"
    network = torch.nn.Sequential(torch.nn.AvgPool2d(56), torch.nn.Flatten())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.trace(network, torch.rand(2, 3, 224, 224)).save(whole)
    data = whole.read_bytes()
    while True:
        damaged(rng, path, data)
        yield lambda: script_extractor(path)


WORDS = ["0", "-1", "nan", "1e999", "9" * 26, "x", "a:b", "folder:/nowhere", "phantom", "none", "@", ":"]
WORDS += ["", "\udcff", "\x1b[2J"]
TRAIN_FLAGS = """--adapter --base --vae --on-top-of --data --dtype --steps --lr --split --seed --rank --resume
--preset --batch-size --size --min-age --prompt-template --instance-prompt --dry-run --no-balance"""
SAMPLE_FLAGS = """--prompts --column --negative -n --init-image --like --sampler --steps --guidance --eta --seed
--height --width --strength --base --adapter --batch-size --out"""


def command_lines(folder, rng):
    while True:
        text, command = rng.choice(((TRAIN_FLAGS, parse), (SAMPLE_FLAGS, sample.parse)))
        flags = text.split()
        if rng.random() < 0.5:
            line = [word for _ in range(rng.randint(1, 3)) for word in (rng.choice(flags), rng.choice(WORDS))]
        else:
            line = [rng.choice((rng.choice(flags), rng.choice(WORDS))) for _ in range(rng.randint(0, 6))]
        yield partial(command, line)


TARGETS = {
    function.__name__: function
    for function in (
        *(checkpoint_file, pickled_checkpoint, checkpoint_folder, adapter_file, images, text_of_png, tables, data_sets),
        *(run_state, run_config, cache_files, saved_statistics, scripts, command_lines),
    )
}
