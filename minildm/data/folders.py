"""Finding files: what is no part of a data set (its one definition), links to folders, names with accents."""

import os
import unicodedata
from pathlib import Path

from minildm.errors import InputError
from minildm.files import shown

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".webp", ".dcm", ".dicom")
# Besides hidden names (.DS_Store, ._0001.png, .ipynb_checkpoints): what Windows, macOS, Synology, QNAP and Linux leave.
LEFT_BEHIND = frozenset(
    (
        *("thumbs.db", "ehthumbs.db", "desktop.ini", "$recycle.bin", "system volume information"),
        *("__macosx", "icon\r", "@eadir", "@tmp", "@recycle", "@recently-snapshot", "#recycle", "#snapshot"),
        *("lost+found", "__pycache__"),
    )
)


def is_left_behind(name):
    """Whether a file or folder of this name was left by a system or program and is no part of a data set."""
    return name.startswith(".") or name.lower() in LEFT_BEHIND


def walk(root):
    """Yield (folder, names of its files) of ``root`` and all folders below it, sorted, without what is left behind.

    Links to folders are followed after all real folders, and no folder is visited twice: a link that leads back ends
    there, and images that are reached by two ways count once. All that is no folder is a file, also a broken link.

    Raises: InputError for a folder that cannot be listed, whose images would be lost.
    """
    folders, links, visited = [Path(root)], [], set()
    while folders or links:
        folder = folders.pop() if folders else links.pop(0)
        try:
            status = os.stat(folder)
            entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
        except OSError as error:
            reason = f"cannot be listed ({error.strerror}), its images would be lost; make it readable or remove it"
            raise InputError(f"{shown(folder)}: {reason}") from None
        if (status.st_dev, status.st_ino) in visited:
            continue
        visited.add((status.st_dev, status.st_ino))
        names, below = [], []
        for entry in entries:
            if is_left_behind(entry.name):
                continue
            if not os.path.isdir(entry.path):
                names.append(entry.name)
            elif entry.is_symlink():
                links.append(folder / entry.name)
            else:
                below.append(folder / entry.name)
        folders += reversed(below)
        yield folder, names


def paths_below(root, *suffixes):
    """The paths of all files below ``root`` whose names end in one of the (lower-case) suffixes, sorted."""
    return sorted(folder / name for folder, names in walk(root) for name in names if name.lower().endswith(suffixes))


def files_below(root, *suffixes):
    """{file name: path} of the files of `paths_below`, names in composed form (NFC).

    Published zip files unpack to different depths, but their file names are unique.
    """
    paths = {}
    for path in paths_below(root, *suffixes):
        paths.setdefault(composed(path.name), path)
    return paths


def record_name(path, root):
    """The name of an image found below ``root``: one text on every machine, which can be printed and written."""
    return shown(composed(os.path.relpath(path, root).replace(os.sep, "/")))


def composed(name):
    """One form of a name with accents (NFC), which macOS and some zip programs store as letter and accent (NFD)."""
    return unicodedata.normalize("NFC", name)


class Finder:
    """Finds files below a folder by the names that tables give them. Each folder is listed once."""

    def __init__(self, root):
        self.root = Path(root)
        self.names = {}  # folder -> {composed name: name}

    def find(self, name):
        """The path of the file that a table calls ``name``; if there is none, the path where it should be.

        A name may be written with Windows' backslashes, and with accents in either form.
        """
        if "\\" in name and not os.path.lexists(self.root / name):
            name = name.replace("\\", "/")
        path = self.root
        for part in Path(name).parts:
            path = path / (part if part == os.sep or part == ".." else self._as_stored(path, part))
        return path

    def _as_stored(self, folder, name):
        if folder not in self.names:
            try:
                self.names[folder] = {composed(stored): stored for stored in os.listdir(folder)}
                self.names[folder] |= {stored: stored for stored in self.names[folder].values()}
            except (OSError, ValueError):
                self.names[folder] = {}
        return self.names[folder].get(name) or self.names[folder].get(composed(name), name)


def outside(paths, root):
    """Those of the ``paths``, built from a table's texts, that lie outside ``root`` by their words: "../", or absolute.

    Links are not followed here: whoever put a link into the folder wants what it leads to.
    """
    inside, climbs = os.path.join(os.path.abspath(root), ""), Path(root).parts.count("..")
    return [path for path in paths if path.parts.count("..") > climbs or not os.path.abspath(path).startswith(inside)]


def not_found(root, looked_for):
    """The InputError for a folder that does not hold the data set: what was expected and what is there."""
    names = [shown(name) for name in sorted(os.listdir(root))]
    listed = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
    return InputError(f"{root} does not hold {looked_for}; it holds {listed or 'nothing'}")
