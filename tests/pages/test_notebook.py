"""The notebook, from an empty folder to a promoted version and a table, in few steps on small scenes."""

from __future__ import annotations

import json
import os

import pandas as pd
import pytest
from mlflow.tracking import MlflowClient

from tests.pages.blocks import ROOT

pytestmark = [pytest.mark.docs, pytest.mark.xdist_group("notebook")]

NOTEBOOK = ROOT / "docs" / "notebook.ipynb"
# In place of the notebook's own parameters; what learns in four steps passes no gate of quality.
SMALL = """
scenes = {"train": 4, "test": 2, "size": 256, "planes_min": 3, "planes_max": 4, "length_max": 60.0}
steps = {"unet": 4, "detector": 4}
gates = "anything.yaml"
"""


def test_it_runs_from_an_empty_folder(tmp_path, monkeypatch):
    nbformat = pytest.importorskip("nbformat")
    nbclient = pytest.importorskip("nbclient")
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    monkeypatch.setenv("JUPYTER_RUNTIME_DIR", str(tmp_path / "runtime"))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))))
    work = tmp_path / "work"
    work.mkdir()
    (work / "anything.yaml").write_text(json.dumps({"gates": {"production": {}}}))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    (parameters,) = (cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", ()))
    parameters.source += SMALL
    from jupyter_client.manager import AsyncKernelManager

    # Sockets in a folder, no ports.
    kernels = AsyncKernelManager(transport="ipc", ip=str(tmp_path / "k"))
    nbclient.NotebookClient(notebook, km=kernels, timeout=600, resources={"metadata": {"path": str(work)}}).execute()
    client = MlflowClient(f"sqlite:///{work / 'mlflow.db'}")
    assert str(client.get_registered_model("planes-inst").aliases["production"]) == "1"
    table = pd.read_parquet(work / "predictions" / "planes-inst-1" / "instances.parquet")
    assert len(table) > 0
    assert table.mask_counts.notna().all()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 1
    said = "".join(output.get("text", "") for output in outputs)
    assert "planes-det/1 {'AP': " in said
    assert "planes-inst/1" in said
