"Quiet, offline and single-threaded tests, with a torchvision that imports."

import os
import signal
from pathlib import Path

import pytest

for k, v in dict(
    OMP_NUM_THREADS="1",
    HF_HUB_OFFLINE="1",
    HF_HUB_DISABLE_PROGRESS_BARS="1",
    TQDM_DISABLE="1",
    MPLBACKEND="agg",
    TOKENIZERS_PARALLELISM="false",
).items():
    os.environ.setdefault(k, v)
signal.signal(
    signal.SIGINT, signal.default_int_handler
)  # a background job of a shell is started with SIGINT ignored, and would hand that on to what the tests interrupt


import vlkd


@pytest.fixture(scope="session")
def root() -> Path:
    "The checkout."
    return Path(__file__).resolve().parent.parent


@pytest.fixture
def data() -> Path:
    "The folder of real data sets; skips where there is none."
    from vlkd.core.settings import data_dir

    d = data_dir(need=False)
    if d is None:
        pytest.skip("VLKD_DATA is not set")
    return d
