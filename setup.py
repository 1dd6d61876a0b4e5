"""What pyproject.toml cannot say: wheels carry the settings, experiments and data cards of the checkout."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
SHARED = [
    "settings.ini",
    "site/conf.py",
    "site/page.js",
    "site/style.css",
    "site/tables.js",
    "data_cards",
    "nbs/experiments",
    "nbs/benchmarks",
    "recipes",
]


class BuildWithShare(build_py):
    "Copies what the library reads beside its code into vlkd/share, where `core.settings.shipped` finds it."

    def run(self):
        super().run()
        if self.editable_mode:
            return
        share = Path(self.build_lib) / "vlkd" / "share"
        shutil.rmtree(share, ignore_errors=True)
        for name in SHARED:
            source, target = ROOT / name, share / name
            target.parent.mkdir(parents=True, exist_ok=True)
            if source.is_dir():
                shutil.copytree(source, target, ignore=shutil.ignore_patterns(".*", "__pycache__"))
            elif source.is_file():
                shutil.copyfile(source, target)


setup(cmdclass={"build_py": BuildWithShare})
