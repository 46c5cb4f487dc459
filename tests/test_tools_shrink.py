"""python -m minildm shrink: the best approximation at a rank, and the energy it keeps, against brute force."""

from collections import Counter

import peers
import pytest
import torch
from peers import assert_says, noise

import minildm
from minildm.__main__ import main
from minildm.adapters import adapter_layers, add_adapter, save_adapter
from minildm.adapters.files import Factors, read_adapter
from minildm.errors import InputError
from minildm.tools.shrink import shrink, shrink_layer


def factors_of(out, d_in, r, scale=1.0, seed=0, kernel=()):
    """Factors whose singular values fall off."""
    A = noise(r, d_in, *kernel, seed=seed) * 0.5 ** torch.arange(r).reshape(-1, *[1] * (1 + len(kernel)))
    return Factors(A, noise(out, r, *[1 for _ in kernel], seed=seed + 1), scale)


def delta_of(factors):
    return factors.scale * factors.B.double().flatten(1) @ factors.A.double().flatten(1)


SHAPES = [
    (24, 16, 6, ()),
    (5, 16, 8, ()),
    (16, 4, 4, ()),
    (7, 7, 7, ()),
    (12, 5, 6, (3, 3)),
    (12, 5, 4, (1, 1)),
    (9, 9, 1, ()),
]


@pytest.mark.parametrize("scale", [1.0, -0.25, 16.0])
@pytest.mark.parametrize(("out", "d_in", "r", "kernel"), SHAPES)
def test_every_rank_is_the_best_approximation_and_its_energy_is_right(out, d_in, r, kernel, scale):
    factors = factors_of(out, d_in, r, scale, kernel=kernel)
    full = delta_of(factors)
    u, s, vh = torch.linalg.svd(full, full_matrices=False)
    for rank in range(1, r + 3):
        shrunk = shrink_layer(factors, rank=rank)
        best = (u[:, :rank] * s[:rank]) @ vh[:rank]
        assert torch.allclose(delta_of(shrunk.factors), best, rtol=0, atol=1e-6 * s[0].item())
        assert shrunk.kept == pytest.approx(s[:rank].square().sum().item(), rel=1e-10)
        assert shrunk.total == pytest.approx(full.square().sum().item(), rel=1e-10)
        error = (full - delta_of(shrunk.factors)).square().sum().item()
        assert 1 - error / shrunk.total == pytest.approx(shrunk.kept / shrunk.total, abs=1e-6)
        k = min(rank, r, out, full.shape[1])
        assert shrunk.factors.A.shape == (k, d_in, *kernel)
        assert shrunk.factors.B.shape == (out, k, *factors.B.shape[2:]) and shrunk.factors.scale == 1.0


@pytest.mark.parametrize("energy", [0.1, 0.5, 0.8, 0.95, 0.999, 1.0])
@pytest.mark.parametrize(("out", "d_in", "r", "kernel"), SHAPES)
def test_the_rank_for_an_energy_is_the_smallest_that_keeps_it(out, d_in, r, kernel, energy):
    factors = factors_of(out, d_in, r, 2.0, kernel=kernel)
    squares = torch.linalg.svdvals(delta_of(factors)).square()
    share = squares.cumsum(0) / squares.sum()
    smallest = next(k for k in range(1, len(share) + 1) if share[k - 1] >= energy - 1e-12)
    shrunk = shrink_layer(factors, energy=energy)
    assert len(shrunk.factors.A) == smallest and shrunk.kept / shrunk.total >= energy - 1e-12


def test_a_rank_that_is_not_there_is_not_kept():
    """Two rows that say the same, and one that says nothing, are rank 1."""
    factors = factors_of(8, 6, 1)
    A, B = torch.cat([factors.A, factors.A, torch.zeros(1, 6)]), torch.cat([factors.B, factors.B, noise(8, 1)], dim=1)
    shrunk = shrink_layer(Factors(A, B, 1.0), energy=1.0)
    assert len(shrunk.factors.A) == 1
    assert torch.allclose(delta_of(shrunk.factors), delta_of(Factors(A, B, 1.0)), atol=1e-6)


def test_an_untrained_layer_keeps_one_row_of_zeros_and_a_layer_of_rank_0_none():
    shrunk = shrink_layer(Factors(noise(4, 6), torch.zeros(8, 4), 1.0), energy=0.9)
    assert shrunk.factors.A.shape == (1, 6) and not delta_of(shrunk.factors).any() and shrunk.total == 0
    shrunk = shrink_layer(Factors(torch.zeros(0, 6), torch.zeros(8, 0), 1.0), energy=0.9)
    assert shrunk.factors.A.shape == (0, 6) and shrunk.factors.B.shape == (8, 0)


def test_the_factors_are_balanced():
    shrunk = shrink_layer(factors_of(24, 16, 6, 1e4), rank=4).factors
    assert torch.allclose(shrunk.A.norm(dim=1), shrunk.B.norm(dim=0), rtol=1e-5)


# --- files -----------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """A trained adapter's file in a run's folder, and the model that it is for."""
    model = peers.random_model(peers.single_file_config(), seed=1)
    add_adapter(model, "lora", rank=6, alpha=12.0)
    for i, layer in enumerate(adapter_layers(model).values()):
        layer.lora_B.data = noise(*layer.lora_B.shape, seed=i) * 0.6 ** torch.arange(6)
    path = tmp_path_factory.mktemp("run") / "adapter.safetensors"
    save_adapter(model, path, settings={"seed": 3})
    return path


@pytest.mark.parametrize("choice", [{"rank": 2}, {"energy": 0.9}, {"energy": 1.0}, {"rank": 64}])
def test_the_reported_energy_is_that_of_the_file(choice, adapter, tmp_path):
    report = shrink(adapter, tmp_path / "small.safetensors", **choice)
    before, after = read_adapter(adapter), read_adapter(tmp_path / "small.safetensors")
    assert list(before.factors) == list(after.factors) and after.kind == "lora"
    kept, total = Counter(), Counter()
    for name, factors in before.factors.items():
        full, error = delta_of(factors), delta_of(factors) - delta_of(after.factors[name])
        for network in (name.partition(".")[0], "all"):
            kept[network] += (full.square().sum() - error.square().sum()).item()
            total[network] += full.square().sum().item()
        if "energy" in choice:
            assert 1 - error.square().sum() / full.square().sum() >= choice["energy"] - 1e-6
    for network, numbers in report.items():
        assert numbers["energy"] == pytest.approx(kept[network] / total[network], abs=1e-6)
        ranks = [len(f.A) for name, f in after.factors.items() if network in ("all", name.partition(".")[0])]
        assert numbers["rank_after"] == pytest.approx(sum(ranks) / len(ranks)) and numbers["rank_before"] == 6
        assert numbers["layers"] == len(ranks)
    assert after.about["settings"] == {"seed": 3} and after.about["shrunk"]["kept"] == report["all"]["energy"]


def test_at_full_energy_the_loaded_model_is_the_same(adapter, tmp_path):
    base = peers.write_folder(peers.random_model(peers.single_file_config(), seed=1), tmp_path / "base")
    shrink(adapter, tmp_path / "small.safetensors", energy=1.0)
    full, small = (minildm.load(base, [path], "cpu") for path in (adapter, tmp_path / "small.safetensors"))
    for name, weight in full.state_dict().items():
        assert peers.relative_error(small.state_dict()[name], weight) < 1e-5, name


def test_the_command_reports_each_network_and_names_its_file(adapter, capsys):
    assert main(["shrink", str(adapter.parent), "--rank", "2"]) == 0
    said = capsys.readouterr().out
    path = adapter.with_name("adapter-rank2.safetensors")
    assert path.is_file() and f"wrote {path}" in said and f"--adapter {path}" in said
    assert [line.partition(":")[0] for line in said.splitlines()[:3]] == ["text_encoder", "unet", "all"]
    assert "rank 6.00 -> 2.00 on average" in said and "energy kept" in said
    with pytest.raises(InputError) as error:
        main(["shrink", str(adapter), "--rank", "2"])
    assert_says(error, path, "exists already", "--out")
    assert main(["shrink", str(adapter), "--energy", "0.95"]) == 0
    assert adapter.with_name("adapter-energy0.95.safetensors").is_file()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["{a}"], ("--rank N or --energy",)),
        (["{a}", "--rank", "2", "--energy", "0.5"], ("--rank N or --energy",)),
        (["{a}:0.5", "--rank", "1"], (":0.5", "as it is")),
        (["{a}@1", "--rank", "1"], ("@1", "as it is")),
        (["{a}", "--energy", "0"], ("--energy", "above 0")),
        (["{a}", "--energy", "1.5"], ("--energy", "at most 1", "1.5")),
        (["{a}", "--energy", "nan"], ("--energy", "nan")),
        (["{a}", "--energy", "95"], ("--energy", "95")),
        (["{a}", "--rank", "2", "--out", "{tmp}"], ("--out", ".safetensors")),
        (["{a}", "--rank", "2", "--out", "{tmp}/a.pt"], ("--out", ".safetensors")),
        (["{a}", "--rank", "2", "--out", "{tmp}/folder.safetensors"], ("--out", "exists already")),
        (["{tmp}/none", "--rank", "2"], ("no such adapter",)),
        (["{tmp}/base.safetensors", "--rank", "2"], ("not an adapter",)),
    ],
)
def test_a_wrong_input_gives_one_line_and_no_file(arguments, says, adapter, tmp_path):
    (tmp_path / "folder.safetensors").mkdir()
    peers.write_single_file(peers.shared_model(), tmp_path / "base.safetensors")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises((InputError, FileNotFoundError)) as error:
        main(["shrink", *(argument.format(a=adapter, tmp=tmp_path) for argument in arguments)])
    assert_says(error, *says)
    assert sorted(tmp_path.rglob("*")) == before


def test_rank_0_is_refused_by_the_flag(adapter, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["shrink", str(adapter), "--rank", "0"])
    assert stop.value.code == 2 and "--rank: must be at least 1" in capsys.readouterr().err
