"""Sphinx: one configuration for the web site (`make site`) and for a folder of results (`vlkd reproduce`)."""

import base64
import re
import shutil
from pathlib import Path

import bleach
import itables
from docutils import nodes

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
html_static_path = [str(Path(itables.__file__).parent / "html" / "dt_bundle.css")]
html_css_files = ["dt_bundle.css"]
html_js_files = [("tables.js", {"defer": "defer"})]
html_show_sourcelink = False
html_show_sphinx = False
html_theme_options = {"navbar_align": "left", "footer_start": ["copyright"], "footer_end": []}

SECTIONS = ["results", "library", "data", "experiments", "api", "CONTRIBUTING"]
TABLE_TAGS = ["table", "caption", "thead", "tbody", "tr", "th", "td", "div", "p", "b", "i", "br"]


def add_contents(app, docname, content):
    "Below a README come the pages of its folder. Said here because GitHub shows a toctree as code."
    folder, _, name = docname.rpartition("/")
    if name != "README" or folder == "nbs":  # notebooks stand below library.md and experiments.md
        return
    pages = sorted(d for d in app.env.found_docs if d.rpartition("/")[0] == folder and d != docname)
    sections = [f"/{d}" for d in SECTIONS if d in pages] or [f"/{d}" for d in pages]
    if sections:
        content[0] += "\n".join(["\n```{toctree}", ":hidden:", "", *sections, "```\n"])


def escape_docstring(app, what, name, obj, options, lines):
    "Docstrings are Markdown: what stands between backticks is code, and no other character is markup."
    for i, line in enumerate(lines):
        parts = line.split("`")
        parts[::2] = [re.sub(r"([*_|\\])", r"\\\1", text) for text in parts[::2]]
        lines[i] = "``".join(parts)


def clean_html(app, doctree):
    "HTML in Markdown pages: tables stay, all else becomes text, for captions and file names come from data."
    if not str(app.env.doc2path(app.env.docname)).endswith(".md"):
        return
    for node in list(doctree.findall(nodes.raw)):
        if isinstance(node.parent, nodes.TextElement):
            node.replace_self(nodes.Text(node.astext()))
        else:
            clean = bleach.clean(node.astext(), tags=TABLE_TAGS, attributes=["class"])
            node.replace_self(nodes.raw("", clean, format="html"))


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
        app.config.html_theme_options["navbar_center"] = []
    app.connect("doctree-read", clean_html)
    app.connect("build-finished", add_front_page)
