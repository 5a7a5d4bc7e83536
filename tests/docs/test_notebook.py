"""The notebook runs from top to bottom, and is stored without outputs."""

import os
from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat")
ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted((ROOT / "docs" / "notebooks").glob("*.ipynb"))
SECONDS = 300  # of one cell, on a machine that is busy


def read(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    return notebook


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_stored_without_outputs(path):
    cells = [cell for cell in read(path).cells if cell.cell_type == "code"]
    assert "%pip install" in cells[0].source
    assert [(cell.outputs, cell.execution_count) for cell in cells] == [([], None)] * len(cells)


@pytest.fixture(scope="module")
def shown(tmp_path_factory):
    """The outputs of the first notebook's code cells, run in a kernel of its own away from the checkout."""
    nbclient = pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    notebook = read(NOTEBOOKS[0])
    folder = tmp_path_factory.mktemp("notebook")
    client = nbclient.NotebookClient(
        notebook, timeout=SECONDS, kernel_name="python3", resources={"metadata": {"path": str(folder)}}
    )
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    client.execute(env=os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"})
    return [cell.outputs for cell in notebook.cells if cell.cell_type == "code"]


def data(outputs, kind):
    """The output of one kind, such as text/html."""
    return [output.data[kind] for output in outputs if kind in output.get("data", {})]


@pytest.mark.thorough
@pytest.mark.long
def test_the_notebook_runs_and_its_first_cell_has_nothing_to_install(shown):
    assert shown[0] == []
    assert all(data(shown[i], "image/png") for i in (1, 2, 3, 5))  # input, stock, edit, edit with a mask
    text = "".join(output.get("text", "") for output in shown[5])
    assert "100% of the pixels outside" not in text  # the mask is feathered
    assert int(text.partition("%")[0].split()[-1]) > 30


@pytest.mark.thorough
@pytest.mark.long
def test_the_notebook_shows_a_report_with_its_figure(shown):
    (page,) = data(shown[4], "text/html")
    assert "data:image/png;base64," in page and "<td" in page and "SpecEdit turbo" in page


@pytest.mark.thorough
@pytest.mark.long
def test_progress_bars_are_widgets(shown):
    pytest.importorskip("ipywidgets")
    assert data(shown[3], "application/vnd.jupyter.widget-view+json")
    assert "TqdmWarning" not in str(shown)
