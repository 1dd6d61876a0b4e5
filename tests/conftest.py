"Quiet, offline and single-threaded tests, with a torchvision that imports."
import os, sys
from pathlib import Path

import pytest

for k, v in dict(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", TQDM_DISABLE="1", MPLBACKEND="agg", TOKENIZERS_PARALLELISM="false").items(): os.environ.setdefault(k, v)


class MendFirst:
    "Import `vlkd.device`, which mends torchvision, just before something else imports torchvision; tests without torch never pay for it."
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if name == "torchvision" and cls in sys.meta_path:
            sys.meta_path.remove(cls)
            import vlkd.device # noqa: F401

sys.meta_path.insert(0, MendFirst)


@pytest.fixture(scope="session")
def root() -> Path:
    "The checkout."
    return Path(__file__).resolve().parent.parent


@pytest.fixture
def data() -> Path:
    "The folder of real data sets; skips where there is none."
    from vlkd.core import data_dir
    d = data_dir(need=False)
    if d is None: pytest.skip("VLKD_DATA is not set")
    return d
