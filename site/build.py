"""Build the web site: README, results, notebooks and API. Usage: python site/build.py [OUT]"""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGES = ["README.md", "CONTRIBUTING.md", "LICENSE", "settings.ini", "constraints.txt", "CITATION.cff"]
FOLDERS = ["reports", "data_cards", "recipes"]
NOT_SHOWN = re.compile(r"^#\| *(hide|default_exp)\b", re.M)


def copy_notebooks(source: Path, target: Path):
    "Copy notebooks without the cells and lines that only nbdev reads."
    shutil.copytree(source, target, ignore=shutil.ignore_patterns(".*"))
    for file in target.rglob("*.ipynb"):
        notebook = json.loads(file.read_text(encoding="utf-8"))
        shown = []
        for cell in notebook["cells"]:
            text = "".join(cell["source"])
            if cell["cell_type"] != "code" or not NOT_SHOWN.search(text):
                cell["source"] = re.sub(r"^#\|.*\n", "", text, flags=re.M)
                shown.append(cell)
        file.write_text(json.dumps(notebook | {"cells": shown}), encoding="utf-8")


def stage(source: Path):
    "Make a folder of everything that the site shows: copies, since Sphinx follows no page's link out of it."
    shutil.rmtree(source, ignore_errors=True)
    (source / "api").mkdir(parents=True)
    for page in [*(ROOT / name for name in PAGES), *(ROOT / "site").glob("*.md")]:
        shutil.copy2(page, source)
    (source / "site").mkdir()
    for picture in (ROOT / "site").glob("*.png"):
        shutil.copy2(picture, source / "site")
    for name in FOLDERS:
        shutil.copytree(ROOT / name, source / name)
    copy_notebooks(ROOT / "nbs", source / "nbs")


def build(out: Path):
    source = ROOT / "build" / "site-source"
    stage(source)
    command = [sys.executable, "-m", "sphinx", "-q", "-j", "auto", "-c", str(ROOT / "site")]
    command += ["-d", str(ROOT / "build" / "doctrees")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([*command, str(source), str(out)], check=True, env=environment)
    print(f"site: {out / 'index.html'}")


if __name__ == "__main__":
    build(Path(sys.argv[1]).resolve() if len(sys.argv) > 1 else ROOT / "build" / "site")
