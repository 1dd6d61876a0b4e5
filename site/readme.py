"""Write README.md from the executed nbs/index.ipynb. Usage: python site/readme.py"""

import os
import re
from pathlib import Path

import nbformat
from nbconvert import MarkdownExporter
from nbconvert.preprocessors import TagRemovePreprocessor

ROOT = Path(__file__).resolve().parent.parent
NOTE = "<!-- Written by `make readme` from nbs/index.ipynb; edit that notebook. -->\n\n"


def from_root(markdown: str, folder: str) -> str:
    "Relative links of a page in `folder`, as they are one level up."

    def moved(link):
        return link[1] + os.path.normpath(f"{folder}/{link[2]}") + link[3]

    return re.sub(r"(\]\()(?!\w+:|[#/])([^)\s]+)(\))", moved, markdown)


def readme(notebook: Path = ROOT / "nbs" / "index.ipynb") -> str:
    "The executed notebook as Markdown; `ValueError` where a cell failed."
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
    markdown, _ = exporter.from_notebook_node(executed)
    markdown = re.sub(r"\n{3,}", "\n\n", markdown).strip()
    return NOTE + from_root(markdown, notebook.parent.name) + "\n"


if __name__ == "__main__":
    (ROOT / "README.md").write_text(readme(), encoding="utf-8")
