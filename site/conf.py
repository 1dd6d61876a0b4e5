"""Sphinx: one configuration for the web site (`make site`) and for a folder of results (`vlkd reproduce`)."""

import base64
import html
import json
import re
import shutil
from pathlib import Path

import bleach
import itables
from docutils import nodes

from vlkd.reproduce.report import index_cards

project = "vlkd"
author = copyright = "the authors of vlkd"
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.apidoc"]  # results need myst_parser only
root_doc = "README"
exclude_patterns = ["**/.*", "html", "nbs/index.ipynb"]  # README.md is the index
suppress_warnings = [
    "myst.header",
    "myst.xref_missing",
    "mystnb.unknown_mime_type",
    "toc.empty_glob",
    "toc.not_included",
]

myst_enable_extensions = ["amsmath", "dollarmath"]
myst_heading_anchors = 3
nb_execution_mode = "off"
nb_merge_streams = True
autodoc_default_options = {"members": True, "undoc-members": True, "show-inheritance": True}
apidoc_separate_modules = True
apidoc_module_first = True
apidoc_exclude_patterns = ["*/_modidx.py"]
apidoc_modules = [{"path": Path(__file__).resolve().parent.parent / "vlkd", "destination": "api"}]

html_theme = "pydata_sphinx_theme"
html_title = "vlkd"
HERE = Path(__file__).resolve().parent
html_static_path = [
    str(Path(itables.__file__).parent / "html" / "dt_bundle.css"),
    *(str(HERE / name) for name in ("style.css", "page.js")),
]
html_css_files = ["dt_bundle.css", "style.css"]
html_js_files = [(name, {"defer": "defer"}) for name in ("tables.js", "page.js")]
html_show_sourcelink = False
html_show_sphinx = False
html_theme_options = {"navbar_align": "left", "footer_start": ["copyright"], "footer_end": []}

SECTIONS = ["results", "library", "data", "experiments", "api", "CONTRIBUTING"]
TABLE_TAGS = ["table", "caption", "thead", "tbody", "tr", "th", "td", "div", "p", "b", "i", "br"]
FOLD = re.compile(r"<details>\s*<summary>([^<]*)</summary>\s*")
VERDICT = re.compile(r"(?:[✓✗⇄?–] )?(provisional|holds|fails|opposite|undecided|not tested)(?:: \w+)?")


def report_order(folder: Path) -> list[str]:
    "Pages of a report in the order of its index; empty where the folder is no report."
    file = folder / "report.json"
    tables = json.loads(file.read_text(encoding="utf-8"))["tables"] if file.is_file() else []
    return ["claims", "gallery", *(table["id"] for table in tables)]


def add_contents(app, docname, content):
    "Below a README come the pages of its folder, and a report has a grid of cards: GitHub shows neither."
    folder, _, name = docname.rpartition("/")
    if name != "README" or folder == "nbs":  # notebooks stand below library.md and experiments.md
        return
    here, prefix = Path(app.srcdir) / folder, f"{folder}/" if folder else ""
    if cards := index_cards(here):
        content[0] = re.sub(r"(?m)^(\|.*\n)+", lambda table: cards, content[0], count=1)
    pages = {d for d in app.env.found_docs if d.rpartition("/")[0] == folder and d != docname}
    first = [f"{prefix}{page}" for page in report_order(here)]
    ordered = [d for d in first if d in pages] + sorted(pages - {*first})
    sections = [f"/{d}" for d in SECTIONS if d in pages] or [f"/{d}" for d in ordered]
    if sections:
        content[0] += "\n".join(["\n```{toctree}", ":hidden:", "", *sections, "```\n"])


def escape_docstring(app, what, name, obj, options, lines):
    "Docstrings are Markdown: what stands between backticks is code, and no other character is markup."
    for i, line in enumerate(lines):
        parts = line.split("`")
        parts[::2] = [re.sub(r"([*_|\\])", r"\\\1", text) for text in parts[::2]]
        lines[i] = "``".join(parts)


def clean_block(text: str, foldable: bool) -> str:
    "A block of HTML without what is neither a table nor a fold."
    if foldable and (fold := FOLD.fullmatch(text.strip())):
        return f"<details><summary>{html.escape(html.unescape(fold[1]))}</summary>"
    if foldable and text.strip() == "</details>":
        return "</details>"
    return bleach.clean(text, tags=TABLE_TAGS, attributes=["class"])


def clean_html(app, doctree):
    "HTML in Markdown pages: tables, folds and line breaks stay, all else becomes text: it comes from data."
    if not str(app.env.doc2path(app.env.docname)).endswith(".md"):
        return
    found = list(doctree.findall(nodes.raw))
    texts = [node.astext().strip() for node in found]
    foldable = sum(bool(FOLD.fullmatch(text)) for text in texts) == texts.count("</details>")
    for node in found:
        if not isinstance(node.parent, nodes.TextElement):
            node.replace_self(nodes.raw("", clean_block(node.astext(), foldable), format="html"))
        elif node.astext() != "<br>":
            node.replace_self(nodes.Text(node.astext()))


def mark_tables(app, doctree):
    "Verdicts in tables get a colour, the ledger a filter, and the gallery its grid."
    name = app.env.docname.rpartition("/")[2]
    for table in doctree.findall(nodes.table):
        table["classes"] += {"claims": ["ledger"], "gallery": ["gallery"]}.get(name, [])
        for entry in table.findall(nodes.entry):
            if found := VERDICT.fullmatch(entry.astext().strip()):
                table["classes"] += ["claims"] * ("claims" not in table["classes"])
                for paragraph in entry.findall(nodes.paragraph):
                    paragraph["classes"] += ["chip", found[1].replace(" ", "-")]


def add_front_page(app, exception):
    "Web servers and readers open index.html."
    front = Path(app.outdir) / "README.html"
    if exception is None and front.is_file():
        shutil.copyfile(front, front.with_name("index.html"))


def add_sorting(app):
    "Write the script that lets tables be sorted, with the library that it uses in it."
    bundle = Path(itables.__file__).parent / "html" / "dt_bundle.js"
    url = "data:text/javascript;base64," + base64.b64encode(bundle.read_bytes()).decode()
    script = Path(__file__).with_name("tables.js").read_text(encoding="utf-8")
    target = Path(app.outdir) / "_static" / "tables.js"
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(f'const datatables = "{url}";\n{script}', encoding="utf-8")


def setup(app):
    app.connect("builder-inited", add_sorting)
    app.connect("source-read", add_contents)
    if "sphinx.ext.autodoc" in app.extensions:
        app.connect("autodoc-process-docstring", escape_docstring)
    else:  # results alone: their pages are listed at the side
        app.config.html_sidebars = {"**": ["globaltoc.html"]}
        app.config.html_theme_options |= {"navbar_center": [], "secondary_sidebar_items": []}
        app.config.html_theme_options["show_prev_next"] = False  # pages name their neighbours
    app.connect("doctree-read", clean_html)
    app.connect("doctree-read", mark_tables)
    app.connect("build-finished", add_front_page)
