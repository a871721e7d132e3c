"""A version as MLflow sees it: loaded anywhere, used by `mlflow models predict`, refusing foreign code."""

from __future__ import annotations

import base64
import json
from pathlib import Path

import mlflow
import pytest

from tests.journeys import commands

pytestmark = pytest.mark.xdist_group("versions")

LOAD = """
import base64, sys
import mlflow, pandas as pd
mlflow.set_tracking_uri(sys.argv[1])
model = mlflow.pyfunc.load_model(sys.argv[2])
path = sys.argv[3]
encoded = base64.b64encode(open(path, "rb").read()).decode()
table = model.predict(pd.DataFrame({"image": [path, encoded]}))
one, two = (table[table.image_id == str(i)].drop(columns="image_id").reset_index(drop=True) for i in (0, 1))
pd.testing.assert_frame_equal(one, two)
import models
print("rows", len(one), "code", models.__file__)
"""


@pytest.mark.parametrize("name", ["planes-det", pytest.param("planes-unet", marks=pytest.mark.soak)])
def test_loads_in_another_folder_with_its_own_code(project, tmp_path, name):
    image = str(project.data / "test" / "A0005.png")
    store = f"sqlite:///{project.folder / 'mlflow.db'}"
    (tmp_path / "load.py").write_text(LOAD)
    done = project.run("python", str(tmp_path / "load.py"), store, f"models:/{name}/1", image)
    assert "/code/models/__init__.py" in done.stdout
    # Eight steps teach a U-Net too little to find a plane in a whole scene.
    assert name == "planes-unet" or int(done.stdout.split("rows ")[1].split()[0]) > 0


def test_refuses_where_another_package_models_is_imported(project, tmp_path):
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "__init__.py").write_text("VALUE = 1\n")
    (tmp_path / "load.py").write_text("import models\nassert models.VALUE == 1\n" + LOAD)
    store = f"sqlite:///{project.folder / 'mlflow.db'}"
    done = project.run("python", str(tmp_path / "load.py"), store, "models:/planes-unet/1", "x.png", code=1)
    assert "another one is already imported from" in done.stderr
    assert str(tmp_path / "models") in done.stderr


# What serves over HTTP in test_serving.py, from a file.
@pytest.mark.soak
def test_mlflow_models_predict(project, tmp_path):
    image = project.data / "test" / "A0005.png"
    rows = [[str(image)], [base64.b64encode(image.read_bytes()).decode()]]
    (tmp_path / "in.json").write_text(json.dumps({"dataframe_split": {"columns": ["image"], "data": rows}}))
    store = {"MLFLOW_TRACKING_URI": f"sqlite:///{project.folder / 'mlflow.db'}"}
    command = ["mlflow", "models", "predict", "-m", "models:/planes-det/1", "-i", str(tmp_path / "in.json")]
    project.run(*command, "-o", str(tmp_path / "out.json"), "--env-manager", "local", **store)
    table = json.loads((tmp_path / "out.json").read_text())["predictions"]
    by_image = {
        i: [{k: v for k, v in row.items() if k != "image_id"} for row in table if row["image_id"] == i] for i in "01"
    }
    assert by_image["0"] == by_image["1"]
    assert by_image["0"]
    assert {"x1", "y1", "x2", "y2", "score"} <= set(by_image["0"][0])


def test_the_version_has_signature_example_and_pinned_requirements(project, tmp_path):
    with commands.working_in(project.folder, project.env(MLFLOW_TRACKING_URI=f"sqlite:///{project.folder / 'mlflow.db'}")):
        described = mlflow.models.get_model_info("models:/planes-unet/1")
        folder = Path(mlflow.artifacts.download_artifacts("models:/planes-unet/1", dst_path=str(tmp_path)))
    assert "'image': string" in str(described.signature.inputs)
    assert described.signature.outputs is not None
    assert [(p.name, p.dtype.name, p.default) for p in described.signature.params] == [
        ("score_threshold", "double", None),
        ("tile", "long", None),
    ]
    assert (folder / described.saved_input_example_info["artifact_path"]).exists()
    names = {p.name for p in folder.rglob("*")}
    assert {"model.json", "weights.safetensors", "requirements.txt"} <= names
    assert not {n for n in names if n.endswith((".pkl", ".pth", ".pt"))}
    pinned = (folder / "requirements.txt").read_text().splitlines()
    assert all("==" in line for line in pinned), pinned
