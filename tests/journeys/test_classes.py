"""A version is measured against the annotations of its own class, in every command that measures."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from models.engines.composed import ComposedArchitecture, save_composed
from models.errors import ModelError
from models.saved.allowed_files import SPEC_FILE
from tests.journeys.conftest import error_line

pytestmark = pytest.mark.xdist_group("journey")


def _of_class(saved: Path, into: Path, *classes: str) -> Path:
    """A copy of a saved folder that finds something else."""
    shutil.copytree(saved, into)
    spec = json.loads((into / SPEC_FILE).read_text())
    (into / SPEC_FILE).write_text(json.dumps({**spec, "classes": list(classes)}))
    return into


@pytest.fixture(scope="module")
def mixed(project, tmp_path_factory):
    """The test scenes with the first three planes of each called helicopters; heli/1 and heli/2 registered."""
    folder = tmp_path_factory.mktemp("mixed")
    shutil.copytree(project.data / "test", folder / "data" / "test")
    content = json.loads((project.data / "test_coco.json").read_text())
    content["categories"] = [{"id": 1, "name": "plane"}, {"id": 2, "name": "Helicopter"}]
    seen: dict[int, int] = {}
    for entry in content["annotations"]:
        seen[entry["image_id"]] = seen.get(entry["image_id"], 0) + 1
        entry["category_id"] = 2 if seen[entry["image_id"]] <= 3 else 1
    (folder / "data" / "test_coco.json").write_text(json.dumps(content))
    saved = next((project.folder / ".planes" / "training").glob("planes-det-*/model"))
    heli = _of_class(saved, folder / "heli", "helicopter")
    both = _of_class(saved, folder / "both", "plane", "helicopter")
    for _ in range(2):
        project.register(heli, "heli")
    planes = sum(e["category_id"] == 1 for e in content["annotations"])
    return project, str(folder / "data"), planes, both


def _write_truth(table, content, category):
    """Detections that are the annotations of a category, in place of those of a table."""
    images = {i["id"]: i for i in content["images"]}
    rows = []
    for entry in content["annotations"]:
        if entry["category_id"] == category:
            x, y, w, h = entry["bbox"]
            image = images[entry["image_id"]]
            row = {"image_id": Path(image["file_name"]).stem, "instance": len(rows), "score": 0.9, "label": 0}
            row |= {"x1": x, "y1": y, "x2": x + w, "y2": y + h, "height": image["height"], "width": image["width"]}
            rows.append(row)
    schema = pq.read_schema(table)
    pq.write_table(pa.Table.from_pylist([dict.fromkeys(schema.names) | row for row in rows], schema=schema), table)


def _counted(folder):
    return {e["settings"]["planes"] for e in json.loads((folder / "metrics.json").read_text())}


def test_score_counts_the_annotations_of_each_class(mixed, tmp_path):
    project, data, planes, _ = mixed
    both = ("--model", "heli/1", "--model", "planes-det/1", "--data", data, "--out", str(tmp_path), "--overlays", "0")
    done = project.score(*both, code=1)
    assert _counted(tmp_path / "heli-1") == {6}
    assert _counted(tmp_path / "planes-det-1") == {planes}
    assert "scored, but not compared: heli/1 finds helicopter, planes-det/1 finds plane" in error_line(done)
    assert json.loads((tmp_path / "heli-1" / "manifest.json").read_text())["category"] == "helicopter"
    assert json.loads((tmp_path / "heli-1" / "manifest.json").read_text())["category_id"] == 2
    table = tmp_path / "heli-1" / "instances.parquet"
    _write_truth(table, json.loads((Path(data) / "test_coco.json").read_text()), 2)
    assert "100.000" in project.score("evaluate", str(table), "--data", data).stdout
    assert "100.000" not in project.score("evaluate", str(table), "--data", data, "--category", "plane").stdout


def test_compare_takes_the_class_of_versions_runs_and_jobs(mixed, tmp_path):
    project, data, _, _ = mixed
    done = project.score("compare", "heli/1", "heli/2", "--data", data, "--out", str(tmp_path / "one"))
    run = re.search(r"outputs in \S+, run (\w+)", done.stdout)[1]
    assert f"{Path(data).name} test: 2 images, 6 planes" in done.stdout
    again = project.score("compare", run, str(tmp_path / "one" / "heli-2"), "--out", str(tmp_path / "two"))
    assert "2 images, 6 planes" in again.stdout
    refused = error_line(project.score("compare", "heli/1", "planes-det/1", "--data", data, code=1))
    assert "compare: heli/1 finds helicopter, planes-det/1 finds plane; only versions of one class" in refused


def test_promote_judges_by_the_class_of_the_version(mixed, tmp_path):
    project, data, _, _ = mixed
    gates = tmp_path / "gates.yaml"
    gates.write_text("gates: {production: {min_planes: 6}}")
    done = project.registry("promote", "heli/1", "--to", "production", "--data", data, "--gates", str(gates))
    assert re.search(r"pass +planes +data/test +>= 6 +6 ", done.stdout)
    gates.write_text("gates: {production: {min_planes: 7}}")
    project.registry("promote", "heli/2", "--to", "production", "--data", data, "--gates", str(gates), code=2)


def test_a_class_that_the_data_does_not_know_is_an_error(mixed, tmp_path):
    project, _, _, _ = mixed
    done = project.score("--model", "heli/1", "--data", str(project.data), "--out", str(tmp_path), code=1)
    assert "no category 'helicopter'; it has: plane" in error_line(done)


def test_a_version_of_several_classes_is_not_measured_by_one(mixed, tmp_path):
    project, data, _, both = mixed
    done = project.score("--model", str(both), "--data", data, "--out", str(tmp_path), code=1)
    assert "both: finds 2 classes (plane, helicopter) and can only be measured by one" in error_line(done)


def test_one_version_under_two_names_is_scored_once(project, tmp_path):
    project.client.set_registered_model_alias("planes-det", "twice", "1")
    names = ("--model", "planes-det/1", "--model", "planes-det@twice", "--model", "models:/planes-det/1")
    done = project.score(*names, "--data", str(project.data), "--out", str(tmp_path), "--overlays", "0")
    assert "planes-det@twice is planes-det/1, which is named already: scored once" in done.stdout
    assert len(list(tmp_path.glob("*/instances.parquet"))) == 1
    saved = next((project.folder / ".planes" / "training").glob("planes-det-*/model"))
    copies = [str(shutil.copytree(saved, tmp_path / name / "m")) for name in "ab"]
    done = project.score("--model", copies[0], "--model", copies[1], "--data", str(project.data), code=1)
    assert "both are called m; score them into different --out" in error_line(done)


def test_parts_of_different_classes_are_not_composed(project, tmp_path):
    training = project.folder / ".planes" / "training"
    detector = _of_class(next(training.glob("planes-det-*/model")), tmp_path / "heli", "helicopter")
    unet = next(training.glob("planes-unet-*/model"))
    with pytest.raises(ModelError, match="different classes"):
        save_composed(tmp_path / "c", detector, unet, architecture=ComposedArchitecture(), components={})
