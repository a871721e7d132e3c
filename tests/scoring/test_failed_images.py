"""An image that fails counts as one without detections, the same in score, evaluate, compare and promotion."""

from __future__ import annotations

import json

import numpy as np
import pytest
from click.testing import CliRunner

from models.errors import DataError
from models.geometry.rle import rle_encode
from models.instances import Instances
from pipelines.data.readers.opening import open_dataset
from pipelines.evaluation.side_by_side import measure
from scoring import cli
from scoring.comparison.candidates import from_file, from_job
from scoring.comparison.compare import Candidate, compare
from scoring.comparison.evaluate_file import evaluate_file
from scoring.comparison.report import write_report
from scoring.jobs import manifest as plan
from scoring.jobs.job import run_job
from scoring.requests import JobSettings
from tests.conftest import write_image
from tests.stores import new_store

BOX = [10.0, 10.0, 40.0, 40.0]
OUTLINE = [10, 10, 40, 10, 40, 40, 10, 40]


class Finder:
    """Finds the plane of every image but those of the widths in ``blind``; those in ``broken`` it cannot take."""

    def __init__(self, blind=(), broken=(), error=MemoryError):
        self.blind, self.broken, self.error = blind, broken, error

    def predict(self, images):
        predictions = []
        for i, image in enumerate(images):
            height, width = image.shape[:2]
            if width in self.broken:
                raise self.error("out of memory")
            boxes = [] if width in self.blind else [BOX]
            mask = np.zeros((height, width), bool)
            mask[10:40, 10:40] = True
            predictions.append(
                Instances.make(str(i), height, width, boxes, [0.9] * len(boxes), masks=[rle_encode(mask)] * len(boxes))
            )
        return predictions


class Crops(Finder):
    """The same as a segmenter of given boxes."""

    def masks_in_boxes(self, images, boxes):
        return [list(one.masks) for one in self.predict(images)]


def _set(folder, count=5):
    """Images of 80, 81, ... pixels' width with a plane each."""
    images, annotations = [], []
    for i in range(count):
        write_image(folder / "test" / f"{i}.png", 60, 80 + i, i)
        images.append({"id": i + 1, "file_name": f"{i}.png", "height": 60, "width": 80 + i})
        annotations.append(
            {"id": i + 1, "image_id": i + 1, "category_id": 1, "bbox": [10, 10, 30, 30], "segmentation": [OUTLINE]}
        )
    content = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "plane"}]}
    (folder / "test_coco.json").write_text(json.dumps(content))
    return folder


def _open(folder):
    return open_dataset(folder, "test", keep=True)


def _score(folder, out, predictor, label="m/1", overlays=2):
    return run_job(
        predictor, label, _open(folder), out, settings=JobSettings(overlays=overlays), progress=lambda items, *_: items
    )


def _everywhere(folder, out, predictor):
    """AP of boxes and masks by score, evaluate, compare and promotion."""
    job, dataset = _score(folder, out, predictor), _open(folder)
    file = evaluate_file(job.folder / "instances.parquet", dataset, score_threshold=0.05, convention="course")
    csv = evaluate_file(job.folder / "kaggle.csv", dataset, score_threshold=0.05, convention="course")
    told = CliRunner().invoke(
        cli.main, ["evaluate", str(job.folder / "instances.parquet"), "--data", str(folder), "--json"]
    )
    metrics = json.loads(told.stdout)["metrics"]
    assert (metrics["AP"], metrics["mask_AP"]) == (file[0].metrics["AP"], file[1].metrics["AP"])
    other = Candidate("other", [], failed=0)
    by_job, by_file = (compare(dataset, [one, other]) for one in (from_job(job), from_file(str(job.folder), dataset)))
    measured = measure({"m": predictor}, dataset, lambda items, *_: items)["m"]
    boxes = [job.metrics["AP"], file[0].metrics["AP"], measured.metrics["AP"]]
    boxes += [c.metrics["bbox"][c.labels[0]]["AP"] for c in (by_job, by_file)]
    masks = [job.metrics["mask_AP"], file[1].metrics["AP"], csv[0].metrics["AP"], measured.metrics["mask_AP"]]
    failed = [int(job.metrics["images_failed"]), job.failures, len(measured.failed)]
    failed += [e.settings["images_failed"] for e in (*file, *csv, measured.evaluation)]
    assert len(set(failed)) == 1, failed
    rows = [c.table([one, other])["failed"].tolist() if failed[0] else [] for c, one in ((by_job, from_job(job)),)]
    assert rows == ([[failed[0], 0]] if failed[0] else [[]])
    return boxes, masks, failed[0]


@pytest.mark.parametrize("error", [MemoryError, RuntimeError, DataError])
def test_images_that_fail_count_as_images_that_are_missed(tmp_path, error):
    folder = _set(tmp_path / "data")
    missed = _everywhere(folder, tmp_path / "missed", Finder(blind=(81, 83)))
    failed = _everywhere(folder, tmp_path / "failed", Finder(broken=(81, 83), error=error))
    assert missed[2] == 0
    assert failed[2] == 2
    assert failed[:2] == missed[:2]
    assert len(set(failed[0])) == len(set(failed[1])) == 1
    assert failed[0][0] == pytest.approx(0.604, abs=0.01)


def test_two_images_that_fail_cost_what_two_missed_ones_do(tmp_path):
    folder = _set(tmp_path / "data")
    missed = _score(folder, tmp_path / "missed", Finder(blind=(81, 83)))
    failed = _score(folder, tmp_path / "failed", Finder(broken=(81, 83)))
    assert failed.metrics["AP"] == missed.metrics["AP"] == pytest.approx(0.604, abs=0.01)


@pytest.mark.parametrize("damage", ["removed", "text", "cut", "cut header"])
def test_images_that_cannot_be_read_count_the_same(tmp_path, damage):
    folder = _set(tmp_path / "data")
    expected = _everywhere(folder, tmp_path / "missed", Finder(blind=(81, 83)))
    for name in ("1.png", "3.png"):
        path = folder / "test" / name
        content = path.read_bytes()
        cut = {"removed": None, "text": b"no image", "cut": content[: len(content) * 2 // 3], "cut header": content[:20]}[
            damage
        ]
        path.unlink()
        if cut is not None:
            path.write_bytes(cut)
    boxes, masks, failed = _everywhere(folder, tmp_path / "failed", Finder())
    assert failed == 2
    assert (boxes, masks) == expected[:2]
    lost = [s for s in _open(folder).samples if s.lost]
    assert [(s.height, s.width, len(s.boxes), s.has_masks) for s in lost] == [(60, 81, 1, True), (60, 83, 1, True)]


def test_a_segmenters_failed_image_has_an_iou_of_0(tmp_path):
    folder = _set(tmp_path / "data", 4)
    job = _score(folder, tmp_path / "out", Crops(broken=(81,)))
    assert (job.metrics["IoU"], job.metrics["IoU_min"], job.metrics["images_failed"]) == (0.75, 0.0, 1.0)
    (folder / "test" / "2.png").unlink()
    measured = measure({"m": Crops(broken=(81,))}, _open(folder), lambda items, *_: items)["m"]
    assert (measured.metrics["IoU"], len(measured.failed)) == (0.5, 2)
    assert measured.of_size("small", "IoU") == 0.5


def test_how_many_failed_stands_in_the_files_and_on_the_page(tmp_path):
    folder = _set(tmp_path / "data")
    (folder / "test" / "2.png").unlink()
    jobs = [
        _score(folder, tmp_path / "out", Finder(broken=(84,)), "a/1"),
        _score(folder, tmp_path / "out", Finder(), "b/2"),
    ]
    content = json.loads((jobs[0].folder / "metrics.json").read_text())
    assert [c["settings"]["images_failed"] for c in content] == [2, 2]
    assert content[0]["metrics"]["images_failed"] == 2
    candidates = [from_job(job) for job in jobs]
    comparison = compare(_open(folder), candidates)
    page = write_report(comparison, candidates, _open(folder), tmp_path / "report.html").read_text()
    assert "count as images without detections: a/1 2, b/2 1." in page
    assert {c.missed for c in comparison.images if c.image_id == "2"} == {(1, 1)}


def test_a_course_set_keeps_the_planes_of_its_lost_images(tmp_path):
    folder = _set(tmp_path / "data", 3)
    entries = [
        {"id": i, "file_name": f"{i}.png", "category_name": "plane", "bbox": [10, 10, 30, 30], "segmentation": [OUTLINE]}
        for i in range(3)
    ]
    (folder / "test_coco.json").unlink()
    (folder / "test.json").write_text(json.dumps(entries))
    (folder / "test" / "1.png").unlink()
    dataset = _open(folder)
    (lost,) = [s for s in dataset.samples if s.lost]
    assert (lost.height, lost.width, lost.masks[0] is not None) == (40, 40, True)
    assert dataset.planes == 3
    assert len(open_dataset(folder, "test")) == 2


def test_a_job_of_an_earlier_release_over_lost_images_is_gone_on_with(tmp_path):
    """Its digest left out what was missing or unreadable, and counted what was cut."""
    folder = _set(tmp_path / "data")
    whole = open_dataset(folder, "test")
    rest = whole.subset(["0", "2", "3", "4"], "test")
    assert rest.digest() != whole.digest()
    for lose in (lambda path: path.unlink(), lambda path: path.write_bytes(b"no image")):
        lose(folder / "test" / "1.png")
        lost = _open(folder)
        assert lost.digest() != rest.digest()
        assert lost.digest_with(lost.file_digests(), as_in_060=True) == rest.digest()
    job = _score(folder, tmp_path / "out", Finder())
    manifest = json.loads((job.folder / "manifest.json").read_text())
    manifest["inputs"] = plan.digest_in_order(_open(folder), as_in_060=True)
    (job.folder / "manifest.json").write_text(json.dumps(manifest))
    assert _score(folder, tmp_path / "out", Finder()).resumed == 5


def test_predictions_on_another_size_are_refused(tmp_path):
    folder = _set(tmp_path / "data")
    job = _score(folder, tmp_path / "out", Finder())
    path = folder / "test" / "1.png"
    write_image(path, 120, 162)
    dataset = _open(folder)
    assert dataset.samples[1].boxes.tolist() == [[20, 20, 80, 80]]
    message = r"instances\.parquet: image '1' is 81x60, in data/test it is 162x120; score the data set's own images"
    with pytest.raises(DataError, match=message):
        evaluate_file(job.folder / "instances.parquet", dataset, score_threshold=0.05, convention="course")
    with pytest.raises(DataError, match=message):
        from_file(str(job.folder), dataset)
    path.unlink()
    boxes, *_ = evaluate_file(job.folder / "instances.parquet", _open(folder), score_threshold=0.05, convention="course")
    assert boxes.metrics["AP"] > 0.99


def test_every_evaluation_opens_its_data_with_the_lost_images(tmp_path, monkeypatch):
    from click.testing import CliRunner

    from pipelines.registry.gates import GateFile
    from pipelines.registry.model_versions import Registry
    from pipelines.use_cases.promote import open_gate_data
    from pipelines.use_cases.training import open_test
    from scoring import use_cases
    from scoring.cli import main

    folder = _set(tmp_path / "data")
    jobs = [_score(folder, tmp_path / "out", Finder(), label) for label in ("a/1", "b/2")]
    (folder / "test" / "1.png").unlink()
    assert len(open_test(str(folder), "plane", None)) == 5
    assert len(open_gate_data("m/1", [str(folder)], None, GateFile(gates={}), category="plane")[0]) == 5
    done = CliRunner().invoke(main, ["evaluate", str(jobs[0].folder / "instances.parquet"), "--data", str(folder)])
    assert done.exit_code == 0, done.output
    assert "5 images" in done.output

    opened = []
    monkeypatch.setattr(
        use_cases,
        "finish",
        lambda registry, candidates, dataset, out, groups: opened.append(dataset) or use_cases.Compared(None),
    )
    targets = tuple(str(job.folder) for job in jobs)
    registry = Registry.connect(new_store(tmp_path / "mlflow.db"))
    request = use_cases.ComparisonRequest(targets=targets, data=str(folder), out=str(tmp_path / "c"), device="cpu")
    use_cases.compare_targets(registry, request)
    assert [len(dataset) for dataset in opened] == [5]


def test_metrics_of_a_run_that_left_failed_images_out_are_not_shown(monkeypatch):
    from types import SimpleNamespace

    from scoring import mlflow_log
    from scoring.comparison.compare import comparison_table

    def run(**metrics):
        data = SimpleNamespace(
            tags={"task": "score", "version": "m/1"}, metrics={"images": 3, "seconds": 1.0, **metrics}, params={}
        )
        return SimpleNamespace(data=data, inputs=SimpleNamespace(dataset_inputs=[]))

    runs = {
        "old": run(errors=2, **{"test/AP": 1.0}),
        "new": run(errors=2, **{"test/AP": 0.4, "test/images_failed": 2}),
        "whole": run(errors=0, **{"test/AP": 0.7}),
    }
    client = SimpleNamespace(get_run=runs.__getitem__)
    scored = [mlflow_log.load_scored(client, name) for name in runs]
    assert [one.leaves_out for one in scored] == [True, False, False]
    table = comparison_table(scored)
    assert np.isnan(table.AP[0])
    assert table.AP[1:].tolist() == [0.4, 0.7]
    assert table.failed.tolist() == [2, 2, 0]


def test_what_is_guessed_of_a_lost_image_stands_in_no_file(tmp_path):
    import pyarrow.parquet as pq

    folder = _set(tmp_path / "data")
    (folder / "test" / "1.png").unlink()
    write_image(folder / "test" / "3.png", 90, 10)
    job = _score(folder, tmp_path / "out", Finder(), overlays=5)
    rows = pq.read_table(job.folder / "inputs.parquet").to_pylist()
    assert [(r["height"], r["width"]) for r in rows] == [(60, 80), (0, 0), (60, 82), (0, 0), (60, 84)]
    errors = {r["image_id"]: r["kind"] for r in pq.read_table(job.folder / "errors.parquet").to_pylist()}
    assert errors == {"1": "missing", "3": "other size"}
    # Its annotations would lie in pixels that they were not made on.
    assert sorted(path.name for path in (job.folder / "overlays").iterdir()) == ["0.jpg", "2.jpg", "4.jpg"]
