"Every notebook runs to its end: its lessons are tests, too."

import multiprocessing
import os
import signal
import sys
from pathlib import Path

import pytest

from vlkd.reproduce.run import preloaded

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = [file for folder in ("nbs", "nbs/benchmarks") for file in sorted((ROOT / folder).glob("*.ipynb"))]
SECONDS = 560
# a server without threads: what is forked of a process that has used Dask may wait for ever
server = multiprocessing.get_context("forkserver")


def execute(notebook: Path, said: Path):
    "Run a notebook as `nbdev-test` does; it imports the library anew."
    from nbdev.config import get_config
    from nbdev.test import test_nb

    signal.alarm(SECONDS)
    with open(said, "ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    inherited = [name for name in sys.modules if name.split(".")[0] == "vlkd"]
    forgotten = [sys.modules.pop(name) for name in inherited]  # kept, for what torch has registered of them
    config = get_config(ROOT)
    flags = config.tst_flags
    flags = flags.split() if isinstance(flags, str) else flags
    passed, _ = test_nb(notebook, skip_flags=flags, basepath=ROOT, cell_timeout=config.cell_timeout)
    del forgotten
    os._exit(not passed)


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda file: file.stem)
def test_notebook(notebook, tmp_path):
    server.set_forkserver_preload([*preloaded, "nbdev.test"])
    process = server.Process(target=execute, args=(notebook, tmp_path / "said"))
    process.start()
    process.join()
    assert process.exitcode == 0, (tmp_path / "said").read_text()[-5000:]
