"""Settings and fixtures shared by the tests."""

import os
from pathlib import Path

import pytest

# Tiny networks gain nothing from threads; on a busy machine they were five times as slow with them.
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session")
def shared_data():
    """The folder of real sample images, which cannot be part of the repository: the one named by MINILDM_SHARED_DATA,
    else shared/data beside the repository."""
    beside = Path(__file__).resolve().parent.parent.parent / "shared" / "data"
    folder = Path(os.environ.get("MINILDM_SHARED_DATA", beside))
    if not folder.is_dir():
        pytest.skip(f"no real sample images at {folder}; set MINILDM_SHARED_DATA to their folder")
    return folder
