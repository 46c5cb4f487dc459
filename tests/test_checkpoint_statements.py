"""What a checkpoint says about itself is believed, or refused in words: single files and folders."""

import dataclasses
import functools
import json
import warnings

import peers
import pytest
import torch
from peers import PARITY, assert_says, relative_error, shared_model
from safetensors.torch import load_file, save_file

import minildm
from minildm import checkpoint
from minildm.__main__ import main
from minildm.checkpoint.load import require_match
from minildm.config import ModelConfig, ScheduleConfig
from minildm.errors import InputError
from minildm.tokenizer import vocabulary_files

V = {"v_pred": torch.zeros(0)}
SPEC = "modelspec.prediction_type"
VERSIONS = pytest.mark.parametrize("v2", [False, True], ids=["v1", "v2"])


def write(state, path, metadata=None):
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, path, metadata=metadata)
    return path


def load(path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return minildm.load(path, device="cpu")


def inspect(path, prediction=None):
    """(ModelConfig, the warnings) of what `minildm.load` would load: its headers and documents."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if prediction is not None:
            config = checkpoint.inspect(path, prediction).config
        else:
            read = checkpoint.folder.read_config if path.is_dir() else checkpoint.single_file.read_config
            config = read(path if path.is_dir() else checkpoint.TensorFile(path))
    return config, [str(warning.message) for warning in caught]


@functools.cache
def state_of(v2=False):
    return peers.single_file_state(shared_model(v2))


def refusal(path):
    with pytest.raises(InputError) as error:
        inspect(path)
    return error


# --- the text encoder of a single file -------------------------------------------------------------------------------
def text_of(model, prefix="cond_stage_model.transformer."):
    return {f"{prefix}{name}": tensor for name, tensor in model.text_encoder.state_dict().items()}


def with_text(model, text):
    state = peers.single_file_state(model, extras=False)
    return {name: tensor for name, tensor in state.items() if not name.startswith("cond_stage_model.")} | text


TEXT_NAMES = {
    "transformers": lambda model: text_of(model),
    "without text_model": lambda model: {name.replace("text_model.", ""): t for name, t in text_of(model).items()},
    "sgm": lambda model: text_of(model, "conditioner.embedders.0.transformer."),
    "with projection": lambda model: (
        text_of(model)
        | {
            "cond_stage_model.transformer.text_projection.weight": torch.eye(model.config.text_encoder.width),
            "cond_stage_model.logit_scale": torch.tensor(4.6),
            "cond_stage_model.transformer.text_model.embeddings.position_ids": torch.arange(77)[None],
        }
    ),
}


@pytest.mark.parametrize("naming", TEXT_NAMES)
@VERSIONS
def test_the_version_is_told_by_shapes_whatever_the_text_encoder_is_called(v2, naming, tmp_path):
    model = shared_model(v2)
    path = write(with_text(model, TEXT_NAMES[naming](model)), tmp_path / "a.safetensors")
    loaded = load(path)
    assert loaded.config == model.config
    prompt = ["chest x-ray, age 47 male"]
    features = loaded.encode_prompt(prompt)
    reference = peers.transformers_text_encoder(model.text_encoder)
    assert relative_error(features, reference(loaded.tokenize(prompt)).last_hidden_state) < PARITY
    latents = peers.noise(1, 4, 8, 8)
    ours, usual = (one.unet(latents, torch.tensor([500]), features) for one in (loaded, model))
    torch.testing.assert_close(ours, usual, rtol=0, atol=0)


def test_sd_2_in_sgm_naming_with_open_clips_names_is_the_same_model(tmp_path):
    model, state = shared_model(v2=True), peers.single_file_state(shared_model(v2=True))
    renamed = {name.replace("cond_stage_model.", "conditioner.embedders.0."): t for name, t in state.items()}
    loaded = load(write(renamed | {"denoiser.sigmas": torch.zeros(1000)}, tmp_path / "sgm.safetensors"))
    assert loaded.config == model.config
    peers.assert_equal_weights(loaded, model)


def test_a_unet_of_one_version_with_a_text_encoder_of_the_other_is_refused(tmp_path):
    """An SD v1 U-Net with OpenCLIP's text encoder, and at true widths the other way round."""
    v1, v2 = shared_model(), shared_model(v2=True)
    open_clip = {name: t for name, t in peers.single_file_state(v2).items() if name.startswith("cond_stage_model.")}
    path = write(with_text(v1, open_clip), tmp_path / "a.safetensors")
    assert_says(refusal(path), path, "the U-Net of SD v1.x", "OpenCLIP")


def test_an_sd_2_file_with_all_24_layers_under_transformers_names_uses_23(tmp_path):
    """At the published sizes: the header alone is looked at."""
    networks, last = checkpoint.build_networks(peers.SD21), "text_model.encoder.layers."
    text = {name: tensor.shape for name, tensor in networks["text_encoder"].state_dict().items()}
    text |= {name.replace(f"{last}22.", f"{last}23."): shape for name, shape in text.items()}
    path = peers.published(
        peers.SD21,
        tmp_path / "a.safetensors",
        metadata={SPEC: "v"},
        rename=lambda name: name.replace("cond_stage_model.model.", "model_ema."),
        extra=[(f"cond_stage_model.transformer.{name}", shape) for name, shape in text.items()],
    )
    plan = checkpoint.inspect(path)
    assert plan.config == peers.SD21
    require_match(plan, {network: module.state_dict() for network, module in plan.networks.items()})


# --- what the U-Net predicts, and the schedule -----------------------------------------------------------------------
@pytest.mark.parametrize(
    "extra, metadata, prediction",
    [
        (V, {}, "v"),
        ({}, {SPEC: "v"}, "v"),
        ({}, {SPEC: "V_Prediction"}, "v"),
        ({}, {SPEC: "epsilon"}, "epsilon"),
        ({}, {"modelspec.predict_key": "v"}, "v"),  # ComfyUI's
        ({}, {"modelspec.predict_key": "epsilon"}, "epsilon"),
        ({}, {"modelspec.architecture": "stable-diffusion-v2-768-v"}, "v"),
        (V, {SPEC: "v", "modelspec.predict_key": "v"}, "v"),
        ({}, {"modelspec.title": "v", "format": "pt"}, None),
    ],
)
@VERSIONS
def test_a_stated_prediction_is_believed(v2, extra, metadata, prediction, tmp_path):
    path = write(state_of(v2) | extra, tmp_path / "a.safetensors", metadata)
    config, said = inspect(path)
    assert config.schedule.prediction == (prediction or "epsilon")
    assert [("does not say" in one) for one in said] == [True] * (v2 and prediction is None)
    assert config.image_size == (768 if v2 and prediction == "v" else 512)


@pytest.mark.parametrize(
    "extra, metadata",
    [({}, {SPEC: "v-zsnr"}), (V, {SPEC: "epsilon"}), ({}, {SPEC: "v", "modelspec.predict_key": "eps"})],
)
def test_a_contradiction_is_refused_unless_the_user_decides(extra, metadata, tmp_path):
    path = write(state_of() | extra, tmp_path / "a.safetensors", metadata)
    assert_says(refusal(path), path, SPEC, "expected epsilon or v", "--prediction")
    assert inspect(path, prediction="v")[0].schedule.prediction == "v"


@pytest.mark.parametrize("stated", ["epsilon", "v"])
def test_a_flag_against_what_the_files_say_is_warned_of_by_name(stated, tmp_path):
    model, other = shared_model(), {"v": "epsilon", "epsilon": "v"}[stated]
    single = write(peers.single_file_state(model), tmp_path / "a.safetensors", {SPEC: stated})
    folder = peers.write_folder(model, tmp_path / "folder")
    kind = {"v": "v_prediction", "epsilon": "epsilon"}
    peers.edit_json(folder / "scheduler" / "scheduler_config.json", prediction_type=kind[stated])
    for path in (single, folder):
        config, said = inspect(path, prediction=other)
        assert config.schedule.prediction == other and len(said) == 1
        assert_says(said[0], f"--prediction {other} overrides {path}", f"predicts {stated}", "noise")
        assert inspect(path, prediction=stated)[1] == inspect(path)[1] == []


def test_stated_pixels_are_believed(tmp_path):
    for text, pixels in (("768x768", 768), ("640", 640), ("768x512", 512), ("7x7", 512), ("many", 512), ("0", 512)):
        path = write(state_of(), tmp_path / "a.safetensors", {"modelspec.resolution": text})
        assert inspect(path)[0].image_size == pixels


def test_zero_terminal_snr_is_believed_from_its_mark_and_from_the_table(tmp_path):
    state, rescaled = (state_of(), minildm.schedule.NoiseSchedule("v", zero_terminal_snr=True))
    for marks in (V | {"ztsnr": torch.zeros(0)}, V | {"alphas_cumprod": rescaled.alphas_cumprod.half()}):
        config, said = inspect(write(state | marks, tmp_path / "a.safetensors"))
        assert config.schedule == ScheduleConfig(prediction="v", zero_terminal_snr=True,
                                                        timestep_spacing="trailing")  # fmt: skip
        assert minildm.schedule.NoiseSchedule(**dataclasses.asdict(config.schedule)).alpha_bar[-1] == 0 and said == []
    assert_says(refusal(write(state | {"ztsnr": torch.zeros(0)}, tmp_path / "a.safetensors")), "v-prediction")


@pytest.mark.parametrize(
    "table, warns",
    [
        (lambda usual: usual.half(), False),
        (lambda usual: usual.bfloat16().float() * 0 + usual, False),
        (lambda usual: usual * 0.9, True),
        (lambda usual: usual * float("nan"), True),
        (lambda usual: usual[:10], False),
        (lambda usual: torch.zeros(1000, dtype=torch.int64), False),
    ],
)
def test_another_table_is_warned_of_and_not_used(table, warns, tmp_path):
    state = state_of()
    state["alphas_cumprod"] = table(state["alphas_cumprod"])
    config, said = inspect(write(state, tmp_path / "a.safetensors"))
    assert config.schedule == ScheduleConfig()
    assert [("another noise schedule" in one) for one in said] == [True] * warns


def test_clip_skip_is_warned_of(tmp_path):
    for layer, warns in (("1", False), ("2", True)):
        metadata = {"modelspec.encoder_layer": layer}
        _, said = inspect(write(state_of(), tmp_path / "a.safetensors", metadata))
        assert [("clip skip" in one) for one in said] == [True] * warns


def test_info_names_what_states_the_prediction_and_the_size(tmp_path, capsys):
    metadata = {"modelspec.predict_key": "v", "modelspec.resolution": "640x640"}
    path = write(state_of() | V, tmp_path / "a.safetensors", metadata)
    assert main(["info", str(path)]) == 0
    said = capsys.readouterr().out
    assert "prediction: v (the tensor v_pred and modelspec.predict_key)" in said
    assert "640 px (modelspec.resolution)" in said


# --- a folder's scheduler --------------------------------------------------------------------------------------------
def folder_with(tmp_path, removed=(), **scheduler):
    folder = peers.write_folder(shared_model(), tmp_path / "model")
    file = folder / "scheduler" / "scheduler_config.json"
    document = json.loads(file.read_text()) | scheduler
    file.write_text(json.dumps({key: value for key, value in document.items() if key not in removed}))
    return folder


@pytest.mark.parametrize("sampler", ["ddim", "ddpm", "plms"])
@pytest.mark.parametrize(
    "changes, removed",
    [
        ({"beta_schedule": "linear", "beta_start": 0.0001, "beta_end": 0.02}, ()),
        ({}, ("beta_schedule", "beta_start", "beta_end")),  # diffusers' default: linear, 0.0001 to 0.02
        ({"timestep_spacing": "trailing"}, ()),
        ({"timestep_spacing": "linspace"}, ()),
        ({"num_train_timesteps": 500}, ()),
        ({"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}, ()),
    ],
    ids=["linear", "no betas", "trailing", "linspace", "500", "zero SNR"],
)
def test_sampling_follows_the_scheduler_file_as_diffusers_does(changes, removed, sampler, tmp_path):
    import diffusers

    if sampler == "plms" and "rescale_betas_zero_snr" in changes:
        pytest.skip("diffusers' PNDM cannot rescale its betas")
    folder = folder_with(tmp_path, removed, **changes)
    config, said = inspect(folder)
    assert said == []
    kinds = {"ddim": "DDIMScheduler", "ddpm": "DDPMScheduler", "plms": "PNDMScheduler"}
    scheduler = getattr(diffusers, kinds[sampler]).from_pretrained(folder, subfolder="scheduler")
    schedule = minildm.schedule.NoiseSchedule(**dataclasses.asdict(config.schedule))
    for steps in (1, 3, 7, 20):
        scheduler.set_timesteps(steps)
        calls, latents = [], peers.noise(1, 4, 8, 8)

        def denoise(noisy, t, calls=calls):
            calls.append(t)
            return torch.tanh(0.7 * noisy) + 0.001 * t

        def no_noise():
            return torch.zeros(1, 4, 8, 8)

        *_, ours = minildm.samplers.SAMPLERS[sampler](denoise, latents, schedule, steps, no_noise)
        assert calls == scheduler.timesteps.tolist()
        if sampler == "ddpm":
            continue  # diffusers draws its own noise
        theirs = latents
        for t in scheduler.timesteps:
            theirs = scheduler.step(torch.tanh(0.7 * theirs) + 0.001 * t, t, theirs).prev_sample
        assert relative_error(ours, theirs) < 1e-4


@pytest.mark.parametrize(
    "name",
    ["DDIMScheduler", "EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler", "DPMSolverMultistepScheduler",
     "UniPCMultistepScheduler", "HeunDiscreteScheduler", "KDPM2DiscreteScheduler", "LMSDiscreteScheduler"],
)  # fmt: skip
def test_a_scheduler_of_another_class_is_read_as_diffusers_saves_it(name, tmp_path):
    import diffusers

    folder = peers.write_folder(shared_model(), tmp_path / "model")
    base = diffusers.PNDMScheduler.from_pretrained(folder, subfolder="scheduler").config
    getattr(diffusers, name).from_config(base).save_pretrained(folder / "scheduler")
    config, said = inspect(folder)
    assert config.schedule == ScheduleConfig() and said == []
    getattr(diffusers, name)(beta_start=0.001).save_pretrained(folder / "scheduler")  # with its own defaults
    schedule = inspect(folder)[0].schedule
    reference = getattr(diffusers, name)(beta_start=0.001)
    ours = minildm.schedule.NoiseSchedule(**dataclasses.asdict(schedule))
    torch.testing.assert_close(ours.alphas_cumprod, reference.alphas_cumprod, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "name",
    ["FlowMatchEulerDiscreteScheduler", "LCMScheduler", "TCDScheduler", "EDMEulerScheduler", "KarrasVeScheduler"],
)
def test_a_scheduler_that_needs_its_own_sampler_is_refused_by_name(name, tmp_path):
    assert_says(refusal(folder_with(tmp_path, _class_name=name)), "scheduler_config.json", name, "sampler")


@pytest.mark.parametrize("changes", [{"thresholding": True}, {"set_alpha_to_one": True}])
def test_what_no_sampler_here_does_is_warned_of(changes, tmp_path):
    _, said = inspect(folder_with(tmp_path, **changes))
    assert len(said) == 1 and next(iter(changes)) in said[0]


def test_what_is_saved_states_the_schedule_again(tmp_path):
    tiny = ModelConfig.tiny(v2=True)
    for i, schedule in enumerate(
        (
            ScheduleConfig(prediction="v", zero_terminal_snr=True, timestep_spacing="trailing"),
            ScheduleConfig(1000, 0.0001, 0.02, beta_schedule="linear", timestep_spacing="linspace"),
            ScheduleConfig(),
        )
    ):
        config = dataclasses.replace(tiny, schedule=schedule)
        folder = peers.write_folder(peers.random_model(config), tmp_path / str(i))
        assert inspect(folder)[0].schedule == schedule


# --- a folder's other parts ------------------------------------------------------------------------------------------
def enlarged(tensor, n=1):
    return torch.cat([tensor, tensor[:n]])


def test_tokens_beyond_clips_are_warned_of(tmp_path):
    model = shared_model()
    single = peers.single_file_state(model)
    name = "cond_stage_model.transformer.text_model.embeddings.token_embedding.weight"
    single[name] = enlarged(single[name], 2)
    _, said = inspect(write(single, tmp_path / "a.safetensors"))
    assert len(said) == 1
    assert_says(said[0], tmp_path / "a.safetensors", "2 tokens beyond CLIP's", "textual inversion")
    words = {"<cat>": 49408}
    documents = {
        "added_tokens.json": words,
        "tokenizer_config.json": {"added_tokens_decoder": {"49408": {"content": "<cat>"}, "0": {"content": "!"}}},
        "vocab.json": json.loads(vocabulary_files()["vocab.json"]) | words,
        "tokenizer.json": {
            "added_tokens": [{"id": 49408, "content": "<cat>"}, {"id": 49407, "content": "<|endoftext|>"}],
            "model": {
                "vocab": json.loads(vocabulary_files()["vocab.json"]),
                "merges": vocabulary_files()["merges.txt"].split("\n")[1:-1],
            },
        },
    }
    for i, (file, document) in enumerate(documents.items()):
        folder = peers.write_folder(model, tmp_path / str(i))
        for known, text in vocabulary_files().items():
            (folder / "tokenizer" / known).write_text(text, encoding="utf-8")
        assert inspect(folder)[1] == []
        (folder / "tokenizer" / file).write_text(json.dumps(document))
        _, said = inspect(folder)
        assert len(said) == 1
        assert_says(said[0], folder, "1 token beyond CLIP's (<cat>)")
    file = folder / "text_encoder" / "model.safetensors"
    state = load_file(file)
    name = name.removeprefix("cond_stage_model.transformer.")
    save_file(state | {name: enlarged(state[name])}, file)
    with pytest.raises(InputError, match=r"1 of another shape.*49409"):
        load(folder)
    peers.edit_json(folder / "text_encoder" / "config.json", vocab_size=49409)
    assert_says(inspect(folder)[1][0], "1 token beyond CLIP's (<cat>)")


def exchanged(vocabulary):
    first, second, *_ = vocabulary
    return vocabulary | {first: vocabulary[second], second: vocabulary[first]}


@pytest.mark.parametrize(
    "file, content, says",
    [
        ("vocab.json", lambda files: json.dumps(exchanged(json.loads(files["vocab.json"]))), "not CLIP's vocabulary"),
        ("vocab.json", lambda files: "{}", "not CLIP's vocabulary"),
        ("vocab.json", lambda files: "[1]", "holds a list"),
        ("merges.txt", lambda files: files["merges.txt"].replace("i n\nt h", "t h\ni n"), "splits words otherwise"),
        ("merges.txt", lambda files: "", "splits words otherwise"),
        ("merges.txt", lambda files: b"\xff\xfe", "not UTF-8"),
        ("tokenizer.json", lambda files: '{"model": {"vocab": {"a": 0}, "merges": []}}', "splits words otherwise"),
        ("tokenizer.json", lambda files: '{"model": 3}', "splits words otherwise"),
        ("tokenizer_config.json", lambda files: '{"tokenizer_class": "T5Tokenizer"}', "'T5Tokenizer'"),
        ("tokenizer_config.json", lambda files: '{"tokenizer_class": ["a"]}', "['a']"),
        ("special_tokens_map.json", lambda files: '{"pad_token": ["a"]}', "pad_token is ['a']"),
        ("added_tokens.json", lambda files: "3", "holds a int"),
    ],
)
def test_another_tokenizer_is_refused(file, content, says, tmp_path):
    folder = peers.write_folder(shared_model(), tmp_path / "model")
    data = content(vocabulary_files())
    (folder / "tokenizer" / file).write_bytes(data if isinstance(data, bytes) else data.encode())
    assert_says(refusal(folder), folder / "tokenizer" / file, says)


@pytest.mark.parametrize(
    "index, says",
    [
        ({"text_encoder": ["transformers", "T5EncoderModel"]}, "T5EncoderModel"),
        ({"unet": ["diffusers", "UNet2DModel"]}, "UNet2DModel"),
        ({"vae": ["diffusers", "AsymmetricAutoencoderKL"]}, "AsymmetricAutoencoderKL"),
        ({"tokenizer": ["transformers", ["a"]]}, "['a']"),
    ],
)
def test_an_index_that_names_other_networks_is_refused(index, says, tmp_path):
    folder = peers.write_folder(shared_model(), tmp_path / "model")
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionPipeline"} | index))
    assert_says(refusal(folder), "model_index.json", says)


def test_a_pipeline_with_other_parts_is_warned_of(tmp_path):
    folder = peers.write_folder(shared_model(), tmp_path / "model")
    index = {
        "_class_name": "StableDiffusionControlNetPipeline",
        "controlnet": ["diffusers", "ControlNetModel"],
        "safety_checker": [None, None],
        "requires_safety_checker": False,
    }
    (folder / "model_index.json").write_text(json.dumps(index))
    _, said = inspect(folder)
    assert len(said) == 1
    assert_says(said[0], "StableDiffusionControlNetPipeline", "controlnet")


def test_an_unknown_key_of_a_config_is_warned_of_by_name(tmp_path):
    folder = peers.write_folder(shared_model(), tmp_path / "model")
    peers.edit_json(folder / "unet" / "config.json", some_gate=0.5, nothing=None, off=False, _name_or_path="x")
    _, said = inspect(folder)
    assert len(said) == 1 and "some_gate = 0.5" in said[0] and "nothing" not in said[0]
