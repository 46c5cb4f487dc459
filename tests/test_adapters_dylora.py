"""DyLoRA: nested ranks, which rows a step moves, the curve at the end, and files loaded at any rank."""

import json
from collections import Counter
from pathlib import Path

import peers
import pytest
import torch
from made_runs import factors, samples, settings, short_run, small_model
from peers import assert_says

import minildm
from minildm import sampling
from minildm.adapters import adapter_layers, add_adapter, merge_adapter, merge_file, save_adapter
from minildm.adapters.dylora import DyLoRA, RowAdamW, at_rank, curve_ranks
from minildm.errors import InputError
from minildm.loading import parse_adapter
from minildm.training.finetune import Finetuning
from minildm.training.loop import train_step
from minildm.training.state import State

RULES = ("prefix", "single")


def predict(model):
    """What the U-Net predicts for two samples, without gradient."""
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        context = model.text_encoder(model.tokenize(["a chest x-ray", "male"]))
        return model.unet(latents, torch.tensor([10, 900]), context)


def disturb(model, seed=3):
    """Leave the adapter's start, where lora_B = 0."""
    generator = torch.Generator().manual_seed(seed)
    for layer in adapter_layers(model).values():
        layer.lora_B.data = 0.05 * torch.randn(layer.lora_B.shape, generator=generator)


def adapted_model(rank=4, alpha=2.0):
    """A model with a live DyLoRA adapter that changes its output."""
    model = small_model()
    add_adapter(model, "dylora", rank, alpha)
    disturb(model)
    return model


class Training:
    """The pieces of a short run, to take single steps."""

    def __init__(self, **changes):
        method_settings, self.config = settings("dylora", **({"max_rank": 4, "lr": 1e-2} | changes))
        self.model = small_model()
        self.method = DyLoRA(self.model, method_settings, self.config.steps, self.config.seed)
        self.task = Finetuning(self.model, samples(12), samples(4, seed=1), self.config)
        self.state = State(self.method, self.config)

    def step(self):
        """Returns: what the loop would log."""
        step = self.state.step
        (batch,) = self.task.batches(step, step + 1)
        entry = train_step(self.state, self.method, self.task, self.config, batch, self.config.lr)
        self.state.step += 1
        return entry


# --- nested ranks ----------------------------------------------------------------------------------------------------
def test_a_new_adapter_is_a_lora_of_the_same_seed_and_changes_nothing():
    base, plain, nested = small_model(), small_model(), small_model()
    add_adapter(plain, "lora", rank=4)
    add_adapter(nested, "dylora", rank=4)
    assert all(torch.equal(a, b) for a, b in zip(factors(plain), factors(nested), strict=True))
    assert torch.equal(predict(nested), predict(base))


def test_rank_b_of_a_file_is_the_lora_of_the_first_b_rows(tmp_path):
    model = adapted_model(rank=4, alpha=2.0)
    save_adapter(model, tmp_path / "a.safetensors")
    for rank in (1, 2, 4):
        loaded, lora = small_model(), small_model()
        merge_file(loaded, tmp_path / "a.safetensors", rank=rank)
        add_adapter(lora, "lora", rank, alpha=0.5 * rank)  # scale 0.5
        for path, layer in adapter_layers(lora).items():
            A, B = adapter_layers(model)[path].factors()
            layer.lora_A.data, layer.lora_B.data = A[:rank].clone(), B[:, :rank].clone()
        with at_rank(adapter_layers(model).values(), rank):
            live = predict(model)
        torch.testing.assert_close(predict(lora), live, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(predict(loaded), live, rtol=1e-4, atol=1e-5)


def test_one_rank_more_is_one_row_more_at_a_constant_scale(tmp_path):
    model = adapted_model(rank=4, alpha=2.0)
    save_adapter(model, tmp_path / "a.safetensors")
    assert {layer.scale for layer in adapter_layers(model).values()} == {0.5}  # alpha / max_rank
    path, layer = next(iter(adapter_layers(model).items()))
    A, B = layer.factors()
    previous = small_model().get_submodule(path).weight.detach()
    for rank in (1, 2, 3, 4):
        merged = small_model()
        assert merge_file(merged, tmp_path / "a.safetensors", rank=rank)["scale"] == 0.5
        weight = merged.get_submodule(path).weight.detach()
        row = 0.5 * B[:, rank - 1 : rank] @ A[rank - 1 : rank]
        torch.testing.assert_close(weight - previous, row, rtol=1e-4, atol=1e-6)
        previous = weight


def test_a_file_merges_at_every_rank_to_what_the_live_adapter_merges_to(tmp_path):
    save_adapter(adapted_model(), tmp_path / "a.safetensors")
    for rank in (1, 3, 4):
        live, loaded = adapted_model(), small_model()
        for layer in adapter_layers(live).values():
            layer.rank = rank
        merge_adapter(live)
        merge_file(loaded, tmp_path / "a.safetensors", rank=rank)
        for name, tensor in loaded.state_dict().items():
            assert torch.equal(tensor, live.state_dict()[name]), name


def test_an_adapter_saved_at_a_rank_holds_that_rank(tmp_path):
    model = adapted_model(rank=4)
    with at_rank(adapter_layers(model).values(), 3):
        save_adapter(model, tmp_path / "a.safetensors")
    about = merge_file(small_model(), tmp_path / "a.safetensors")
    assert set(about["ranks"].values()) == {3} and about["kind"] == "dylora" and about["scale"] == 0.5
    with pytest.raises(InputError, match=r"\[1, 3\], got 4"):
        merge_file(small_model(), tmp_path / "a.safetensors", rank=4)


# --- the rank of a step ----------------------------------------------------------------------------------------------
def ranks_of_steps(method, steps):
    ranks = []
    for step in steps:
        with method.watch(step):
            ranks.append({layer.rank for layer in method.layers.values()})
    assert all(len(of_layers) == 1 for of_layers in ranks)  # one for all layers
    return [of_layers.pop() for of_layers in ranks]


@pytest.mark.parametrize("rule", RULES)
def test_the_rank_depends_on_the_seed_and_the_step_alone(rule):
    method = Training(update_rule=rule).method
    ranks = ranks_of_steps(method, range(20))
    torch.manual_seed(7)
    assert [ranks_of_steps(method, [step])[0] for step in reversed(range(20))] == ranks[::-1]
    assert ranks_of_steps(Training(update_rule="prefix").method, range(20)) == ranks
    assert ranks_of_steps(Training(seed=1).method, range(20)) != ranks


def test_ranks_are_uniform():
    method, n = Training(max_rank=5).method, 2000
    method.layers = {}  # only the numbers
    counts = Counter()
    for step in range(n):
        with method.watch(step):
            counts[method.rows[1]] += 1
    assert set(counts) == {1, 2, 3, 4, 5}
    chi_square = sum((count - n / 5) ** 2 / (n / 5) for count in counts.values())
    assert chi_square < 18.5  # 4 degrees of freedom, p = 0.001


def test_outside_a_step_all_rows_are_in_use_and_nothing_is_random():
    training = Training()
    training.step()
    layers = training.method.layers.values()
    with pytest.raises(ZeroDivisionError), training.method.watch(3):
        raise ZeroDivisionError
    assert {(layer.rank, layer.first_trained) for layer in layers} == {(4, 0)}
    assert torch.equal(predict(training.model), predict(training.model))
    assert training.task.validate() == training.task.validate()


# --- the rows that move ----------------------------------------------------------------------------------------------
def snapshot(state):
    """(value, means, squares, ages) of the rows of all layers, as tables (max_rank, width)."""
    optimizer = state.optimizer
    values = torch.cat(optimizer.in_rows(optimizer.parameters), dim=1)
    return [tensor.clone() for tensor in (values, optimizer.means, optimizer.squares, optimizer.ages)]


@pytest.mark.parametrize("rule", RULES)
def test_rows_outside_the_update_keep_value_means_and_age(rule):
    training = Training(update_rule=rule, weight_decay=0.1)
    disturb(training.model)
    ages = torch.zeros(4, 1, dtype=torch.float64)
    active_ranks = []
    for _ in range(12):
        before = snapshot(training.state)
        b = training.step()["active_rank"]
        after = snapshot(training.state)
        moving = torch.zeros(4, dtype=torch.bool)
        moving[b - 1 if rule == "single" else 0 : b] = True
        for old, new in zip(before, after):
            assert torch.equal(old[~moving], new[~moving])
            assert all((new[row] != old[row]).any() for row in moving.nonzero())
        ages[moving] += 1
        assert torch.equal(after[3], ages)
        active_ranks.append(b)
    assert set(active_ranks) == {1, 2, 3, 4}


@pytest.mark.parametrize("rule", RULES)
def test_only_the_rows_of_the_update_have_a_gradient(rule):
    """So only they count in the gradient's norm, and rows below b take part in the forward of both rules."""
    training = Training(update_rule=rule)
    disturb(training.model)
    (batch,) = training.task.batches(0, 1)
    step = next(step for step in range(100) if ranks_of_steps(training.method, [step]) == [3])
    with training.method.watch(step):
        loss = training.task.losses(batch).mean()
        loss.backward()
    for layer in training.method.layers.values():
        norms = layer.lora_A.grad.norm(dim=1), layer.lora_B.grad.norm(dim=0)
        for norm in norms:
            assert (norm > 0).tolist() == [rule == "prefix", rule == "prefix", True, False]
    with at_rank(training.method.layers.values(), 3):
        torch.testing.assert_close(training.task.losses(batch).mean(), loss, rtol=1e-6, atol=0)


@pytest.mark.parametrize("rule", RULES)
def test_the_optimizer_equals_adamw_on_each_row_as_a_parameter_of_its_own(rule):
    generator = torch.Generator().manual_seed(0)
    trained = {
        "x.lora_A": torch.nn.Parameter(torch.randn(4, 6, generator=generator)),
        "x.lora_B": torch.nn.Parameter(torch.randn(5, 4, generator=generator)),
    }
    rows = [0, 4]
    ours = RowAdamW(trained, lambda: rows, weight_decay=0.1)
    A, B = trained.values()
    theirs = [torch.nn.Parameter(row.clone()) for row in (*A.data, *B.data.t())]
    reference = torch.optim.AdamW(theirs, weight_decay=0.1)
    for step in range(30):
        b = int(torch.randint(1, 5, (), generator=generator))
        rows[:] = b - 1 if rule == "single" else 0, b
        A.grad, B.grad = torch.randn(4, 6, generator=generator), torch.randn(5, 4, generator=generator)
        for i, row in enumerate(theirs):
            gradient = A.grad[i] if i < 4 else B.grad[:, i - 4]
            row.grad = gradient.clone() if rows[0] <= i % 4 < rows[1] else None
        reference.param_groups[0]["lr"] = lr = 1e-2 / (1 + step)
        ours.step(lr)
        reference.step()
    torch.testing.assert_close(A.data, torch.stack([row.data for row in theirs[:4]]), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(B.data, torch.stack([row.data for row in theirs[4:]], dim=1), rtol=1e-5, atol=1e-6)


# --- the curve -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("rule", RULES)
def test_training_improves_every_rank_and_the_curve_is_logged_once(tmp_path, rule):
    changes = {"adapter": "dylora", "steps": 30, "lr": 3e-3, "max_rank": 4, "update_rule": rule, "ema_decay": 0.5}
    _, _, run, method = short_run(tmp_path / "run", **changes)
    entries = run.entries()
    validation = [entry["validation"] for entry in entries if "validation" in entry]
    (curve,) = [entry["validation_by_rank"] for entry in entries if "validation_by_rank" in entry]
    assert list(curve) == ["1", "2", "3", "4"]
    assert max(curve.values()) < validation[0]
    assert curve["4"] == validation[-1]  # also of the averaged weights
    (line,) = [line for line in method.describe() if "validation loss by rank" in line]
    assert all(f"{loss:.4f} at {rank}" in line for rank, loss in curve.items())
    assert [e["active_rank"] for e in entries if "loss" in e] == ranks_of_steps(method, range(30))

    log = (run.folder / "log.jsonl").read_bytes()
    _, _, run, resumed = short_run(tmp_path / "run", resume=True, **changes)
    assert (run.folder / "log.jsonl").read_bytes() == log
    assert resumed.describe() == method.describe()


def test_without_validation_images_there_is_no_curve(tmp_path):
    _, _, run, method = short_run(tmp_path / "run", adapter="dylora", steps=2, max_rank=2, validation=0)
    assert not any("validation_by_rank" in entry for entry in run.entries())
    assert not any("validation" in line for line in method.describe())
    assert merge_file(small_model(), run.result, rank=1)["ranks"].keys() == method.layers.keys()


def test_large_ranks_are_measured_at_a_handful():
    assert curve_ranks(3) == [1, 2, 3]
    assert curve_ranks(16) == list(range(1, 17))
    assert curve_ranks(40) == [1, 2, 4, 8, 16, 32, 40]
    assert curve_ranks(64) == [1, 2, 4, 8, 16, 32, 64]


def test_a_rank_above_a_layers_width_is_an_error(tmp_path):
    with pytest.raises(InputError, match=r"rank must be in \[1, 32\] .* got 40"):
        short_run(tmp_path / "run", adapter="dylora", max_rank=40)


# --- loading at a rank -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("runs/a", ("runs/a", 1.0, None)),
        ("runs/a:0.6", ("runs/a", 0.6, None)),
        ("runs/a@2", ("runs/a", 1.0, 2)),
        ("runs/a@2:0.6", ("runs/a", 0.6, 2)),
        ("runs/a@0:-1e-1", ("runs/a", -0.1, 0)),
        ("a@b.org:8/run@3", ("a@b.org:8/run", 1.0, 3)),
        ("me@host/run", ("me@host/run", 1.0, None)),
        ("run@2/file", ("run@2/file", 1.0, None)),
        ("C:/run", ("C:/run", 1.0, None)),
        ("0.5", ("0.5", 1.0, None)),
        ("runs/a@x:y", ("runs/a@x:y", 1.0, None)),
    ],
)
def test_an_adapters_text_is_split_into_path_multiplier_and_rank(text, expected):
    assert parse_adapter(text) == (Path(expected[0]), *expected[1:])


def test_what_exists_is_a_path_whatever_its_name_ends_in(tmp_path):
    for name in ("run@2", "run:0.5", "run@3:0.5"):
        (tmp_path / name).mkdir()
        assert parse_adapter(tmp_path / name) == (tmp_path / name / "adapter.safetensors", 1.0, None)
    assert parse_adapter(f"{tmp_path}/run@2@1:0.6") == (tmp_path / "run@2" / "adapter.safetensors", 0.6, 1)
    assert parse_adapter(f"{tmp_path}/run@2:0.6") == (tmp_path / "run@2" / "adapter.safetensors", 0.6, None)
    assert parse_adapter(f"{tmp_path}/run@4:0.6") == (tmp_path / "run", 0.6, 4)


@pytest.mark.parametrize(
    ("ending", "says"),
    [
        (":abc", "a number after the colon, got 'abc'"),
        (":", "a number after the colon, got ''"),
        ("@2:x", "a number after the colon, got 'x'"),
        (":nan", "within 1000 of 0, got nan"),
        (":1e9", "within 1000 of 0, got 1e9"),
        (":-1e400", "within 1000 of 0, got -1e400"),
        ("@", "a rank after the @, got ''"),
        ("@2.5", "a rank after the @, got '2.5'"),
        ("@" + "9" * 5000, "a rank after the @, got '999"),
    ],
)
def test_what_follows_a_file_that_exists_is_a_number_or_an_error(ending, says, tmp_path):
    (tmp_path / "a").touch()
    with pytest.raises(InputError) as error:
        parse_adapter(f"{tmp_path}/a{ending}")
    assert_says(error, f"{tmp_path}/a{ending}"[:80], says)


def test_a_name_that_no_file_can_have_is_a_path():
    for name in ("x" * 300, "a\0b", "x" * 300 + ":0.5"):
        assert not parse_adapter(name)[0].name.endswith("0.5")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a base model, and runs of both kinds for it: dylora of rank 4, lora of rank 2."""
    folder = tmp_path_factory.mktemp("place")
    peers.write_folder(small_model(), folder / "base")
    for kind, rank in (("dylora", 4), ("lora", 2)):
        model = small_model()
        add_adapter(model, kind, rank)
        disturb(model)
        (folder / kind).mkdir()
        save_adapter(model, folder / kind / "adapter.safetensors")
    return folder


def test_load_takes_a_rank_and_a_multiplier_and_records_both(place):
    loaded = minildm.load(place / "base", [f"{place}/dylora@2:0.6"], "cpu")
    merged = minildm.load(place / "base", device="cpu")
    merge_file(merged, place / "dylora" / "adapter.safetensors", 0.6, rank=2)
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, merged.state_dict()[name]), name
    (entry,) = loaded.merged
    assert (entry["multiplier"], entry["rank"]) == (0.6, 2)
    assert "rank" not in minildm.load(place / "base", f"{place}/dylora:0.6", "cpu").merged[0]


def test_an_adapter_trained_on_top_names_the_rank_below_it(place, tmp_path, recwarn):
    below = f"{place}/dylora@2:0.6"
    model = minildm.load(place / "base", [below], "cpu")
    add_adapter(model, "lora", rank=1)
    save_adapter(model, tmp_path / "top.safetensors")
    about = merge_file(minildm.load(place / "base", [below], "cpu"), tmp_path / "top.safetensors")
    assert about["on_top_of"] == model.merged
    assert not [warning for warning in recwarn if "on top of" in str(warning.message)]
    with pytest.warns(UserWarning, match=r"on top of other adapters.*give --adapter \S+@2:0\.6 --adapter"):
        minildm.load(place / "base", [f"{place}/dylora@3:0.6", tmp_path / "top.safetensors"], "cpu")


@pytest.mark.parametrize(
    ("adapter", "words"),
    [
        ("dylora@0", ("dylora", "[1, 4]", "got 0", "@0")),
        ("dylora@5:0.6", ("dylora", "[1, 4]", "got 5")),
        ("dylora@-1", ("[1, 4]", "got -1")),
        ("lora@1", ("lora adapter", "leave @1 out")),
    ],
)
def test_a_rank_that_the_file_does_not_have_is_an_error_and_changes_nothing(place, adapter, words):
    with pytest.raises(InputError) as error:
        minildm.load(place / "base", [f"{place}/{adapter}"], "cpu")
    assert_says(error, *words)
    model = small_model()
    with pytest.raises(InputError):
        merge_file(model, place / "lora" / "adapter.safetensors", rank=1)
    assert model.merged == []
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), small_model().parameters()))


def test_an_images_text_names_the_rank(place):
    adapters = sampling.choose_adapters([f"{place}/dylora@2:0.6", f"{place}/lora"], place / "base")
    first, second = sampling.describe_adapters(adapters).split(" + ")
    assert first.startswith("dylora/adapter.safetensors ") and first.endswith(" rank 2 x 0.6")
    assert second.startswith("lora/adapter.safetensors ") and "rank" not in second
    with pytest.raises(FileNotFoundError, match=r"no such adapter: .*absent; give PATH"):
        sampling.choose_adapters([f"{place}/absent@2"], place / "base")


def test_a_runs_file_says_its_kind_and_ranks(tmp_path):
    _, _, run, _ = short_run(tmp_path / "run", adapter="dylora", steps=2, max_rank=3, alpha=6.0)
    about = merge_file(small_model(), run.result, rank=2)
    assert (about["kind"], about["scale"], set(about["ranks"].values())) == ("dylora", 2.0, {3})
    assert "chest" not in json.dumps(about)  # no captions
