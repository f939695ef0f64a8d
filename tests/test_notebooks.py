"""Every notebook runs in its quick mode, and is committed as it ran in full."""

import re
from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")
pytest.importorskip("ipykernel")

FOLDER = Path(__file__).parents[1] / "notebooks"
NAMES = sorted(path.name for path in FOLDER.glob("*.ipynb"))
MEGABYTE = 2**20


def read(name):
    """The notebook, and its cells of code."""
    notebook = nbformat.read(FOLDER / name, as_version=4)
    return notebook, [cell for cell in notebook.cells if cell.cell_type == "code"]


@pytest.mark.parametrize("name", NAMES)
def test_it_runs_and_its_claims_hold(name, tmp_path, monkeypatch):
    monkeypatch.setenv("ROBUSTLEARN_QUICK", "1")
    for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"):  # small matrices
        monkeypatch.setenv(variable, "1")
    for variable in ("IPYTHONDIR", "JUPYTER_RUNTIME_DIR", "JUPYTER_CONFIG_DIR", "MPLCONFIGDIR"):
        folder = tmp_path / variable.lower()
        folder.mkdir()
        monkeypatch.setenv(variable, str(folder))
    notebook, _ = read(name)
    before = (FOLDER / name).read_bytes()
    nbclient.NotebookClient(
        notebook,
        timeout=120,
        kernel_name="python3",
        resources={"metadata": {"path": str(FOLDER)}},
    ).execute()
    assert (FOLDER / name).read_bytes() == before


@pytest.mark.parametrize("name", NAMES)
def test_it_ends_in_assertions(name):
    _, code = read(name)
    assert re.search(r"^assert ", code[-1].source, re.MULTILINE)


@pytest.mark.parametrize("name", NAMES)
def test_it_is_committed_with_the_outputs_of_one_full_run(name):
    _, code = read(name)
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell.outputs]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert not [o for o in outputs if o.output_type == "error" or o.get("name") == "stderr"]
    text = "".join(str(output) for output in outputs)
    assert not re.search(r"/(?:home|root|work|tmp|Users|usr)/", text)
    assert (FOLDER / name).stat().st_size < MEGABYTE


def test_there_are_notebooks():
    assert NAMES
