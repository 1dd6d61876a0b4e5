"The examples of CONTRIBUTING.md run as they are printed."

import re
from pathlib import Path

import pytest

PAGE = Path(__file__).resolve().parent.parent / "CONTRIBUTING.md"


def examples():
    "Python blocks of each route, in the order of the page."
    routes = PAGE.read_text(encoding="utf-8").split("## Four routes")[1].split("\n## ")[0]
    for section in routes.split("\n### ")[1:]:
        title = section.split("\n")[0]
        blocks = re.findall(r"^```python\n(.*?)^```", section, re.S | re.M)
        if blocks:
            yield pytest.param("\n".join(blocks), id=title)


@pytest.mark.parametrize("code", examples())
def test_route(code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("VLKD_RUNS", str(tmp_path / "runs"))
    exec(compile(code, str(PAGE), "exec"), {"__name__": "__main__"})
