"The wheel works outside a checkout, and the tests of the source distribution collect."

import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest

from vlkd.data.video import write_mp4

ROOT = Path(__file__).resolve().parent.parent
BUILD = "from setuptools import build_meta; print(build_meta.build_{}('dist'))"
SKIPPED = shutil.ignore_patterns(
    ".git", ".venv", "runs", "build", "dist", "*.egg-info", "__pycache__", "latest"
)


def call(command, cwd, **env):
    here = {k: v for k, v in os.environ.items() if not k.startswith("VLKD_")} | env
    done = subprocess.run(command, cwd=cwd, env=here, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    "A copy of the checkout, in which nothing was built."
    folder = tmp_path_factory.mktemp("package") / "source"
    shutil.copytree(ROOT, folder, ignore=SKIPPED, symlinks=True)
    return folder


def built(source, kind) -> Path:
    printed = call([sys.executable, "-c", BUILD.format(kind)], source)
    return source / "dist" / printed.splitlines()[-1]


@pytest.fixture(scope="module")
def installed(source):
    "A folder that holds nothing but the installed wheel."
    target = source.parent / "site-packages"
    pip = [sys.executable, "-m", "pip", "install", "-qq", "--no-deps", "--target", str(target)]
    call([*pip, str(built(source, "wheel"))], source.parent)
    return target


@pytest.fixture
def vlkd(installed, tmp_path):
    "Run a command of the installed library in an empty folder."

    def run(*args):
        code = "from vlkd.tools.cli import main; main()"
        return call([sys.executable, "-c", code, *args], tmp_path, PYTHONPATH=str(installed))

    return run


def test_reproduction_is_planned(vlkd, tmp_path):
    printed = vlkd("reproduce", "all", "--scale", "smoke", "--dry-run")
    assert "m5@1: would run: never run" in printed
    assert list(tmp_path.iterdir()) == []


def test_a_report_goes_below_the_working_folder(vlkd, installed, tmp_path):
    assert "nothing to report" in vlkd("report")
    code = "from vlkd.core.settings import path; print(path('runs'), path('reports'), path('nbs'))"
    runs, reports, nbs = call([sys.executable, "-c", code], tmp_path, PYTHONPATH=str(installed)).split()
    assert (Path(runs), Path(reports)) == (tmp_path / "runs", tmp_path / "reports")
    assert Path(nbs) == installed / "vlkd" / "share" / "nbs"


def test_data_and_costs(vlkd):
    assert "tabletop" in vlkd("data", "status")
    assert "student nst+crd" in vlkd("cost", "--scale", "micro", "--gpus", "1")


def test_features_of_a_video(vlkd, tmp_path):
    write_mp4(tmp_path / "clip.mp4", np.zeros((8, 32, 32, 3), np.uint8), 8)
    assert "1 videos" in vlkd("extract", "clip.mp4", "--out", "shards", "--frames", "grid", "--workers", "1")


@pytest.mark.slow
def test_tests_of_the_source_distribution_collect(source):
    with tarfile.open(built(source, "sdist")) as archive:
        archive.extractall(source.parent / "sdist", filter="data")
    (unpacked,) = (source.parent / "sdist").iterdir()
    some = "settings_agree or name_says or knows_its_targets"
    printed = call([sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", some], unpacked)
    assert "error" not in printed.splitlines()[-1]
