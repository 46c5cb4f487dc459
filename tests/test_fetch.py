"""``python -m minildm fetch`` against a small hub on 127.0.0.1: whole, cut, refused, damaged, and there already."""

import dataclasses
import errno
import hashlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hub_server import TOKEN, Hub
from peers import assert_says, random_model, single_file_config, write_folder

from minildm import checkpoint, download, loading
from minildm.__main__ import main
from minildm.download import human
from minildm.errors import InputError
from minildm.files import UMASK
from minildm.loading import find_base, find_weights
from minildm.metrics import extractors
from minildm.metrics.inception import WEIGHTS_NAME
from minildm.published import CATALOGUE, DIFFUSERS_FILES, SHA256
from minildm.tokenizer import vocabulary_files

ROOT = Path(__file__).resolve().parent.parent
SD15 = "v1-5-pruned-emaonly.safetensors"
PUBLISHER, ARCHIVE = (source.repository for source in CATALOGUE["sd15"].sources)
SD21, VAE = CATALOGUE["sd21"].sources[0].repository, CATALOGUE["vae-mse"].sources[0].repository


def content(n=50_000, seed=0):
    return random.Random(seed).randbytes(n)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """The servers, offering SD v1.5 (50 kB of noise) and the autoencoder; a current folder with an empty weights/."""
    import huggingface_hub.constants as constants

    hub = Hub()
    hub.repositories[PUBLISHER] = {SD15: content(), "README.md": b"card"}
    hub.licences[PUBLISHER] = {"license": "creativeml-openrail-m"}
    hub.repositories[VAE] = {"config.json": b"{}", "diffusion_pytorch_model.safetensors": content(seed=1)}
    template = hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)  # what HF_ENDPOINT sets when the library is imported
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "MINILDM_WEIGHTS", "http_proxy", "HTTP_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setitem(SHA256, SD15, hashlib.sha256(content()).hexdigest())
    monkeypatch.setattr(download, "PAUSE", 0)
    monkeypatch.setattr(download, "CHUNK", 1000)
    monkeypatch.setattr(loading, "WEIGHTS", tmp_path / "repository" / "weights")
    monkeypatch.setattr(loading, "PACKAGE", tmp_path / "package")
    (tmp_path / "here" / "weights").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here")
    yield hub
    hub.close()


def fails(*arguments):
    with pytest.raises(InputError) as caught:
        main(["fetch", *arguments])
    return caught


def unfinished():
    return sorted(Path("weights/.fetch").rglob("*.part"))


# --- whole -----------------------------------------------------------------------------------------------------------
def test_a_file_arrives_whole_with_its_licence_and_the_command_that_uses_it(hub, capsys):
    assert main(["fetch", "sd15"]) == 0
    assert Path("weights", SD15).read_bytes() == content() and find_base() == Path("weights", SD15).absolute()
    assert not unfinished() and os.listdir("weights/.fetch") == ["sd15.json"]
    out = capsys.readouterr().out
    for part in ("creativeml-openrail-m", f"{hub.endpoint}/{PUBLISHER}", "50.00 kB", SHA256[SD15][:16]):
        assert part in out
    assert out.endswith('next:\n  python sample.py "chest x-ray, age 47 male"\n')
    assert os.stat(Path("weights", SD15)).st_mode & 0o777 == 0o666 & ~UMASK


def test_a_second_run_asks_for_nothing(hub, capsys):
    main(["fetch", "sd15", "vae-mse"])
    hub.requests.clear()
    assert main(["fetch", "sd15", "vae-mse"]) == 0
    assert not hub.requests and capsys.readouterr().out.count("already there, and checked") == 2


def test_a_folder_appears_only_when_all_of_it_is_there(hub, capsys):
    del hub.repositories[VAE]["config.json"]
    assert_says(fails("vae-mse"), VAE, "has no config.json", "by hand")
    hub.repositories[VAE]["config.json"] = b"{}"
    hub.cuts = [None, 10_000, 0, 0, 0, 0, 0]  # config.json whole; then the weights break off, and nothing more comes
    assert_says(fails("vae-mse"), "10.00 kB of 50.00 kB are kept", "the same command continues")
    assert sorted(os.listdir("weights")) == [".fetch"]
    hub.requests.clear()
    assert main(["fetch", "vae-mse"]) == 0
    assert hub.ranges_asked() == ["bytes=10000-"]
    assert Path("weights/sd-vae-ft-mse/config.json").read_bytes() == b"{}"
    assert Path("weights/sd-vae-ft-mse/diffusion_pytorch_model.safetensors").read_bytes() == content(seed=1)
    assert "--vae weights/sd-vae-ft-mse" in capsys.readouterr().out


def test_what_is_fetched_as_a_folder_loads_and_predicts_v_without_a_flag(hub, tmp_path, capsys):
    model = random_model(single_file_config(v2=True))
    folder = write_folder(model, tmp_path / "model")
    state = {path: (folder / path).read_bytes() for path in DIFFUSERS_FILES if (folder / path).is_file()}
    scheduler = json.loads(state["scheduler/scheduler_config.json"]) | {"prediction_type": "v_prediction"}
    state["scheduler/scheduler_config.json"] = json.dumps(scheduler).encode()
    state |= {f"tokenizer/{name}": text.encode() for name, text in vocabulary_files(pad_token_id=0).items()}
    hub.repositories[SD21] = {path: state.get(path, b"{}") for path in DIFFUSERS_FILES}
    hub.repositories[SD21]["unet/diffusion_pytorch_model.fp16.safetensors"] = b"not asked for"
    assert main(["fetch", "sd21"]) == 0
    plan = checkpoint.inspect(find_base())
    assert plan.path.name == "stable-diffusion-2-1" and plan.config.schedule.prediction == "v"
    assert capsys.readouterr().out.endswith('sample.py "chest x-ray, age 47 male"\n')
    assert {str(path.relative_to(plan.path)) for path in plan.path.rglob("*.*")} == set(DIFFUSERS_FILES)


def test_several_names_are_fetched_together_and_each_base_is_then_named(hub, capsys, monkeypatch):
    hub.repositories["CompVis/stable-diffusion-v-1-4-original"] = {"sd-v1-4.ckpt": content(seed=2)}
    monkeypatch.setitem(SHA256, "sd-v1-4.ckpt", hashlib.sha256(content(seed=2)).hexdigest())
    assert main(["fetch", "sd15", "sd14", "sd15"]) == 0
    out = capsys.readouterr().out
    assert "to download: 100.00 kB" in out
    assert f"--base weights/{SD15}\n" in out and "--base weights/sd-v1-4.ckpt\n" in out


def test_another_folder_can_be_named_and_is_named_again_in_the_next_command(hub, capsys):
    assert main(["fetch", "sd15", "--out", "else where/deep"]) == 0
    assert Path("else where/deep", SD15).read_bytes() == content() and not os.listdir("weights")
    assert f"--base 'else where/deep/{SD15}'\n" in capsys.readouterr().out


def test_a_dry_run_downloads_and_creates_nothing(hub, capsys):
    assert main(["fetch", "sd15", "--out", "new", "--dry-run"]) == 0
    assert not Path("new").exists() and not hub.ranges_asked()
    assert "to download: 50.00 kB, into new" in capsys.readouterr().out


def test_the_list_says_what_there_is_without_a_connection(hub, capsys):
    main(["fetch", "sd15"])
    hub.cuts = [None, 7_000, 0, 0, 0, 0, 0]
    fails("vae-mse")
    hub.requests.clear()
    capsys.readouterr()
    assert main(["fetch"]) == 0 and not hub.requests
    lines = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines() if line)
    assert set(CATALOGUE) <= set(lines)
    assert lines["sd15"].startswith("4.27 GB  CreativeML OpenRAIL-M") and lines["sd15"].endswith(f"weights/{SD15}")
    assert "7.00 kB of it in weights/.fetch/vae-mse" in lines["vae-mse"] and lines["clip"].endswith("not there")


# --- cut, and continued ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("cuts", [[1], [999], [1000, 1], [20_000, 0, 0, 0, 15_000, 14_999]])
def test_after_a_cut_only_the_rest_is_asked_for(hub, cuts):
    hub.cuts = list(cuts)
    main(["fetch", "sd15"])
    expected, have = [], 0
    for cut in (*cuts, None):
        expected.append(f"bytes={have}-" if have else None)
        have += cut or 0
    assert hub.ranges_asked() == expected and Path("weights", SD15).read_bytes() == content()


def test_a_later_run_goes_on_where_the_connection_was_lost_even_from_another_source(hub):
    hub.cuts = [30_000, 0, 0, 0, 0, 0]
    assert_says(fails("sd15"), "no connection to 127.0.0.1", "30.00 kB of 50.00 kB", *unfinished())
    hub.requests.clear()
    hub.repositories[ARCHIVE] = hub.repositories.pop(PUBLISHER)
    main(["fetch", "sd15"])
    assert hub.ranges_asked() == ["bytes=30000-"] and Path("weights", SD15).read_bytes() == content()


def test_a_server_that_ignores_ranges_sends_the_file_from_its_beginning(hub):
    hub.ranges, hub.cuts = False, [30_000]
    main(["fetch", "sd15"])
    assert Path("weights", SD15).read_bytes() == content()
    shutil.rmtree("weights")
    hub.cuts = [30_000] * 20  # each time no further than before: given up, not repeated for ever
    assert_says(fails("sd15"), "the same command continues")
    assert len(hub.cuts) == 20 - 1 - download.ATTEMPTS  # the first brought something


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_busy_server_is_asked_again(hub, status):
    hub.statuses = [status] * (download.ATTEMPTS - 1)
    main(["fetch", "sd15"])
    assert Path("weights", SD15).read_bytes() == content()


def test_a_partial_file_that_is_too_long_is_begun_again(hub):
    hub.cuts = [30_000, 0, 0, 0, 0, 0]
    fails("sd15")
    (part,) = unfinished()
    part.write_bytes(content(60_000, seed=3))
    main(["fetch", "sd15"])
    assert Path("weights", SD15).read_bytes() == content()


def test_ctrl_c_keeps_what_has_come_and_a_second_call_continues(hub, tmp_path):
    """The real command, with HF_ENDPOINT; the server sends half the file and then nothing."""
    half = hub.stall = len(content()) // 2
    environment = os.environ | {"HF_ENDPOINT": hub.endpoint, "PYTHONPATH": str(ROOT), "HF_HOME": str(tmp_path / "hf")}
    code = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # background jobs ignore SIGINT
    code += f"from minildm import download, published; published.SHA256[{SD15!r}] = {SHA256[SD15]!r}\n"
    code += "download.TIMEOUT = 600\n"  # on a busy machine the second process may take longer than the usual 30 s
    code += "from minildm.__main__ import exit_cleanly, main; exit_cleanly(main, ['fetch', 'sd15', '--out', 'weights'])"
    process = subprocess.Popen([sys.executable, "-c", code], env=environment, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 300
    while not (unfinished() and unfinished()[0].stat().st_size == half):
        assert time.monotonic() < deadline and process.poll() is None, process.communicate()
        time.sleep(0.02)
    second = subprocess.Popen([sys.executable, "-c", code], env=environment, stderr=subprocess.PIPE, text=True)
    assert "another process is downloading" in second.communicate()[1] and second.returncode == 2
    process.send_signal(signal.SIGINT)
    error = process.communicate()[1]
    hub.stall = None
    assert process.returncode == 130 and "Traceback" not in error
    assert re.search(r"25\.00 kB of 50\.00 kB are kept in \S+\.part; the same command continues\ninterrupted\n$", error)
    assert not Path("weights", SD15).exists()
    hub.requests.clear()
    main(["fetch", "sd15"])
    assert hub.ranges_asked() == [f"bytes={half}-"] and Path("weights", SD15).read_bytes() == content()


# --- refused ---------------------------------------------------------------------------------------------------------
def test_damaged_content_is_deleted_and_refused(hub):
    hub.damage = lambda data: data[:100] + bytes([data[100] ^ 1]) + data[101:] if len(data) > 100 else data
    assert_says(fails("sd15"), SD15, "damaged", SHA256[SD15][:16], "run the same command again")
    assert os.listdir("weights") == [".fetch"] and not unfinished()
    hub.damage = lambda data: data
    assert main(["fetch", "sd15"]) == 0


def test_a_damaged_small_file_is_refused_by_its_git_hash(hub):
    hub.damage = lambda data: b"[]" if data == b"{}" else data
    assert_says(fails("vae-mse"), "config.json", "damaged")
    assert os.listdir("weights") == [".fetch"] and not unfinished()


def test_a_file_that_is_not_the_documented_one_is_not_downloaded(hub):
    hub.repositories[PUBLISHER][SD15] = content(seed=9)
    found, wanted = hashlib.sha256(content(seed=9)).hexdigest()[:16], SHA256[SD15][:16]
    assert_says(fails("sd15"), PUBLISHER, found, wanted)
    assert not hub.ranges_asked()
    hub.repositories[ARCHIVE] = {SD15: content()}
    assert main(["fetch", "sd15"]) == 0


def test_sources_that_are_gone_are_named_with_what_to_do_by_hand(hub, capsys):
    del hub.repositories[PUBLISHER]
    error = fails("sd15")
    assert_says(error, f"{PUBLISHER}, {ARCHIVE}: is not there", "by hand", f"get {SD15} of {PUBLISHER} on Hugging Face")
    assert_says(error, f"weights/{SD15}")
    hub.repositories[ARCHIVE] = {SD15: content()}
    assert main(["fetch", "sd15"]) == 0
    assert f"from {ARCHIVE}" in capsys.readouterr().out


def test_a_gated_source_says_where_to_accept_and_how_to_log_in(hub, monkeypatch):
    hub.gated.add(PUBLISHER)
    assert_says(fails("sd15"), "gated", f"{hub.endpoint}/{PUBLISHER}", "hf auth login", "HF_TOKEN")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert main(["fetch", "sd15"]) == 0
    told = {
        server for server, _, _, headers in hub.requests if "Authorization" in headers or "authorization" in headers
    }
    assert told == {"hub"} and any(server == "cdn" for server, *_ in hub.requests)


def test_the_token_goes_along_with_redirects_on_the_same_server(hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    main(["fetch", "vae-mse"])
    (small,) = [headers for server, _, path, headers in hub.requests if path.startswith("/raw/") and server == "hub"]
    assert small["Authorization"] == f"Bearer {TOKEN}"


def test_the_next_source_is_tried_when_one_is_gated(hub):
    hub.gated.add(PUBLISHER)
    hub.repositories[ARCHIVE] = {SD15: content()}
    assert main(["fetch", "sd15"]) == 0


def test_without_a_server_it_says_which_file_to_put_where(hub, monkeypatch):
    import huggingface_hub.constants as constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert_says(fails("sd15"), "no connection to http://127.0.0.1:9", f"get {SD15}", f"weights/{SD15}")
    assert_says(fails("sd21"), "unet", "scheduler", "put them into weights/stable-diffusion-2-1")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert_says(fails("sd15"), "HF_HUB_OFFLINE is set", f"get {SD15}")


def test_a_full_disk_is_noticed_before_anything_is_downloaded(hub, monkeypatch):
    usage = shutil.disk_usage(".")._replace(free=49_999)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    assert_says(fails("sd15"), "50.00 kB", "50.00 kB are free", "--out")
    assert not hub.ranges_asked()
    hub.cuts = [10_000, 0, 0, 0, 0, 0]
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=50_000))
    fails("sd15")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=40_000))  # enough for what is missing
    assert main(["fetch", "sd15"]) == 0


def test_a_disk_that_fills_up_on_the_way_keeps_what_has_come(hub, monkeypatch):
    real, written = download._write, []

    def write(output, chunk, file):
        room = 20_000 - sum(written)
        written.append(len(chunk))
        real(output, chunk[:room], file)
        if len(chunk) > room:
            real(Full(output), chunk[room:], file)

    with monkeypatch.context() as patch:
        patch.setattr(download, "_write", write)
        assert_says(fails("sd15"), "No space left on device", "20.00 kB of 50.00 kB are kept", "free some space")
    hub.requests.clear()
    main(["fetch", "sd15"])
    assert hub.ranges_asked() == ["bytes=20000-"]


class Full:
    def __init__(self, output):
        self.output, self.name, self.seek = output, output.name, output.seek

    def write(self, _):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_unknown_names_and_folders_that_cannot_be_written_to_are_refused(hub):
    assert_says(fails("sd15", "sd3"), "cannot fetch sd3", "sd21-base", "inception")
    Path("file").touch()
    with pytest.raises(NotADirectoryError) as caught:
        main(["fetch", "sd15", "--out", "file"])
    assert_says(caught, "file", "--out")
    assert not hub.ranges_asked()


# --- there already ---------------------------------------------------------------------------------------------------
def test_a_file_put_there_by_hand_is_checked_and_kept(hub):
    Path("weights", SD15).write_bytes(content())
    assert main(["fetch", "sd15"]) == 0 and not hub.requests  # its hash is documented
    Path("weights/sd-vae-ft-mse").mkdir()
    for name, data in hub.repositories[VAE].items():
        Path("weights/sd-vae-ft-mse", name).write_bytes(data)
    assert main(["fetch", "vae-mse"]) == 0 and not hub.ranges_asked()  # the server was asked for the hash only


@pytest.mark.parametrize("change", ["shorter", "same size", "gone"])
def test_something_else_under_the_name_is_refused_and_left_alone(hub, change):
    main(["fetch", "vae-mse"])
    path = Path("weights/sd-vae-ft-mse/diffusion_pytorch_model.safetensors")
    if change == "gone":
        path.unlink()
    else:
        path.write_bytes(content(49_999 if change == "shorter" else 50_000, seed=5))
    hub.requests.clear()
    assert_says(fails("vae-mse"), "weights/sd-vae-ft-mse is not the vae-mse", "move it away", path.name)
    assert not hub.requests and path.exists() == (change != "gone")


def test_a_copied_folder_is_checked_by_hash_because_its_times_are_new(hub):
    main(["fetch", "vae-mse"])
    shutil.copytree("weights", "copy", copy_function=shutil.copyfile)
    hub.requests.clear()
    assert main(["fetch", "vae-mse", "--out", "copy"]) == 0 and not hub.requests


def test_what_cannot_be_checked_is_said(hub, monkeypatch):
    import huggingface_hub.constants as constants

    Path("weights/sd-vae-ft-mse").mkdir()
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert_says(fails("vae-mse"), "weights/sd-vae-ft-mse is there, but cannot be checked", "no connection")


def test_weights_in_any_folder_that_is_searched_count_as_there(hub, tmp_path, monkeypatch, capsys):
    loading.WEIGHTS.mkdir(parents=True)
    (loading.WEIGHTS / SD15).write_bytes(content())
    assert main(["fetch", "sd15"]) == 0 and not hub.requests
    assert str(loading.WEIGHTS / SD15) in capsys.readouterr().out


def test_the_folder_is_the_first_that_exists_and_can_be_written_to(hub, tmp_path, monkeypatch):
    assert loading.folder_for_weights() == Path("weights").absolute()
    shutil.rmtree("weights")
    assert loading.folder_for_weights() == Path("weights").absolute()
    loading.WEIGHTS.mkdir(parents=True)
    loading.PACKAGE.mkdir(parents=True)
    assert loading.folder_for_weights() == loading.WEIGHTS
    (tmp_path / "named").mkdir()
    monkeypatch.setenv("MINILDM_WEIGHTS", str(tmp_path / "named"))
    assert loading.folder_for_weights() == tmp_path / "named"
    monkeypatch.setattr(os, "access", lambda path, mode: path == loading.PACKAGE)
    assert loading.folder_for_weights() == Path("weights").absolute()


# --- the metrics' networks -------------------------------------------------------------------------------------------
def test_the_inception_file_comes_from_its_own_address_and_is_found_by_fid(hub, monkeypatch, capsys):
    hub.repositories["raw/file"] = {WEIGHTS_NAME: content()}
    weights = CATALOGUE["inception"]
    source = dataclasses.replace(weights.sources[0], url=f"{hub.cdn}/raw/raw/file/{WEIGHTS_NAME}")
    monkeypatch.setitem(CATALOGUE, "inception", dataclasses.replace(weights, sources=(source,), size=50_000))
    monkeypatch.setitem(SHA256, WEIGHTS_NAME, hashlib.sha256(content()).hexdigest())
    hub.cuts = [0, 20_000]  # the first is for the question whether it is there
    assert main(["fetch", "inception"]) == 0
    assert hub.ranges_asked() == [None, None, "bytes=20000-"]
    assert find_weights(WEIGHTS_NAME).read_bytes() == content()
    assert capsys.readouterr().out.endswith("python -m minildm fid REAL FAKE\n")


@pytest.mark.parametrize(("address", "reason"), [("{}/nothing", "HTTP 404"), ("http://127.0.0.1:9/x", "no connection")])
def test_an_inception_file_that_cannot_be_had_is_one_line(hub, monkeypatch, address, reason):
    weights = CATALOGUE["inception"]
    source = dataclasses.replace(weights.sources[0], url=address.format(hub.cdn))
    monkeypatch.setitem(CATALOGUE, "inception", dataclasses.replace(weights, sources=(source,)))
    assert_says(fails("inception"), "mseitzer/pytorch-fid", reason, f"get {WEIGHTS_NAME}", f"weights/{WEIGHTS_NAME}")


def test_a_fetched_clip_is_used_for_its_tag_with_the_activation_of_the_tag(hub, monkeypatch):
    """ViT-L-14 is too large for a test: a small network's weights stand in for ViT-B-32's."""
    import open_clip
    import torch
    from safetensors.torch import save_file

    monkeypatch.setattr(open_clip, "list_pretrained_tags_by_model", lambda _: ["openai"])
    monkeypatch.setattr(open_clip, "get_pretrained_cfg", lambda *_: {"quick_gelu": True})
    model = open_clip.create_model("ViT-S-32-alt", force_quick_gelu=True)
    Path("weights/clip").mkdir()
    save_file(model.state_dict(), Path("weights", extractors.clip_file("ViT-S-32-alt", "openai")))
    loaded, _, _ = extractors.load_clip("ViT-S-32-alt", "openai")
    images = torch.rand(1, 3, 224, 224)
    with torch.no_grad():
        torch.testing.assert_close(loaded.encode_image(images), model.eval().encode_image(images))


# --- what is written down twice --------------------------------------------------------------------------------------
def test_documented_hashes_and_repositories_are_those_of_the_code():
    text = (ROOT / "weights" / "README.md").read_text(encoding="utf-8")
    for file, digest in SHA256.items():
        assert file == WEIGHTS_NAME or (f"| `{file}` " in text and digest in text)
    for name, weights in CATALOGUE.items():
        assert f"`{name}`" in text
        assert all(source.repository in text for source in weights.sources[:1]), name


def test_clip_repositories_are_those_of_open_clips_tags():
    from open_clip.pretrained import get_pretrained_cfg

    for name, model in (("clip", "ViT-L-14"), ("clip-336", "ViT-L-14-336")):
        (source,) = CATALOGUE[name].sources
        assert get_pretrained_cfg(model, "openai")["hf_hub"].strip("/") == source.repository
        assert source.target == f"clip/{model}-openai.safetensors"


def test_sizes_are_decimal():
    sizes = [0, 999, 1000, 95_628_359, 4_265_146_304, 10**15]
    assert [human(size) for size in sizes] == ["0 bytes", "999 bytes", "1.00 kB", "95.63 MB", "4.27 GB", "1000.00 TB"]


def test_importing_the_command_does_not_import_the_hub_library():
    code = "import minildm.fetch, sys; assert 'huggingface_hub' not in sys.modules and 'open_clip' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
