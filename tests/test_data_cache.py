"""The latent cache: exact, never stale, safe when interrupted or built by several processes."""

import dataclasses
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import made_data
import numpy as np
import pytest
import torch
from peers import randomize

from minildm.config import TextEncoderConfig, VAEConfig
from minildm.data import cache, sets
from minildm.data.cache import CachedLatents, Rows, context_cache, latent_cache, weights_fingerprint
from minildm.data.loader import TrainingPairs, training_batches
from minildm.data.open import open_data_set
from minildm.data.reading import Transform, read, to_tensor
from minildm.data.records import Record
from minildm.errors import InputError
from minildm.text_encoder import TextEncoder
from minildm.tokenizer import Tokenizer
from minildm.vae import VAE

TRANSFORM = Transform(64)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """With networks this small, more threads only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def vae():
    return randomize(VAE(VAEConfig.tiny()), seed=1).eval()


@pytest.fixture
def data_set(tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "SETTLED_SECONDS", 0.0)  # trust files written a moment ago
    return open_data_set(f"folder:{made_data.folder(tmp_path / 'data', 10)}")


def direct(vae, record, transform=TRANSFORM):
    """The VAE's (mean, logvar) of a record, without the cache."""
    with torch.no_grad():
        z = vae.encode(to_tensor(read(record, transform)[0][None]))
    return z.mean[0], z.logvar[0]


def assert_half_precision(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


def forbid(monkeypatch, owner, name):
    """Fail the test if ``owner.name`` is called."""
    monkeypatch.setattr(owner, name, lambda *arguments, **keywords: pytest.fail(f"{name} was called"))


@pytest.mark.parametrize("name", ["phantom", "procedural"])
def test_rendered_images_are_rendered_once_until_their_code_changes(vae, tmp_path, name):
    records, _ = sets.DATA_SETS[name].records(3)
    assert len({record.recipe for record in records}) == 3
    first = latent_cache(records, TRANSFORM, vae, tmp_path)
    again = [dataclasses.replace(record, render=lambda size: pytest.fail("rendered again")) for record in records]
    second = latent_cache(again, TRANSFORM, vae, tmp_path)
    assert first.keys == second.keys and all(torch.equal(*pair) for pair in zip(first.moments(2), second.moments(2)))
    rendered = []

    def blank(size):
        rendered.append(size)
        return np.zeros((size, size), np.uint8)

    changed = [dataclasses.replace(record, recipe=f"{record.recipe}!", render=blank) for record in records]
    third = latent_cache(changed, TRANSFORM, vae, tmp_path)
    assert rendered == [64] * 3 and third.keys[0] not in first.keys


def test_cached_moments_equal_the_vaes_to_half_precision(vae, data_set, tmp_path):
    latents = latent_cache(data_set.records, TRANSFORM, vae, tmp_path / "cache", batch_size=3)
    assert isinstance(latents, CachedLatents) and len(latents) == 10 and latents.records == data_set.records
    for i, record in enumerate(data_set.records):
        for ours, theirs in zip(latents.moments(i), direct(vae, record)):
            assert ours.shape == (4, 8, 8) and ours.dtype == torch.float32
            assert_half_precision(ours, theirs)


def test_a_second_build_reads_and_encodes_nothing(vae, data_set, tmp_path, monkeypatch):
    first = latent_cache(data_set.records, TRANSFORM, vae, tmp_path / "cache")
    forbid(monkeypatch, cache, "read")
    second = latent_cache(data_set.records, TRANSFORM, vae, tmp_path / "cache")
    assert torch.equal(first.moments(4)[0], second.moments(4)[0])


def test_moved_files_are_read_but_not_encoded_again(vae, data_set, tmp_path, monkeypatch):
    before = latent_cache(data_set.records, TRANSFORM, vae, tmp_path / "cache")
    moved = open_data_set(f"folder:{shutil.move(tmp_path / 'data', tmp_path / 'elsewhere')}")
    with monkeypatch.context() as patch:
        forbid(patch, Rows, "add")
        latent_cache(moved.records, TRANSFORM, vae, tmp_path / "cache")
    forbid(monkeypatch, cache, "read")  # and the new places are remembered
    after = latent_cache(moved.records, TRANSFORM, vae, tmp_path / "cache")
    assert after.keys == before.keys and torch.equal(after.moments(4)[0], before.moments(4)[0])


def test_a_replaced_file_is_never_served_from_the_cache(vae, data_set, tmp_path):
    latent_cache(data_set.records, TRANSFORM, vae, tmp_path / "cache")
    path = data_set.records[3].path
    before = os.stat(path)
    path.write_bytes(data_set.records[5].path.read_bytes())
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))  # someone who keeps the old modification time
    latents = latent_cache(data_set.records, TRANSFORM, vae, tmp_path / "cache")
    assert_half_precision(latents.moments(3)[0], direct(vae, data_set.records[5])[0])


def test_files_that_changed_moments_ago_are_read_again(vae, data_set, tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "SETTLED_SECONDS", 1000.0)
    latent_cache(data_set.records, TRANSFORM, vae, tmp_path / "cache")
    forbid(monkeypatch, cache, "read")
    with pytest.raises(pytest.fail.Exception, match=r"read was called"):
        latent_cache(data_set.records, TRANSFORM, vae, tmp_path / "cache")


def test_another_transform_or_vae_has_another_cache(vae, data_set, tmp_path):
    other_vae = randomize(VAE(VAEConfig.tiny()), seed=2).eval()
    assert weights_fingerprint(vae) != weights_fingerprint(other_vae)
    for transform, network in (
        (TRANSFORM, vae),
        (TRANSFORM, other_vae),
        (Transform(64, "pad"), vae),
        (Transform(32), vae),
    ):
        latents = latent_cache(data_set.records, transform, network, tmp_path / "cache")
        assert_half_precision(latents.moments(0)[0], direct(network, data_set.records[0], transform)[0])
    assert len(list((tmp_path / "cache").iterdir())) == 4


def test_the_fingerprint_depends_on_the_weights_not_on_the_module(vae):
    same = VAE(VAEConfig.tiny())
    same.load_state_dict(vae.state_dict())
    assert (
        weights_fingerprint(same)
        == weights_fingerprint(vae)
        != weights_fingerprint(VAE(VAEConfig.tiny()).to(torch.bfloat16))
    )


def test_recipes_keep_their_text_so_that_old_caches_stay_valid(vae, data_set, tmp_path):
    latent_cache(data_set.records, Transform(64, "pad", "percentiles"), vae, tmp_path)
    text_encoder = randomize(TextEncoder(TextEncoderConfig.tiny())).eval()
    context_cache(["chest x-ray"], Tokenizer(), text_encoder, tmp_path)
    assert {path.read_text() for path in tmp_path.glob("*/recipe.txt")} == {
        f"latents (mean, logvar) of reading 2, 64 px, pad, greys percentiles; VAE {weights_fingerprint(vae)}\n",
        f"contexts; text encoder {weights_fingerprint(text_encoder)}\n",
    }


def test_equal_files_share_a_row_and_rendered_images_need_no_file(vae, tmp_path):
    paths = [made_data.save(tmp_path / f"{name}.png", seed=0) for name in "ab"]
    records = [Record(path.name, "p", path=path) for path in paths]
    records.append(Record("rendered", "r", render=lambda size: made_data.grey_image(3, size)))
    latents = latent_cache(records, TRANSFORM, vae, tmp_path / "cache")
    assert latents.keys[0] == latents.keys[1] != latents.keys[2]
    assert sum(len(shard) for shard in latents.rows.shards.values()) == 2
    assert_half_precision(latents.moments(2)[0], direct(vae, records[2])[0])


def test_undecodable_images_stop_the_build_after_the_others_are_cached(vae, data_set, tmp_path, monkeypatch):
    for i in (2, 7):
        data_set.records[i].path.write_bytes(b"not an image")
    with pytest.raises(InputError, match=r"2 of 10 images cannot be used: .*002.png: cannot be .*007.png.*--skip"):
        latent_cache(data_set.records, TRANSFORM, vae, tmp_path / "cache")
    forbid(monkeypatch, Rows, "add")
    latents = latent_cache(data_set.records, TRANSFORM, vae, tmp_path / "cache", skip_bad=True)
    assert [int(record.name[-7:-4]) for record in latents.records] == [0, 1, 3, 4, 5, 6, 8, 9]
    assert_half_precision(latents.moments(2)[0], direct(vae, data_set.records[3])[0])


def test_a_file_that_changes_while_the_cache_is_built_is_an_error(vae, data_set, tmp_path, monkeypatch):
    victim = data_set.records[4].path

    def read_then_change(record, transform):
        answer = read(record, transform)
        if record.path == victim:
            made_data.save(victim, seed=99)
        return answer

    monkeypatch.setattr(cache, "read", read_then_change)
    with pytest.raises(InputError, match=r"004.png changed while the cache was being built"):
        latent_cache(data_set.records, TRANSFORM, vae, tmp_path / "cache")
    assert not list((tmp_path / "cache").rglob("*.safetensors"))


def test_a_disk_that_is_too_small_stops_the_build_before_it_begins(vae, data_set, tmp_path, monkeypatch):
    monkeypatch.setattr(cache.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 1000))
    forbid(monkeypatch, cache, "read")
    with pytest.raises(InputError, match=r"the cache needs 0.00 GB for 10 rows, .* has 0.00 GB free; free some space"):
        latent_cache(data_set.records, TRANSFORM, vae, tmp_path / "cache")


def test_values_that_float16_cannot_hold_are_an_error(tmp_path):
    with pytest.raises(InputError, match=r"values that float16 cannot hold"):
        Rows(tmp_path, "x", (1,)).add([b"k" * 32], torch.tensor([[1e6]]))


def test_a_damaged_cache_file_is_named(tmp_path):
    rows = Rows(tmp_path, "x", (4,))
    rows.add([b"k" * 32], torch.ones(1, 4))
    shard = next(rows.folder.glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-3])
    with pytest.raises(InputError, match=r"safetensors is not a complete cache file .* delete it"):
        Rows(tmp_path, "x", (4,))


BUILD = """
import sys, time
from pathlib import Path
sys.path.insert(0, "tests")
import torch
from peers import randomize
from minildm.config import VAEConfig
from minildm.data import cache
from minildm.data.open import open_data_set
from minildm.data.reading import Transform
from minildm.vae import VAE
torch.set_num_threads(1)
cache.ROWS_PER_SHARD, cache.SETTLED_SECONDS = 4, 0.0
vae = randomize(VAE(VAEConfig.tiny()), seed=1).eval()
encode, count = vae.encode, 0
def slow_encode(images):
    global count
    count += len(images)
    time.sleep(0.02)
    return encode(images)
vae.encode = slow_encode
data_set = open_data_set("folder:" + sys.argv[1])
print("ready", flush=True)
while not Path(sys.argv[3]).exists():
    time.sleep(0.01)
latents = cache.latent_cache(data_set.records, Transform(64), vae, sys.argv[2], batch_size=2)
print(count, len(latents), len(latents.rows.locations))
"""


def build(*paths):
    return subprocess.Popen(
        [sys.executable, "-c", BUILD, *map(str, paths)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).resolve().parent.parent,
    )


def test_builders_at_once_share_the_work_and_a_killed_one_loses_at_most_a_block(vae, tmp_path):
    data, cached, go = made_data.folder(tmp_path / "data", 60), tmp_path / "cache", tmp_path / "go"
    builders = [build(data, cached, go) for _ in range(3)]
    for builder in builders:
        assert builder.stdout.readline() == "ready\n"
    go.touch()
    while len(list(cached.rglob("*.safetensors"))) < 3:
        time.sleep(0.005)
    os.kill(builders[0].pid, signal.SIGKILL)
    answers = [builder.communicate() for builder in builders]
    counts = [list(map(int, answer[0].split())) for answer in answers[1:]]
    assert [count[1:] for count in counts] == [[60, 60], [60, 60]], answers
    assert all(count[0] > 0 for count in counts) and sum(count[0] for count in counts) <= 60
    data_set = open_data_set(f"folder:{data}")
    latents = latent_cache(data_set.records, TRANSFORM, vae, cached)
    for i in (0, 17, 59):
        assert_half_precision(latents.moments(i)[0], direct(vae, data_set.records[i])[0])


def test_contexts_are_cached_once_for_each_different_prompt(tmp_path, monkeypatch):
    text_encoder, tokenize = randomize(TextEncoder(TextEncoderConfig.tiny())).eval(), Tokenizer()
    prompts = ["chest x-ray", "chest x-ray, age 47 male", "chest x-ray"]
    contexts = context_cache(prompts, tokenize, text_encoder, tmp_path)
    with torch.no_grad():
        expected = text_encoder(tokenize(prompts))
    for i in range(3):
        torch.testing.assert_close(contexts[i], expected[i], rtol=1e-3, atol=1e-3)
    assert len(contexts) == 3 and len(contexts.rows.locations) == 2
    forbid(monkeypatch, text_encoder, "forward")
    assert torch.equal(context_cache(prompts, tokenize, text_encoder, tmp_path)[1], contexts[1])


def test_batches_of_cached_latents_match_those_of_images(vae, data_set, tmp_path):
    latents = latent_cache(data_set.records, TRANSFORM, vae, tmp_path / "cache")
    prompts = [f"number {i}" for i in range(10)]
    cached = TrainingPairs(latents.records, prompts, latents=latents)
    plain = TrainingPairs(data_set.records, prompts, TRANSFORM)
    for a, b in zip(training_batches(cached, 4, 0, 0, 3), training_batches(plain, 4, 0, 0, 3), strict=True):
        assert a["prompt"] == b["prompt"] and torch.equal(a["index"], b["index"])
        with torch.no_grad():
            z = vae.encode(b["images"])
        assert_half_precision(a["mean"], z.mean)
        assert_half_precision(a["logvar"], z.logvar)
    alone, helped = (list(training_batches(cached, 4, 0, 0, 3, workers)) for workers in (0, 2))
    assert all(torch.equal(a["mean"], b["mean"]) for a, b in zip(alone, helped, strict=True))
