"""A store made by 0.6.0 (tests/journeys/data): its versions, journal, jobs and checkpoints go on with this code.

The zip was made by 0.6.0's own commands in a folder that is gone: two tiny detectors trained for 4 and 6
steps, a U-Net imported with weights of 0, a composition of both; planes-det/1, then /2, promoted; one job
finished, one interrupted after its first shard; one training interrupted after 3 of 8 steps. Pictures are
left out.
"""

from __future__ import annotations

import json
import zipfile

import pyarrow.parquet as pq
import pytest
import torch

from pipelines.data.readers.opening import open_dataset
from pipelines.data.synthetic.scenes import AirfieldSettings, prepare_airfield
from pipelines.recipes.reading import load_recipe
from pipelines.training.detector import train_detector
from tests.journeys.conftest import Project, error_line

pytestmark = pytest.mark.xdist_group("earlier")


@pytest.fixture(scope="module")
def earlier(tmp_path_factory, root):
    """The store in a folder of another name, and the data that 0.6.0 drew with the same seed."""
    folder = tmp_path_factory.mktemp("earlier")
    with zipfile.ZipFile(root / "tests" / "journeys" / "data" / "store-0.6.0.zip") as content:
        content.extractall(folder)
    prepare_airfield(folder / "data", AirfieldSettings(train=4, test=2, size=256))
    return Project(folder, folder / "data")


def _aliases(project, name="planes-det"):
    return {k: str(v) for k, v in project.client.get_registered_model(name).aliases.items()}


def test_its_versions_are_scored(earlier):
    for name in ("planes-det/Production", "planes-det/1", "planes-inst@production", "planes-unet/1"):
        done = earlier.score("--model", name, "--data", "data", "--out", "scored", "--overlays", "0")
        assert "images" in done.stdout
    now = pq.read_table(earlier.folder / "scored" / "planes-det-2" / "instances.parquet").to_pandas()
    then = pq.read_table(earlier.folder / "predictions" / "planes-det-2" / "instances.parquet").to_pandas()
    assert len(now) == len(then) > 0
    assert abs(now[["x1", "y1", "x2", "y2"]].to_numpy() - then[["x1", "y1", "x2", "y2"]].to_numpy()).max() < 0.1


def test_its_jobs_are_finished_and_exported(earlier):
    done = earlier.score("--model", "planes-det/1", "--data", "data", "--out", "half", "--shard", "1", "--overlays", "0")
    assert "1 of them scored before" in done.stdout
    done = earlier.score("--model", "planes-det/2", "--data", "data", "--out", "predictions", "--overlays", "0")
    assert "2 of them scored before" in done.stdout
    earlier.score("export", "predictions/planes-det-2", "--to", "coco", "--out", "exported")
    assert json.loads((earlier.folder / "exported" / "coco_results.json").read_text())


def test_its_history_goes_on(earlier):
    assert _aliases(earlier) == {"production": "2", "previous": "1"}
    moves = json.loads(earlier.registry("history", "planes-det", "--json").stdout)["moves"]
    assert [(m["move"]["origin"], m["move"]["to"], m["state"]) for m in moves] == [
        (None, "1", "committed"),
        ("1", "2", "committed"),
    ]
    # 0.6.0 knew no images by their content: the gate says so, and does not refuse.
    forced = ("--data", "data", "--force", "--reason", "back")
    done = earlier.registry("promote", "planes-det", "1", "--to", "production", *forced)
    assert "known" in done.stdout
    assert _aliases(earlier) == {"production": "1", "previous": "2"}
    earlier.registry("rollback", "planes-det")
    assert _aliases(earlier)["production"] == "2"
    earlier.registry("rollback", "planes-det")
    assert _aliases(earlier)["production"] == "1"
    shown = earlier.registry("history", "planes-det").stdout
    assert len([line for line in shown.splitlines() if "->" in line and "production" in line]) >= 5
    assert "planes-inst" in earlier.registry("list").stdout
    assert "journal" not in earlier.registry("list").stdout


def test_nothing_was_before_its_first_promotion(earlier):
    assert "no version is known" in error_line(earlier.registry("rollback", "planes-inst", code=1))
    assert earlier.registry("verify", "planes-det/1").returncode == 0


def test_its_checkpoint_is_gone_on_with(earlier):
    path = next((earlier.folder / ".planes" / "training").glob("stopped-*/checkpoint.pt"))
    assert torch.load(path, weights_only=True)["step"] == 3
    tiny = ("levels=[1]", "pooled_level=false", "anchor_sizes=[[32]]", "fpn_channels=8", "head_channels=8")
    tiny += ("backbone=mobilenet_v3_small", "min_size=null", "trainable_stages=5")
    more = ["window=64", "training.steps=5", "training.batch_size=1", "training.evaluate_every=100"]
    recipe = load_recipe("demo_detector", [*more, *(f"architecture.{one}" for one in tiny)])
    _, outcome = train_detector(recipe, open_dataset(earlier.data, "train"), None, folder=path.parent, device="cpu")
    assert [r["step"] for r in outcome.history] == [1, 2, 3, 4, 5]
