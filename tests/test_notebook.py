"""The notebook runs from its first cell to its last; its text says what the numbers show."""

import json
from pathlib import Path

import pytest

NOTEBOOK = Path(__file__).parents[1] / "examples" / "reproduce_csg_icnn.ipynb"


def code_cells():
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    return [cell for cell in cells if cell["cell_type"] == "code"]


def test_no_output_is_committed():
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code_cells())


@pytest.mark.slow
def test_every_cell_runs_in_a_kernel():
    nbformat = pytest.importorskip("nbformat", reason="needs the extra 'docs'")
    nbclient = pytest.importorskip("nbclient", reason="needs the extra 'docs'")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    notebook.cells[1].source = notebook.cells[1].source.replace("EPOCHS = 12", "EPOCHS = 2")
    nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3").execute()
    kinds = [kind for cell in notebook.cells for output in cell.get("outputs", []) for kind in output.get("data", {})]
    assert kinds.count("image/png") == 1
    assert kinds.count("text/html") == 2  # tables


@pytest.mark.slow
def test_numbers_say_what_the_text_says():
    pytest.importorskip("pandas")
    namespace = {}
    for cell in code_cells():
        exec("".join(cell["source"]), namespace)
    table, scores, found = namespace["table"], namespace["scores"], namespace["steadiness"]
    assert table["accuracy"].min() > 0.97
    assert table["agreement"]["CSG"] > 0.5
    assert table["removed"]["CSG"] > 0.4  # recognised as often as by the standard network
    assert abs(table["MIS"]["CSG"] - table["MIS"]["standard"]) < 0.02
    assert table["MIS"]["assigned"] > 0.3
    assert table["agreement"]["assigned"] == 1
    assert table["removed"]["assigned"] < 0.01
    assert found["ICNN"] < 0.95 * found["standard, tuned on"]
    game = {maker: score["grid pointing game"] for maker, score in scores.items()}
    assert game["assigned", "evidence map"] > game["assigned", "Grad-CAM"] + 0.05
    assert min(game.values()) > 0.5
