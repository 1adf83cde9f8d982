"""Runs examples/reproduce_csg_icnn.ipynb and shows it, with its results, as the page reproduce.md; called by mkdocs."""

from __future__ import annotations

import base64
import functools
from pathlib import Path
from typing import Any

import nbformat
from mkdocs.structure.files import File
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).parents[1] / "examples" / "reproduce_csg_icnn.ipynb"
PAGE = "reproduce.md"


def on_files(files: Any, config: Any, **kwargs: Any) -> Any:
    """Called by mkdocs when it has found its files: the page and its pictures are added."""
    page, pictures = as_page()
    files.append(File.generated(config, PAGE, content=page))
    for name, content in pictures.items():
        files.append(File.generated(config, f"images/made/{name}", content=content))
    return files


@functools.cache
def as_page() -> tuple[str, dict[str, bytes]]:
    """The notebook as Markdown, and the pictures in it by name; run once, however often ``mkdocs serve`` builds."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    NotebookClient(notebook, timeout=600, kernel_name="python3").execute()
    parts: list[str] = []
    pictures: dict[str, bytes] = {}
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            parts.append(cell.source)
            continue
        parts.append(f"```python\n{cell.source}\n```")
        for output in cell.outputs:
            data = output.get("data", {})
            if "image/png" in data:
                name = f"reproduce_{len(pictures)}.png"
                pictures[name] = base64.b64decode(data["image/png"])
                parts.append(f"![Result of the lines above.](images/made/{name})")
            elif "text/html" in data:
                parts.append(data["text/html"])
            elif output.get("name") == "stdout":
                parts.append(f"```text\n{output.text}```")
    return "\n\n".join(
        parts
    ) + "\n\nThis page is `examples/reproduce_csg_icnn.ipynb`, run when it was built.\n", pictures
