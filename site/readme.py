"""Write README.md from the executed nbs/index.ipynb, and nbs/README.md from the heads of all notebooks.

Usage: python site/readme.py
"""

import json
import os
import re
from pathlib import Path

import nbformat
from nbconvert import MarkdownExporter
from nbconvert.preprocessors import TagRemovePreprocessor

ROOT = Path(__file__).resolve().parent.parent
NOTE = "<!-- Written by `make readme` from nbs/index.ipynb; edit that notebook. -->\n\n"
PICTURE = "site/effects.png"
PICTURE_TEXT = "Differences to text-only pre-training with their intervals, a line a comparison"


def from_root(markdown: str, folder: str) -> str:
    "Relative links of a page in `folder`, as they are one level up."

    def moved(link):
        return link[1] + os.path.normpath(f"{folder}/{link[2]}") + link[3]

    return re.sub(r"(\]\()(?!\w+:|[#/])([^)\s]+)(\))", moved, markdown)


def readme(notebook: Path = ROOT / "nbs" / "index.ipynb") -> tuple[str, bytes | None]:
    "The executed notebook as Markdown, and its one figure; `ValueError` where a cell failed."
    executed = nbformat.read(notebook, as_version=4)
    executed.metadata["language_info"] = {"name": "python"}
    for cell in executed.cells:
        if any(output.output_type == "error" for output in cell.get("outputs", [])):
            raise ValueError(
                f"{notebook}: a cell ended with an error; run the notebook again:\n{cell.source}"
            )
    tags = TagRemovePreprocessor(remove_cell_tags={"remove-cell"}, remove_input_tags={"remove-input"})
    exporter = MarkdownExporter()
    exporter.register_preprocessor(tags, enabled=True)
    markdown, resources = exporter.from_notebook_node(executed)
    markdown = re.sub(r"\n\s*\n", "\n\n", markdown).strip()
    markdown = from_root(markdown, notebook.parent.name)
    figures = [*resources["outputs"].items()]
    if len(figures) > 1:
        raise ValueError(f"{notebook}: README.md shows one figure, there are {len(figures)}")
    for name, _ in figures:
        shown = f"[png]({notebook.parent.name}/{name})"
        markdown = markdown.replace(shown, f"[{PICTURE_TEXT}]({PICTURE})")
    return NOTE + markdown + "\n", figures[0][1] if figures else None


NOTEBOOKS_NOTE = "<!-- Written by `make readme` from the first lines of each notebook. -->\n\n"
LAYERS = {
    "0": "Core",
    "1": "Data",
    "2": "Tabletop, the generated world",
    "3": "Models and features",
    "4": "Losses",
    "5": "Training",
    "6": "Evaluation",
    "7": "Reproducing and tools",
}
FOLDERS = {
    "experiments/shared": "Trainings",
    "experiments/vidlankd": "Pages of VidLanKD",
    "benchmarks": "Benchmarks",
}
HEAD = """# Notebooks

The library is written in notebooks: `nbs/NN_a.b.ipynb` becomes `vlkd/a/b.py`. The first digit is the
layer, and a notebook imports only from lower numbers, so they can be read in this order. Experiments and
benchmarks are notebooks with parameters. [plan.toml](experiments/vidlankd/plan.toml) is the graph of the
experiments: a training that several pages share is done once. What they test is stated in
[claims.toml](experiments/vidlankd/claims.toml).
"""


def heading(notebook: Path) -> tuple[str, str]:
    "Title of a notebook, and the line that says what it is for."
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    lines = "".join(next(c["source"] for c in cells if c["cell_type"] == "markdown")).split("\n")
    purpose = [line[1:].strip() for line in lines if line.startswith(">")]
    return lines[0].lstrip("# "), (purpose or [""])[0]


def table(files: list[Path], nbs: Path) -> str:
    "A line a notebook: its name as a link, and what it is for."
    rows = ["| notebook | about |", "| --- | --- |"]
    for file in files:
        title, purpose = heading(file)
        number = file.name[:2] + " " if file.name[0].isdigit() and file.parent == nbs else ""
        cells = [f"[{number}{title}]({file.relative_to(nbs).as_posix()})", purpose]
        rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(rows) + "\n"


def notebooks(nbs: Path = ROOT / "nbs") -> str:
    "The page that lists all notebooks: those of the library by layer, then the others."
    parts = [HEAD]
    for digit, layer in LAYERS.items():
        parts.append(f"## {layer}\n\n" + table(sorted(nbs.glob(f"{digit}*.ipynb")), nbs))
    guides = [file for file in sorted(nbs.glob("[a-z]*.ipynb")) if file.name != "index.ipynb"]
    parts.append("## Guides\n\n" + table(guides, nbs))
    for folder, name in FOLDERS.items():
        parts.append(f"## {name}\n\n" + table(sorted((nbs / folder).glob("*.ipynb")), nbs))
    return NOTEBOOKS_NOTE + "\n".join(parts)


if __name__ == "__main__":
    markdown, figure = readme()
    (ROOT / "README.md").write_text(markdown, encoding="utf-8")
    (ROOT / "nbs" / "README.md").write_text(notebooks(), encoding="utf-8")
    if figure:
        (ROOT / PICTURE).write_bytes(figure)
