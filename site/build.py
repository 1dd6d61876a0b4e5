"""Build the web site: README, results, notebooks and API. Usage: python site/build.py [OUT]"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGES = ["README.md", "CONTRIBUTING.md", "LICENSE", "settings.ini", "constraints.txt", "CITATION.cff"]
FOLDERS = ["nbs", "reports", "data_cards", "recipes"]


def stage(source: Path):
    "Make a folder of links to everything that the site shows."
    shutil.rmtree(source, ignore_errors=True)
    (source / "api").mkdir(parents=True)
    for name in PAGES + FOLDERS:
        (source / name).symlink_to(ROOT / name)
    for page in (ROOT / "site").glob("*.md"):
        (source / page.name).symlink_to(page)


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
