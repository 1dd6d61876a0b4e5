"Reports of toy runs: what a page says, what is published, what is found out, and the HTML."

import base64
import html
import importlib.util
import io
import json
import re
import shutil
from urllib.parse import unquote

import matplotlib.pyplot as plt
import pandas as pd
import pytest

from vlkd.core.files import write_json
from vlkd.core.records import record
from vlkd.core.settings import settings_file
from vlkd.reproduce import report as R
from vlkd.reproduce.keys import graph

PLAN = """
[[run]]
id = "teacher"
notebook = "notebook.ipynb"
[[table]]
id = "t1"
notebook = "notebook.ipynb"
title = "Scores"
paper = "Toy, Table 1"
claim = "Scores add up."
needs = ["teacher"]
"""
SECOND = '[[table]]\nid = "t2"\nnotebook = "notebook.ipynb"\ntitle = "Private"\n'
PARAMETERS = """scale: str = "smoke" # section
seed: int = 0 # world
seeds: str = "" # worlds
out: str = "" # folder
inputs: str = "" # runs read"""
SCRIPT = "<script>alert('a|b')</script> <b>*not bold*</b> [x](y.md)"


def figure():
    fig, ax = plt.subplots(figsize=(2, 1))
    ax.plot([1, 2])
    plt.close(fig)
    return fig


def png(fig, dpi):
    file = io.BytesIO()
    fig.savefig(file, format="png", dpi=dpi, bbox_inches="tight")
    return base64.b64encode(file.getvalue()).decode()


class Toy:
    "A plan with one notebook, whose runs are written by `finish`."

    def __init__(self, folder):
        self.folder, self.plan = folder, folder / "plan.toml"
        self.plan.write_text(PLAN)
        self.notebook = folder / "notebook.ipynb"
        self.write("Says nothing.")

    def write(self, prose="Says nothing.", code="x = 1"):
        frame = pd.DataFrame(dict(row=["a", SCRIPT], score=[0.5, 0.75]))
        here = str(self.folder / "runs" / "smoke")
        outputs = [
            dict(
                output_type="display_data",
                data={"image/png": png(figure(), 72)},
                metadata=dict(figure="line"),
            ),
            dict(output_type="display_data", data={"text/html": frame.to_html()}, metadata={}),
            dict(output_type="stream", name="stdout", text=f"in {here}\n```\n<script>fence()</script>"),
            dict(output_type="stream", name="stderr", text="a warning"),
        ]
        cells = [
            dict(cell_type="markdown", source=f"# Toy\n\n> {prose}"),
            dict(cell_type="code", source=PARAMETERS, outputs=[]),
            dict(cell_type="code", source=code, outputs=outputs),
            dict(
                cell_type="code", source="#| hide\nprint()", outputs=[outputs[2] | dict(text="hidden words")]
            ),
        ]
        for i, cell in enumerate(cells):
            cell |= dict(id=f"c{i}", metadata=dict(tags=["parameters"]) if i == 1 else {})
        self.notebook.write_text(json.dumps(dict(cells=cells, metadata={}, nbformat=4, nbformat_minor=5)))

    def finish(self, seeds=1):
        "Write the records of all runs as the runner would."
        for node in graph(["all"], "smoke", seeds, self.plan).values():
            claim = dict(id="c1", text=SCRIPT, verdict="holds", diff=0.25, low=0.1, high=0.4, n=2)
            claim["n_worlds"] = len(node.seeds)
            record(
                node.folder,
                dict(best=0.75),
                tables=dict(scores=pd.DataFrame(dict(score=[0.5, 0.75]))),
                figures=dict(line=figure()),
                headline=f"0.75 at best {SCRIPT}",
                claims=[claim],
                private=node.entry["id"] == "t2",
            )
            shutil.copy(self.notebook, node.folder / "notebook.ipynb")
            receipt = dict(key=node.key, params=node.parts["params"], parts=node.parts, files={})
            receipt |= dict(seconds=1.5, device="CPU", started="2026-01-01T00:00:00", git={}, versions={})
            write_json(node.folder / "run.json", receipt)

    def report(self, seeds=None, **kw):
        return R.report("smoke", seeds, plan=self.plan, **dict(html=False) | kw)

    def publish(self):
        return self.report(publish=True)


@pytest.fixture
def toy(tmp_path, monkeypatch):
    for name in ("runs", "reports"):
        monkeypatch.setenv(f"VLKD_{name.upper()}", str(tmp_path / name))
    monkeypatch.setenv("VLKD_SETTINGS", str(shutil.copy(settings_file(), tmp_path)))
    toy = Toy(tmp_path)
    toy.finish()
    return toy


def test_pages(toy):
    folder = toy.report()
    assert [p.name for p in folder.parent.iterdir()] == ["latest"]
    files = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}
    assert files == {
        "README.md",
        "claims.md",
        "gallery.md",
        "report.json",
        "runs.csv",
        "t1.md",
        "t1/line.png",
        "t1/result.json",
        "t1/scores.csv",
        "t1/scores.tex",
    }
    page = (folder / "t1.md").read_text()
    for text in ("0.75 at best", "runs/smoke", "![t1: line](t1/line.png)", "````\nin "):
        assert text in page
    for text in (
        "hidden words",
        "a warning",
        str(toy.folder),
        "# world",
        "<style",
        "<script>alert",
    ):
        assert text not in page
    for name in ("README.md", "claims.md"):
        text = (folder / name).read_text()
        assert "<script" not in text and "a\\|b" in text
    assert "Toy, Table 1" in text and "provisional: holds" in text  # one world
    assert "1 provisional" in (folder / "README.md").read_text()
    assert r"\toprule" in (folder / "t1" / "scores.tex").read_text()
    assert "vlkd reproduce t1 --scale smoke --seeds 1,\n" in page
    assert len((folder / "runs.csv").read_text().splitlines()) == 3


def test_a_figure_that_was_only_shown_gets_a_file(toy):
    cells = json.loads(toy.notebook.read_text())
    fig, ax = plt.subplots(figsize=(2, 1))
    ax.bar([1, 2], [2, 1], color="black")
    plt.close(fig)
    cells["cells"][2]["outputs"][0] |= dict(data={"image/png": png(fig, 72)}, metadata={})
    toy.notebook.write_text(json.dumps(cells))
    toy.finish()
    folder = toy.report()
    assert "![t1: output-1](t1/output-1.png)" in (folder / "t1.md").read_text()
    assert (folder / "t1" / "output-1.png").is_file()


def test_rendered_again_only_where_something_changed(toy):
    page = toy.report() / "t1.md"
    before = page.stat().st_mtime_ns
    toy.report()
    assert page.stat().st_mtime_ns == before
    toy.write(prose="Says a lot.")
    assert "Says a lot." in (toy.report() / "t1.md").read_text()


def test_seeds_choose_the_worlds(toy):
    toy.finish(seeds=2)
    assert "2 (1, 2)" in (toy.report() / "README.md").read_text()
    assert "1 (1)" in (toy.report(seeds=1) / "README.md").read_text()


def test_html(toy, capsys):
    pytest.importorskip("sphinx")
    folder = toy.report(html=True)
    assert f"{folder}/html/index.html" in capsys.readouterr().out
    for name in ("index", "claims", "t1"):
        page = (folder / "html" / f"{name}.html").read_text()
        assert "&lt;script&gt;alert(" in page and "<script>alert" not in page and "<script>fence" not in page
        assert "<b>*not" not in page and 'href="y.md' not in page
        assert not re.search(r"""(src|href)=["']?(https?:)?//""", page)
    assert "<table" in page
    assert "t1.html" in (folder / "html" / "index.html").read_text()
    script = (folder / "html" / "_static" / "tables.js").read_text()
    assert "tables.js" in page and script.startswith('const datatables = "data:text/javascript;base64,')


def broken_links(folder):
    "Links and sources of HTML pages that lead to no file, or to no place in it."
    found = []
    for page in folder.glob("*.html"):
        for link in re.findall(r"""(?:href|src)=["']([^"']*)["']""", page.read_text()):
            file, _, place = html.unescape(unquote(link)).partition("#")
            target = folder / file.partition("?")[0] if file else page
            if re.match(r"\w+:", link):
                continue
            if not target.is_file() or (place and f'id="{place}"' not in target.read_text()):
                found.append(f"{page.name}: {link}")
    return found


def test_html_links_lead_somewhere_and_pictures_say_what_they_show(toy):
    pytest.importorskip("sphinx")
    toy.plan.write_text(PLAN + SECOND)
    toy.finish()
    folder = toy.report(html=True) / "html"
    assert broken_links(folder) == []
    (folder / "t2.html").unlink()
    assert "index.html: t2.html" in broken_links(folder)
    pictures = [p for f in folder.glob("*.html") for p in re.findall(r"<img[^>]*>", f.read_text())]
    alts = [re.search(r'alt="([^"]*)"', picture)[1] for picture in pictures]
    assert {"t1: line", "t2: line"} <= {*alts} and "No description" not in "".join(alts)


def test_html_of_verdicts(toy):
    pytest.importorskip("sphinx")
    toy.finish(seeds=5)
    folder = toy.report(html=True) / "html"
    index, ledger = ((folder / f"{name}.html").read_text() for name in ("index", "claims"))
    assert 'class="chip holds"' in ledger and "ledger" in ledger
    assert '<div class="bar"><i class="holds"></i></div>' in index and "result-card" in index
    toy.finish(seeds=1)
    shutil.rmtree(toy.folder / "runs" / "smoke" / "t1@1-2-3-4-5")
    folder = toy.report(html=True) / "html"
    index, ledger = ((folder / f"{name}.html").read_text() for name in ("index", "claims"))
    assert 'class="chip provisional"' in ledger and "chip holds" not in ledger
    assert '<i class="provisional"></i>' in index and "1 holds" not in index


def test_pages_link_their_neighbours(toy):
    toy.plan.write_text(PLAN + SECOND.replace("Private", "Open"))
    toy.finish()
    folder = toy.report()
    first, second = ((folder / f"{name}.md").read_text() for name in ("t1", "t2"))
    assert "[t2 →](t2.md)" in first and "[← t1](t1.md)" in second and "[t1 →]" not in second


def family_claim(name, p):
    "A judged claim of one family, whose p is given."
    keys = dict(id=name, table="t1", text=name, kind="greater", family="f", primary=True, remark="")
    numbers = dict(diff=3.0, low=1.0, high=5.0, se=1.0, df=4, level=0.95, n=10, n_clusters=2, n_worlds=5)
    return keys | numbers | dict(p=p, p_fails=1.0, min_effect=1.0, unit="world", verdict="holds")


def test_families_reach_over_all_pages():
    report = dict(tables=[dict(id=t, paper="Toy") for t in ("t1", "t2")])
    results = {t: dict(claims=[family_claim(t, p)]) for t, p in (("t1", 0.001), ("t2", 0.04))}
    alone = R.all_claims(dict(tables=report["tables"][:1]), results)["t1"][0]
    together = R.all_claims(report, results)
    assert alone["p_holm"] == 0.001 and together["t1"][0]["p_holm"] == 0.002
    assert together["t2"][0]["p_holm"] == 0.04 and together["t2"][0]["table"] == "t2"


def test_without_sphinx_pages_are_markdown(toy, capsys, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "sphinx" else find(name))
    folder = toy.report(html=True)
    said = capsys.readouterr().out
    assert f"{folder}/README.md" in said and "vlkd[site]" in said


@pytest.mark.parametrize(
    "name, old, new",
    [
        ("README.md", "0.75 at best", "0.95 at best"),
        ("t1/scores.csv", "0.75", "0.95"),
        ("t1/result.json", "0.75 at best", "0.95 at best"),
        ("claims.md", "holds", "fails"),
        ("t1.md", "0.75", "0.95"),
    ],
)
def test_a_changed_file_is_found_out(toy, name, old, new):
    folder = toy.publish()
    assert folder.name == "smoke" and R.check_reports() == ["smoke"]
    text = (folder / name).read_text()
    assert old in text
    (folder / name).write_text(text.replace(old, new))
    with pytest.raises(ValueError, match=re.escape(str(folder))):
        R.check_reports()


def test_only_fresh_tables_are_published(toy):
    toy.write(code="x = 2")
    with pytest.raises(ValueError, match="vlkd reproduce t1 --scale smoke"):
        toy.publish()


def test_private_tables_have_no_page(toy):
    toy.plan.write_text(PLAN + SECOND)
    toy.finish()
    folder = toy.publish()
    assert not (folder / "t2.md").exists() and (folder / "t2" / "scores.csv").is_file()
    index = (folder / "README.md").read_text()
    assert "**t2**" in index and "t2.md" not in index and R.check_reports() == ["smoke"]
    assert (toy.report() / "t2.md").is_file()


def test_published_tables_stay_where_they_are_not_finished(toy):
    toy.publish()
    shutil.rmtree(toy.folder / "runs")
    folder = toy.folder / "reports" / "smoke"
    (folder / "README.md").write_text("old words")  # rendered again from the published records
    toy.publish()
    assert R.check_reports() == ["smoke"] and "0.75 at best" in (folder / "README.md").read_text()
    (folder / "t1" / "scores.csv").write_text("score\n")
    with pytest.raises(ValueError, match=r"scores\.csv is missing or was changed"):
        toy.publish()


def test_nothing_finished(toy, capsys):
    shutil.rmtree(toy.folder / "runs")
    assert toy.report() is None and "nothing to report" in capsys.readouterr().out
    with pytest.raises(ValueError, match="nothing to publish"):
        toy.publish()
