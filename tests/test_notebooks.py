"Every notebook runs to its end: its lessons are tests, too."

import os
import sys
from pathlib import Path

import pytest
from processes import forked

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = [file for folder in ("nbs", "nbs/benchmarks") for file in sorted((ROOT / folder).glob("*.ipynb"))]


def execute(notebook: Path):
    "Run a notebook as `nbdev-test` does; it imports the library anew."
    from nbdev.config import get_config
    from nbdev.test import test_nb

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
    said = tmp_path / "said"
    assert forked(lambda: execute(notebook), output=said, seconds=560) == 0, said.read_text()[-5000:]
