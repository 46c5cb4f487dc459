"""Adapters trained on top of others: their files say what lies below and where it was, and loading finds it."""

import json
import shutil
import warnings

import pytest
import torch
from peers import random_model, single_file_config, write_folder
from safetensors import safe_open

import minildm
from minildm import sampling
from minildm.adapters import add_adapter, save_adapter
from minildm.loading import with_those_below
from minildm.tools.merge import merge


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """base; a; b on top of a:0.5; c on top of both."""
    tmp_path = tmp_path_factory.mktemp("below")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        make(tmp_path)
    return tmp_path


@pytest.fixture
def place(made, tmp_path, monkeypatch):
    """The current folder, with a copy of them."""
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def make(tmp_path):
    write_folder(random_model(single_file_config()), tmp_path / "base")
    for name, below in (("a", []), ("b", ["a:0.5"]), ("c", ["b:0.7"])):
        model = minildm.load("base", below, "cpu")
        for layer in add_adapter(model, "dylora" if name == "a" else "lora", 2).values():
            layer.lora_B.data.normal_(0, 0.1, generator=torch.Generator().manual_seed(ord(name)))
        (tmp_path / name).mkdir()
        save_adapter(model, f"{name}/adapter.safetensors")


def weights(*adapters):
    return minildm.load("base", adapters, "cpu").state_dict()


def assert_same(ours, theirs):
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_an_adapter_is_loaded_on_top_of_what_it_was_trained_on(place, recwarn):
    assert_same(weights("b"), weights("a:0.5", "b"))
    assert_same(weights("c"), weights("a:0.5", "b:0.7", "c"))
    assert_same(weights("b:0.3"), weights("a:0.5", "b:0.3"))
    assert not torch.equal(weights("b")["unet.time_embedding.linear_1.weight"],
                           weights()["unet.time_embedding.linear_1.weight"])  # fmt: skip
    assert not recwarn.list


def test_nothing_is_added_to_a_stack_that_is_complete(place):
    assert with_those_below(["a"]) == ["a"]
    assert with_those_below(["a:0.5", "b"]) == ["a:0.5", "b"]
    assert with_those_below(["b", "c"]) == ["a/adapter.safetensors:0.5", "b", "c"]
    assert with_those_below(["c"]) == ["a/adapter.safetensors:0.5", "b/adapter.safetensors:0.7", "c"]


def test_a_file_says_where_the_ones_below_were(place):
    with safe_open("c/adapter.safetensors", "pt") as file:
        below = json.loads(file.metadata()["minildm"])["on_top_of"]
    assert [entry["path"] for entry in below] == ["a/adapter.safetensors", "b/adapter.safetensors"]
    assert [entry["multiplier"] for entry in below] == [0.5, 0.7]


def test_a_rank_below_is_kept(place):
    model = minildm.load("base", ["a@1"], "cpu")
    add_adapter(model, "lora", 1)
    save_adapter(model, "d.safetensors")
    assert with_those_below(["d.safetensors"]) == ["a/adapter.safetensors@1:1.0", "d.safetensors"]
    assert_same(weights("d.safetensors"), weights("a@1", "d.safetensors"))


def test_what_is_gone_or_another_file_today_is_named_with_the_flags_to_give(place):
    (place / "a").rename(place / "moved")
    flags = r"give --adapter a/adapter.safetensors:0.5 --adapter b/adapter.safetensors"
    with pytest.warns(UserWarning, match=rf"a/adapter.safetensors \(SHA-256 [0-9a-f]{{10}}\); .*{flags}"):
        alone = weights("b")
    (place / "a").mkdir()
    (place / "a" / "adapter.safetensors").write_bytes((place / "c" / "adapter.safetensors").read_bytes())
    with pytest.warns(UserWarning, match="trained on top of other adapters"):
        assert_same(weights("b"), alone)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        weights("moved:0.5", "b")  # the same file in another place


def test_sample_py_says_what_it_adds(place, capsys):
    assert sampling.choose_adapters(("b",), "base") == ("a/adapter.safetensors:0.5", "b")
    assert "merging a/adapter.safetensors:0.5, too" in capsys.readouterr().out
    assert sampling.choose_adapters(("a:0.5", "b"), "base") == ("a:0.5", "b")
    assert capsys.readouterr().out == ""


def test_merging_into_a_checkpoint_adds_the_same(place):
    merge("base", ["b"], "merged")
    merged = minildm.load("merged", device="cpu").state_dict()
    theirs = weights("a:0.5", "b")
    torch.testing.assert_close({name: merged[name] for name in theirs}, theirs, rtol=1e-5, atol=1e-6)
