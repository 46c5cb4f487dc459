"""Fixtures that several test files use."""

import os
from pathlib import Path

import pytest

# Tiny networks gain nothing from threads, and on a busy machine wait for each other: seen to take five times as long.
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session")
def shared_data():
    """The folder of real samples, which cannot be part of the repository. Named by MINILDM_SHARED_DATA, or
    shared/data beside the repository."""
    beside = Path(__file__).resolve().parent.parent.parent / "shared" / "data"
    folder = Path(os.environ.get("MINILDM_SHARED_DATA", beside))
    if not folder.is_dir():
        pytest.skip(f"the real samples are not at {folder}; MINILDM_SHARED_DATA can name another place")
    return folder
