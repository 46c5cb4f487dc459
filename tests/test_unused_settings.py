"""A setting that would change nothing is refused, or a warning names it: none is accepted and ignored."""

import dataclasses

import pytest
from made_runs import short_run, small_model

from minildm import sampling
from minildm.adapters import METHODS
from minildm.errors import InputError
from minildm.metrics.extractors import FeatureSettings, feature_settings
from minildm.pretraining import command as pretraining
from minildm.settings import Parser, add_flags, flag
from minildm.tools.shrink import main as shrink
from minildm.training.command_line import parse


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--lr", "0"], "--lr 0 trains nothing"),
        (["--max-rank", "3", "--rank", "4"], "--max-rank must be at least --rank"),
        (["--samples", "3", "--sample-interval", "0"], "--samples would change nothing.*--sample-interval"),
        (["--validation-pairs", "9", "--split", "80/20"], "--validation-pairs would change nothing.*--split 80/20"),
        (["--validation-interval", "9", "--split", "80/20"], "--validation-interval would change nothing"),
        (["--targets", "unet", "--text-encoder-rate", "0.1"], "--text-encoder-rate would change nothing.*--targets"),
        (["--adapter", "full", "--text-encoder-rate", "0.1"], "--text-encoder-rate would change nothing.*--targets"),
        (["--micro-batch", "9", "--batch-size", "8"], "--micro-batch 9 is more than --batch-size 8"),
    ],
)
def test_a_setting_that_would_change_nothing_is_refused_by_name(flags, words):
    with pytest.raises(InputError, match=words):
        parse(["--preset", "tiny", *flags])


@pytest.mark.parametrize("name", METHODS)
def test_every_setting_of_another_method_is_refused_by_name(name):
    ours = {field.name for field in dataclasses.fields(METHODS[name].settings_class)}
    others = {field.name for method in METHODS.values() for field in dataclasses.fields(method.settings_class)} - ours
    assert others
    for other in others:
        for words in ([flag(other), "1"], [f"{flag(other)}=1"]):
            with pytest.raises(InputError, match=rf"{flag(other)} is a setting of --adapter .*, not of {name}"):
                parse(["--preset", "tiny", "--adapter", name, *words])


def test_a_preset_of_another_method_says_which_of_its_settings_do_not_apply():
    with pytest.warns(UserWarning, match="selora-iu also sets --expand-interval, --expand-threshold, which"):
        parse(["--preset", "selora-iu", "--adapter", "lora"])


def test_class_images_that_have_no_weight_are_warned_of():
    flags = ["--instance-prompt", "a", "--class-prompt", "b", "--class-images", "9", "--prior-weight", "0"]
    with pytest.warns(UserWarning, match="--class-images 9 are not used: --prior-weight 0"):
        parse(flags)


def test_defaults_and_presets_are_no_flags_on_the_command_line():
    parser = Parser(prog="x")
    parser.add_argument("image", nargs="?")
    add_flags(parser, FeatureSettings, "features")
    parser.set_defaults(features="random", other=1)
    assert parser.given([]) == {}
    assert parser.given(["a.png", "--seed", "0"]) == {"image": "a.png", "seed": 0}
    assert parser.parse_args([]).features == "random" and parser.parse_args([]).other == 1


@pytest.mark.parametrize(
    "given, words",
    [
        (["--features", "random", "--weights", "x"], "--weights is for --features inception"),
        (["--clip-model", "ViT-B-32"], "--clip-model is for --features clip"),
        (["--features", "clip", "--base", "x"], "--base is for --features vae"),
        (["--features", "x.pt", "--clip-pretrained", "x"], "--clip-pretrained is for --features clip"),
        (["--features", "vae", "--dims", "64"], "--dims is for .*; vae has one depth only"),
    ],
)
def test_settings_of_other_features_are_refused_by_name(given, words):
    parser = Parser(prog="fid")
    add_flags(parser, FeatureSettings, "features")
    parser.add_argument("--dims", type=int, nargs="+", default=[2048])
    with pytest.raises(InputError, match=words):
        feature_settings(parser, given)
    parser.set_defaults(features="random")  # as where no Inception weights are found
    assert feature_settings(parser, ["--weights", "x"]).features == "inception"


def test_limits_below_what_a_method_starts_with_are_refused_before_it_changes_the_model():
    model = small_model()
    settings = METHODS["selora"].settings_class(rank=2, max_parameters=5)
    for begin in (METHODS["selora"].check_fit, lambda model, settings: METHODS["selora"](model, settings, 100, 0)):
        with pytest.raises(InputError, match=r"--max-parameters 5 is less than .* at the start, [\d,]+ at rank 2"):
            begin(model, settings)
    assert not any("lora" in name for name, _ in model.named_parameters())


def test_the_limit_of_parameters_may_be_what_a_method_starts_with():
    model, settings = small_model(), METHODS["selora"].settings_class(rank=2, max_parameters=5)
    with pytest.raises(InputError) as error:
        METHODS["selora"].check_fit(model, settings)
    least = int(str(error.value).partition("at the start, ")[2].split()[0].replace(",", ""))
    with pytest.raises(InputError, match="--max-parameters"):
        METHODS["selora"].check_fit(model, dataclasses.replace(settings, max_parameters=least - 1))
    exact = dataclasses.replace(settings, max_parameters=least)
    method = METHODS["selora"](model, exact, 100, 0)
    assert sum(layer.n_parameters() for layer in method.layers.values()) == least


@pytest.mark.parametrize("name, rank", [("lora", "rank"), ("adalora", "init_rank"), ("dylora", "max_rank")])
def test_ranks_that_do_not_fit_the_model_are_refused_before_any_image_is_read(name, rank):
    with pytest.raises(InputError, match=r"rank must be in \[1, \d+\] for unet\..*got 1000"):
        METHODS[name].check_fit(small_model(), METHODS[name].settings_class(**{rank: 1000}))


def test_a_run_too_short_to_grow_or_to_warm_up_says_so(tmp_path, capsys):
    with pytest.warns(UserWarning, match="--expand-interval 40 is more than the 2 steps"):
        short_run(tmp_path / "run", steps=2, expand_interval=40, warmup=2, validation=0)
    assert "--warmup 2 is not over after the 2 steps" in capsys.readouterr().out


def test_an_empty_prompt_is_warned_of():
    with pytest.warns(UserWarning, match="prompt is empty"):
        sampling.check_request(["chest x-ray", " "], "", 1, 0)


def test_shrink_refuses_a_multiplier_it_would_ignore():
    for adapter in ("run/a:0.5", "run/a@2"):
        with pytest.raises(InputError, match="taken as it is, without a multiplier or rank; give run/a"):
            shrink([adapter, "--rank", "1"])


@pytest.mark.parametrize("stage", ["", "vae-", "text-", "decoder-"])
def test_a_learning_rate_of_0_is_refused_for_each_stage_of_pretraining(stage):
    with pytest.raises(InputError, match=f"--{stage}lr 0 trains nothing"):
        pretraining.parse([f"--{stage}lr", "0"])
