"Quiet, offline and single-threaded tests, with a torchvision that imports."

import os
import signal
from pathlib import Path

import pytest
from toys import forked, quick, toy  # noqa: F401  (fixtures)

QUIET = dict(
    OMP_NUM_THREADS="1",
    HF_HUB_OFFLINE="1",
    HF_HUB_DISABLE_PROGRESS_BARS="1",
    TQDM_DISABLE="1",
    MPLBACKEND="agg",
    TOKENIZERS_PARALLELISM="false",
)


def pytest_configure():
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    # a background job of a shell starts with SIGINT ignored, which what the tests interrupt would inherit
    signal.signal(signal.SIGINT, signal.default_int_handler)
    from vlkd.core.device import mend_torchvision

    mend_torchvision()  # before a test imports what imports torchvision


FIRST = "distributed cluster unbreakable training reproduce losses extract".split()


def pytest_collection_modifyitems(items):
    "The files that take long begin first."

    def rank(item):
        name = item.path.stem.removeprefix("test_")
        return FIRST.index(name) if name in FIRST else len(FIRST)

    items.sort(key=rank)


@pytest.fixture(scope="session")
def root() -> Path:
    "The checkout."
    return Path(__file__).resolve().parent.parent


@pytest.fixture
def data() -> Path:
    "The folder of real data sets; skips where there is none."
    from vlkd.core.settings import data_dir

    folder = data_dir(need=False)
    if folder is None:
        pytest.skip("VLKD_DATA is not set")
    return folder
