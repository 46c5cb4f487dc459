"""The hand-written Inception-v3 against pytorch-fid's, on the same weights."""

import json

import pytest
import torch
from metrics_helpers import random_weights, reference_inception, smooth_noise
from safetensors.torch import save_file
from torch.nn import functional as F

from minildm.checkpoint import TensorFile
from minildm.errors import InputError
from minildm.metrics import InceptionV3, inception

DIMS = (64, 192, 768, 2048)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "inception.pth"
    torch.save(random_weights(), path)
    return path


@pytest.fixture(scope="module")
def network(weights):
    return InceptionV3.from_file(weights)


@pytest.fixture(scope="module")
def reference():
    network = reference_inception(random_weights())

    def features(images):
        with torch.no_grad():
            return {dim: F.adaptive_avg_pool2d(maps, 1).flatten(1) for dim, maps in zip(DIMS, network(images))}

    return features


def relative_error(a, b):
    return ((a - b).abs().max() / b.abs().max()).item()


def test_names_and_shapes_are_those_of_the_published_file(shared_data):
    tensors = json.loads((shared_data / "keys" / "fid_inception_state_dict_keys.json").read_text())["tensors"]
    assert {name: list(value.shape) for name, value in InceptionV3().state_dict().items()} == {
        name: entry["shape"] for name, entry in tensors.items()
    }


def test_features_match_pytorch_fid_at_all_depths(network, reference):
    for side in (96, 400):
        images = smooth_noise(2, side, seed=side)
        expected, features = reference(images), network.features(images)
        assert list(features) == list(DIMS)
        for dim in DIMS:
            assert features[dim].shape == (2, dim)
            assert 0.1 < expected[dim].mean() < 10 and expected[dim].std() > 0.05  # O(1): so the tolerance bites
            assert relative_error(features[dim], expected[dim]) < 1e-5
    state = random_weights()
    logits = F.linear(features[2048], state["fc.weight"], state["fc.bias"])
    torch.testing.assert_close(network.logits(features[2048]), logits)


@pytest.mark.parametrize("mistake", ["eps", "average_pool", "max_pool"])
def test_a_wrong_eps_or_pool_would_be_seen(reference, weights, monkeypatch, mistake):
    images = smooth_noise(1, 128, seed=1)
    expected = reference(images)
    if mistake == "eps":
        norm = torch.nn.BatchNorm2d
        monkeypatch.setattr(inception.nn, "BatchNorm2d", lambda n, eps: norm(n, eps=1e-5))
    elif mistake == "average_pool":
        monkeypatch.setattr(inception, "average_pool", lambda x: F.avg_pool2d(x, 3, stride=1, padding=1))
    else:
        monkeypatch.setattr(inception, "max_pool", inception.average_pool)
    features = InceptionV3.from_file(weights).features(images)
    assert relative_error(features[2048], expected[2048]) > 1e-3


def test_features_do_not_depend_on_the_batch(network):
    images = smooth_noise(3, 150, seed=2)
    together = network.features(images)
    alone = [network.features(image[None]) for image in images]
    for dim in DIMS:
        assert relative_error(together[dim], torch.cat([features[dim] for features in alone])) < 2e-6


def test_uint8_float_and_grey_agree(network):
    grey = (smooth_noise(2, 120, seed=3)[:, :1] * 255).byte()
    expected = network.features(grey.expand(-1, 3, -1, -1).float() / 255, dims=(64,))[64]
    torch.testing.assert_close(network.features(grey, dims=(64,))[64], expected)


def test_safetensors_loads_the_same(network, tmp_path):
    save_file(random_weights(), tmp_path / "inception.safetensors")
    images = smooth_noise(1, 99, seed=4)
    other = InceptionV3.from_file(tmp_path / "inception.safetensors")
    torch.testing.assert_close(other.features(images)[2048], network.features(images)[2048])


def without_counters(state):
    return {name: tensor for name, tensor in state.items() if not name.endswith("num_batches_tracked")}


@pytest.mark.parametrize("form", ["safetensors", "pickle", "legacy pickle", "in a dictionary", "with int32 counters"])
def test_conversions_without_the_batch_norms_counters_load_the_same(form, network, weights, tmp_path):
    state = TensorFile(weights)
    state = without_counters(dict(state.tensors(state.shapes)))
    path = tmp_path / "converted"
    if form == "safetensors":
        save_file(state, path)
    elif form == "with int32 counters":
        name = "Conv2d_1a_3x3.bn.num_batches_tracked"
        torch.save(state | {name: torch.tensor(3, dtype=torch.int32)}, path)
    else:
        state = {"state_dict": state} if form == "in a dictionary" else state
        torch.save(state, path, _use_new_zipfile_serialization=form != "legacy pickle")
    images = smooth_noise(1, 99, seed=4)
    features = InceptionV3.from_file(path).features(images, dims=(64,))[64]
    torch.testing.assert_close(features, network.features(images, dims=(64,))[64], rtol=0, atol=0)


@pytest.mark.parametrize(
    "change, says",
    [
        (lambda state: {f"module.{name}": tensor for name, tensor in state.items()}, "DistributedDataParallel"),
        (lambda state: state | {"fc.bias": state["fc.bias"].int()}, "1 names, shapes or types differ, first 'fc.bias'"),
        (lambda state: state | {"fc.bias": state["fc.bias"].to_sparse()}, "first 'fc.bias'"),
        (lambda state: state | {"extra.weight": torch.zeros(1)}, "first 'extra.weight'"),
    ],
)
def test_other_weights_are_refused_by_name(change, says, weights, tmp_path):
    state = TensorFile(weights)
    torch.save(change(dict(state.tensors(state.shapes))), tmp_path / "changed.pth")
    with pytest.raises(InputError) as error:
        InceptionV3.from_file(tmp_path / "changed.pth")
    assert says in str(error.value) and "\n" not in str(error.value)


def test_random_networks_are_reproducible_and_keep_images_apart():
    network, again = InceptionV3.random(seed=1), InceptionV3.random(seed=1)
    torch.testing.assert_close(network.state_dict(), again.state_dict())
    features = network.features(smooth_noise(2, 200, seed=5))
    for dim in DIMS:
        assert 0.05 < features[dim].mean() < 20
        assert features[dim].std(dim=0).mean() > 0.005 * features[dim].mean()


@pytest.mark.parametrize(
    "images, message",
    [
        (torch.rand(1, 2, 8, 8), "(B, 3, H, W)"),
        (torch.rand(1, 4, 8, 8), "(B, 3, H, W)"),
        (torch.rand(3, 8, 8), "(B, 3"),
        (torch.rand(1, 3, 8, 8) - 1, "[0, 1]"),
        (torch.full((1, 3, 8, 8), torch.nan), "[0, 1]"),
        (torch.ones(1, 3, 8, 8, dtype=torch.int64), "uint8"),
    ],
)
def test_wrong_images_are_refused(network, images, message):
    with pytest.raises(InputError) as error:
        network.features(images)
    assert message in str(error.value)


def test_missing_weights_say_what_to_get(tmp_path):
    with pytest.raises(FileNotFoundError) as error:
        InceptionV3.from_file(tmp_path / "absent.pth")
    for part in ("pt_inception-2015-12-05-6726825d.pth", "95,628,359 bytes", "6726825d0af5f729", "--features random"):
        assert part in str(error.value)
    assert "\n" not in str(error.value)


def test_other_files_are_refused(tmp_path):
    (tmp_path / "text.pth").write_text("no weights")
    torch.save({"a": torch.zeros(1)}, tmp_path / "other.pth")
    torch.save([1], tmp_path / "list.pth")
    torch.save({**random_weights(), "fc.weight": torch.zeros(1000, 2048)}, tmp_path / "shape.pth")
    (tmp_path / "text.safetensors").write_text("no weights")
    for name in ("text.pth", "other.pth", "list.pth", "shape.pth", "text.safetensors"):
        with pytest.raises(InputError) as error:
            InceptionV3.from_file(tmp_path / name)
        assert name in str(error.value) and "\n" not in str(error.value)
