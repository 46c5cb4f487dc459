"""``run:FOLDER:SPLIT``: the images of a training run's own split, selected and read as the run did.

SPLIT is a split that the run made, "train", "validation" or "test", or "held-out": all images that it did not train on.
"""

import dataclasses
from dataclasses import dataclass

from minildm.data.open import DataSettings, open_data_set
from minildm.errors import InputError
from minildm.settings import flag
from minildm.training.run import read_record

PREFIX = "run:"
READING = ("fit", "greys")  # the data settings that say how an image is read


@dataclass(frozen=True)
class RunSplit:
    records: tuple  # of the split, sorted by name
    settings: DataSettings  # the run's, without its size: metrics have their own


def is_run_split(source):
    return str(source).startswith(PREFIX)


def open_run_split(source):
    """The RunSplit that ``source`` names.

    Raises: FileNotFoundError or InputError if there is no such run or split, or where its images are gone.
    """
    folder, split = _parts(source)
    record = read_record(folder)
    splits = record.get("found", {}).get("splits")
    if not splits:
        raise InputError(f"{folder} says nothing of its splits; give run:FOLDER:SPLIT of a run of train.py")
    held_out = [name for part, names in splits.items() if part != "train" for name in names]
    choices = splits | ({"held-out": held_out} if held_out else {})
    if split not in choices:
        raise InputError(f"{source}: expected run:FOLDER:SPLIT with SPLIT one of {', '.join(choices)}")
    settings = dataclasses.replace(run_settings(record["settings"]), size=None)
    _, records = open_run_data(record["settings"], settings, sorted(choices[split]), source)
    return RunSplit(tuple(records), settings)


def open_run_data(stored, settings, names, source):
    """The data set of a run, opened again, and those of its records that have these names.

    Args: stored: the settings in the run's config.json; settings: DataSettings, the run's or with changes; names: of
        images; source: for errors.
    Returns: (DataSet, [Record]). Raises: InputError where an image is gone; what `open_data_set` raises.
    """
    data = open_data_set(stored["data"], settings, stored["seed"], stored.get("instance_prompt") is None)
    records = {one.name: one for one in data.records}
    if missing := [name for name in names if name not in records]:
        raise InputError(
            f"{len(missing):,} of the {len(names):,} images of {source} are no longer in {data.name}, such as "
            f"{missing[0]}; restore them"
        )
    return data, [records[name] for name in names]


def settings_for(sources, settings, given):
    """The data settings to read ``sources`` with: a run's ``fit`` and ``greys`` where one of them is a run's split.

    Args: settings: DataSettings of the flags; given: names of the flags on the command line.
    Raises: InputError for flags that a run's own settings take the place of, and for runs that read images differently.
    """
    runs = [source for source in sources if is_run_split(source)]
    if not runs:
        return settings
    unused = READING if len(runs) < len(sources) else [field.name for field in dataclasses.fields(DataSettings)]
    if taken := [name for name in unused if name in given and name != "size"]:
        raise InputError(f"{flag(taken[0])}: the settings of {runs[0]} are used; leave {flag(taken[0])} out")
    stored = [run_settings(read_record(_parts(source)[0])["settings"]) for source in runs]
    if len({(one.fit, one.greys) for one in stored}) > 1:
        raise InputError(f"{' and '.join(runs)} read images differently (--fit, --greys); give splits of one run")
    return dataclasses.replace(settings, fit=stored[0].fit, greys=stored[0].greys)


def _parts(source):
    """ "run:FOLDER:SPLIT" -> (FOLDER, SPLIT or "")."""
    text = str(source).removeprefix(PREFIX)
    folder, _, split = text.rpartition(":")
    return (folder, split) if folder else (text, "")


def run_settings(stored):
    """The DataSettings among the settings in a run's config.json."""
    names = {field.name for field in dataclasses.fields(DataSettings)} & {*stored}
    return DataSettings(**{name: stored[name] for name in names})
