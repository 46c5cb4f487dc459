"""``python -m minildm fetch NAME``: published weights into the folder where everything else looks for them.

Which they are and where they come from is in published.py. The server says how large the files are, what their hashes
are (its own LFS or git metadata) and under which licence; download.py gets them. The folder ``.fetch`` beside the
results holds unfinished files, and for each name a receipt: sizes, times and hashes of what was fetched. By it a second
run sees at once, and without a connection, that all is there.
"""

import json
import os
import re
import shlex
import shutil
from dataclasses import dataclass
from pathlib import Path

from minildm.download import TIMEOUT, RemoteFile, bytes_present, content_digest, download, human, reason_of, refusal
from minildm.errors import InputError
from minildm.files import read_json, writable_folder, written_beside
from minildm.loading import find_base, find_weights, folder_for_weights, weights_folders
from minildm.published import CATALOGUE, SHA256
from minildm.settings import Parser

HASH = re.compile("[0-9a-f]{40}([0-9a-f]{24})?")  # SHA-1 or SHA-256


@dataclass(frozen=True)
class Offer:
    """What a source offers at present."""

    source: object
    files: tuple  # of RemoteFile
    revision: str
    licence: str
    page: str  # where the licence can be read
    headers: dict  # of requests: a user's token


class Unavailable(Exception):
    """A source cannot be used; the message says why in a few words."""


# --- asking the server -----------------------------------------------------------------------------------------------
def find_offer(name, folder):
    """The Offer of the first usable source of ``name``. Raises InputError, with the reasons, if there is none."""
    weights, reasons = CATALOGUE[name], {}
    for source in weights.sources:
        try:
            return ask(source, weights)
        except Unavailable as error:
            reasons.setdefault(str(error), {})[source.repository] = None
    tried = "; ".join(f"{', '.join(repositories)}: {reason}" for reason, repositories in reasons.items())
    first = weights.sources[0]
    what = ", ".join(dict.fromkeys(file.split("/")[0] for file in first.files))
    where = shown(folder / first.target)
    raise InputError(
        f"cannot fetch {name}: {tried}; by hand: get {what} of {first.repository} "
        f"{'on Hugging Face ' if not first.url else ''}and put {'them into' if first.is_folder else 'it at'} {where}"
    )


def ask(source, weights):
    """The Offer of one source. Raises Unavailable."""
    if source.url:
        if reason := refusal(source.url):
            raise Unavailable(reason)
        file = RemoteFile(source.url, weights.size, SHA256[source.target], source.target)
        return Offer(source, (file,), "", weights.licence, source.url.partition("/releases/")[0], {})
    from huggingface_hub import HfApi, hf_hub_url  # takes a second, and only this needs it
    from huggingface_hub.utils import build_hf_headers

    api = HfApi()
    page = f"{api.endpoint}/{source.repository}"
    try:
        info = api.model_info(source.repository, files_metadata=True, timeout=TIMEOUT)
    except Exception as error:  # which network library's depends on the version of huggingface_hub
        raise Unavailable(_hub_refusal(error, page, api.endpoint)) from None
    offered = {file.rfilename: file for file in info.siblings or ()}
    files = []
    for path in source.files:
        if path not in offered:
            raise Unavailable(f"has no {path}")
        digest = offered[path].lfs.sha256 if offered[path].lfs else offered[path].blob_id
        name = f"{source.target}/{path}" if source.is_folder else source.target
        if digest is None or offered[path].size is None:
            raise Unavailable(f"states no hash and size of {path}")
        if digest != SHA256.get(name, digest):
            raise Unavailable(f"{path} has SHA-256 {digest[:16]}, the published file {SHA256[name][:16]}")
        url = hf_hub_url(info.id, path, revision=info.sha, endpoint=api.endpoint)
        files.append(RemoteFile(url, offered[path].size, digest, name))
    try:  # anyone may read about a gated repository; only a file's own address says whether it can be had
        api.get_hf_file_metadata(url=max(files, key=lambda file: file.size).url, timeout=TIMEOUT)
    except Exception as error:
        raise Unavailable(_hub_refusal(error, page, api.endpoint)) from None
    licence = getattr(info.card_data, "license_name", None) or getattr(info.card_data, "license", None)
    return Offer(source, tuple(files), info.sha, licence or weights.licence, page, build_hf_headers())


def _hub_refusal(error, page, endpoint):
    """Why huggingface_hub cannot read a repository, in a few words."""
    from huggingface_hub import errors

    if isinstance(error, errors.GatedRepoError):  # a kind of RepositoryNotFoundError
        return f"is gated: accept its licence at {page}, then log in (hf auth login) or set HF_TOKEN"
    if isinstance(error, errors.RepositoryNotFoundError):
        return "is not there (withdrawn, renamed or private)"
    if isinstance(error, errors.HfHubHTTPError):
        status = error.response.status_code
        said = error.server_message or error.response.headers.get("X-Error-Message") or ""
        token = "; check HF_TOKEN, or log in again (hf auth login)" if status in (401, 403) else ""
        return f"HTTP {status} {said}".strip() + token
    if isinstance(error, errors.OfflineModeIsEnabled):
        return "no connection, as HF_HUB_OFFLINE is set"
    return f"no connection to {endpoint} ({reason_of(error)})"


# --- what is there ---------------------------------------------------------------------------------------------------
def find_there(name, folders):
    """(folder, source) of the first of ``folders`` that holds ``name``, or None. Says nothing about its content."""
    for folder in folders:
        for source in CATALOGUE[name].sources:
            if (folder / source.target).exists():
                return folder, source
    return None


def read_receipt(path):
    """What `write_receipt` wrote; {} if there is none, or if it is damaged: what it would say is found out again."""
    try:
        receipt = read_json(path)
        files = receipt["files"].values()
        whole = all(HASH.fullmatch(entry["digest"]) and type(entry["size"]) is int for entry in files)
    except (FileNotFoundError, InputError, LookupError, TypeError, AttributeError):
        return {}
    return receipt if whole else {}


def check_there(name, folder, source):
    """Check that ``name`` in ``folder`` is what it should be: by receipt, else a documented hash, else the server's.

    Raises: InputError if it is not, or if that cannot be told.
    """
    receipt = read_receipt(folder / ".fetch" / f"{name}.json")
    expected = receipt.get("files", {}) if receipt.get("target") == source.target else {}
    if not expected and source.target in SHA256:
        expected = {source.target: {"digest": SHA256[source.target]}}
    if not expected:
        try:
            offer = ask(source, CATALOGUE[name])
        except Unavailable as error:
            raise InputError(
                f"{folder / source.target} is there, but cannot be checked: {source.repository}: {error}; run the "
                "command again later, or use it as it is"
            ) from None
        expected = {file.name: {"digest": file.digest, "size": file.size} for file in offer.files}
    for file, entry in expected.items():
        path = folder / file
        if not path.is_file():
            _not_it(name, folder, source, f"no file {path}")
        state = path.stat()
        if entry.get("size", state.st_size) != state.st_size:
            _not_it(name, folder, source, f"{file} has {state.st_size:,} bytes, expected {entry['size']:,}")
        if entry.get("time") != state.st_mtime_ns and content_digest(path, entry["digest"], file) != entry["digest"]:
            _not_it(name, folder, source, f"the hash of {file} is not {entry['digest'][:16]}")
    if os.access(folder, os.W_OK):
        write_receipt(name, folder, source, receipt, {file: entry["digest"] for file, entry in expected.items()})


def _not_it(name, folder, source, reason):
    path = folder / source.target
    raise InputError(f"{path} is not the {name} of {source.repository} ({reason}); move it away or give another --out")


def write_receipt(name, folder, source, about, digests):
    """Note what ``name`` consists of. Args: digests: {file: hash}; about: revision and licence, if known."""
    files = {}
    for file, digest in digests.items():
        state = (folder / file).stat()
        files[file] = {"size": state.st_size, "time": state.st_mtime_ns, "digest": digest}
    facts = {"revision": about.get("revision"), "licence": about.get("licence")}
    receipt = {"repository": source.repository, "target": source.target, **facts, "files": files}
    (folder / ".fetch").mkdir(exist_ok=True)
    with written_beside(folder / ".fetch" / f"{name}.json") as path:
        path.write_text(json.dumps(receipt, indent=1) + "\n", encoding="utf-8")


# --- getting it ------------------------------------------------------------------------------------------------------
def describe(name, offer):
    """Print what is about to be fetched, from where and under which licence."""
    revision = f", revision {offer.revision[:10]}" if offer.revision else ""
    print(f"{name}: {CATALOGUE[name].title}, from {offer.source.repository}{revision}")
    print(f"  licence: {offer.licence}; whoever uses the weights accepts it: {offer.page}")
    for file in offer.files:
        print(f"  {file.name}  {human(file.size)}  {'SHA-256' if len(file.digest) == 64 else 'git'} {file.digest[:16]}")


def check_space(offers, folder):
    """Print how much is still to be downloaded; raise InputError if the disk has less room.

    Args: offers: {name: Offer}.
    """
    needed = 0
    for name, offer in offers.items():
        work = folder / ".fetch" / name
        for file in offer.files:
            needed += 0 if (work / file.name).is_file() else file.size - bytes_present(file, work)
    existing = next(parent for parent in (folder, *folder.parents) if parent.is_dir())
    free = shutil.disk_usage(existing).free
    if needed > free:
        raise InputError(
            f"{folder} needs room for {human(needed)}, {human(free)} are free; make room or give another --out"
        )
    print(f"to download: {human(needed)}, into {shown(folder)} ({human(free)} free)")


def get(name, offer, folder):
    """Download an Offer into ``folder``; the result appears there whole or not at all. Returns its path."""
    work, target = folder / ".fetch" / name, folder / offer.source.target
    work.mkdir(parents=True, exist_ok=True)
    for file in offer.files:
        place = work / file.name  # where it waits, whole and checked, until all of a folder's files are there
        if place.is_file() and content_digest(place, file.digest, file.name) != file.digest:
            place.unlink()  # of another revision
        if not place.is_file():
            download(file, place, work, offer.headers)
    target.parent.mkdir(parents=True, exist_ok=True)
    os.replace(work / offer.source.target, target)
    about = {"revision": offer.revision, "licence": offer.licence}
    write_receipt(name, folder, offer.source, about, {file.name: file.digest for file in offer.files})
    shutil.rmtree(work)
    return target


def next_command(name, path, source):
    """A command that uses what was fetched, naming it where it would not be found."""
    weights = CATALOGUE[name]
    if weights.is_base:
        try:
            found = find_base() == path
        except (InputError, FileNotFoundError):  # several base models, for instance
            found = False
    else:
        found = weights.found and find_weights(source.target) == path
    return weights.command + source.flags + ("" if found else " " + weights.flag.format(shlex.quote(shown(path))))


def shown(path):
    """A path as short as it can be typed."""
    path, here = Path(path), Path.cwd()
    return str(path.relative_to(here) if path.is_relative_to(here) else path)


# --- the command -----------------------------------------------------------------------------------------------------
def main(argv):
    parser = Parser(prog="python -m minildm fetch", description="Get published weights.")
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help=f"{', '.join(CATALOGUE)}; none: list them, with size and licence"
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FOLDER",
        help="folder to put them into (default: MINILDM_WEIGHTS, weights/ here or the repository's: the first that "
        "exists and can be written to, so that they are found without being named)",
    )
    parser.add_argument("--dry-run", action="store_true", help="say what would be fetched, and stop")
    arguments = parser.parse_args(argv)
    folders = weights_folders() if arguments.out is None else [arguments.out.absolute()]
    folder = folder_for_weights() if arguments.out is None else folders[0]
    if unknown := [name for name in arguments.names if name not in CATALOGUE]:
        raise InputError(f"cannot fetch {', '.join(unknown)}; choose from {', '.join(CATALOGUE)}")
    if not arguments.names:
        return show_list(folder, folders)

    done, offers = {}, {}
    for name in dict.fromkeys(arguments.names):
        if there := find_there(name, folders):
            check_there(name, *there)
            done[name] = there[0] / there[1].target, there[1]
            print(f"{name}: already there, and checked: {shown(done[name][0])}")
        else:
            offers[name] = find_offer(name, folder)
            describe(name, offers[name])
    if offers:
        check_space(offers, folder)
        if arguments.dry_run:
            return 0
        writable_folder(folder)
    for name, offer in offers.items():
        done[name] = get(name, offer, folder), offer.source
        print(f"{name}: fetched and checked: {shown(done[name][0])}")
    print("next:")
    for name, (path, source) in done.items():
        print(f"  {next_command(name, path, source)}")
    return 0


def show_list(folder, folders):
    """Print a line for each name: size, licence, title, and what is there of it."""
    width = max(map(len, CATALOGUE))
    for name, weights in CATALOGUE.items():
        unfinished = sum(path.stat().st_size for path in (folder / ".fetch" / name).rglob("*") if path.is_file())
        if there := find_there(name, folders):
            state = shown(there[0] / there[1].target)
        else:
            state = f"{human(unfinished)} of it in {shown(folder / '.fetch' / name)}" if unfinished else "not there"
        print(f"{name:<{width}}  {human(weights.size):>9}  {weights.licence:<21}  {weights.title}: {state}")
    print(f"\npython -m minildm fetch NAME ... puts them into {shown(folder)}")
    return 0
