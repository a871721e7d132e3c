"""Calibrated probabilities in the table, the suggested threshold in the Kaggle CSV and in `--score-threshold auto`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

from models.errors import ModelError
from models.geometry.rle import rle_encode
from models.instances import Instances
from models.saved.scores import Scores
from pipelines.data.readers.opening import open_dataset
from scoring import common, use_cases
from scoring.cli import main
from scoring.jobs.export import export_job
from scoring.jobs.job import run_job
from scoring.requests import JobSettings, ScoreRequest
from scoring.writers.parquet import read_instances
from tests.conftest import write_image

SCORES = Scores(slope=0.6, intercept=-0.4, threshold=0.5, detections=100, fitted_on="validation")


class Two:
    """Two planes an image, scores 0.9 and 0.3, with masks."""

    def predict(self, images):
        results = []
        for i, image in enumerate(images):
            height, width = image.shape[:2]
            masks = []
            for rows in (slice(0, 4), slice(6, 9)):
                mask = np.zeros((height, width), bool)
                mask[rows, :5] = True
                masks.append(rle_encode(mask))
            boxes = [[0, 0, 5, 4], [0, 6, 5, 9]]
            results.append(Instances.make(str(i), height, width, boxes, [0.9, 0.3], masks=masks))
        return results


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    for i in range(7):
        write_image(folder / f"{i}.png", 20, 30, i)
    return folder


def _run(out, images, scores, **more):
    settings = JobSettings(shard_size=3, overlays=0, scores=scores, **more)
    return run_job(Two(), "m/1", open_dataset(images), out, settings=settings, progress=lambda r, *_: r)


def test_the_table_says_how_probable_each_plane_is(images, tmp_path):
    job = _run(tmp_path / "with", images, SCORES)
    table = pq.read_table(job.folder / "instances.parquet").to_pandas()
    odds = np.log(table.score / (1 - table.score))
    assert np.allclose(table.probability, 1 / (1 + np.exp(-(0.6 * odds - 0.4))), atol=1e-6)
    # All else is as without: scores, boxes, how it is read.
    plain = _run(tmp_path / "without", images, None)
    without = pq.read_table(plain.folder / "instances.parquet")
    assert "probability" not in without.schema.names
    assert table.drop(columns="probability").equals(without.to_pandas())
    assert [len(p) for p in read_instances(job.folder / "instances.parquet")] == [2] * 7


def _rows(path):
    return path.read_text().splitlines()[1:]


def test_the_kaggle_csv_holds_planes_from_the_suggested_score_on(images, tmp_path):
    job = _run(tmp_path / "with", images, SCORES)
    assert len(_rows(job.folder / "kaggle.csv")) == 7
    assert len(_rows(_run(tmp_path / "without", images, None).folder / "kaggle.csv")) == 14
    # Made later it is the same, and with a threshold of one's own it is that.
    export_job(job.folder, tmp_path / "later", ("kaggle", "coco"))
    assert (tmp_path / "later" / "kaggle.csv").read_bytes() == (job.folder / "kaggle.csv").read_bytes()
    assert (tmp_path / "later" / "coco_results.json").read_bytes() == (job.folder / "coco_results.json").read_bytes()
    export_job(job.folder, tmp_path / "all", ("kaggle",), score_threshold=0.0)
    assert len(_rows(tmp_path / "all" / "kaggle.csv")) == 14
    # Called again, a finished job stays what it is.
    before = (job.folder / "kaggle.csv").read_bytes()
    assert _run(tmp_path / "with", images, SCORES).resumed == 7
    assert (job.folder / "kaggle.csv").read_bytes() == before


def test_auto_is_the_version_s_own_threshold_or_an_error(monkeypatch, caplog):
    caplog.set_level("INFO")
    version, known = SimpleNamespace(label="planes-det/3"), SimpleNamespace(scores=SCORES)
    monkeypatch.setattr(use_cases, "read_spec", lambda folder: known)
    request = ScoreRequest(models=("planes-det/3",), data="x", settings=JobSettings(score_threshold=0.2))
    assert use_cases._threshold(request, version, Path()) == 0.2
    assert use_cases._threshold(replace(request, auto_threshold=True), version, Path()) == 0.5
    assert "planes-det/3: score threshold 0.500, of the best F1 on validation" in caplog.text
    known.scores = None
    with pytest.raises(ModelError, match=r"planes-det/3: suggests no score threshold .*; give --score-threshold"):
        use_cases._threshold(replace(request, auto_threshold=True), version, Path())


@pytest.mark.parametrize("text", ["1.5", "-0.1", "nan", "much"])
def test_a_threshold_that_is_none_is_said(text, tmp_path):
    result = CliRunner().invoke(main, ["--model", "m/1", "--data", str(tmp_path), "--score-threshold", text])
    assert result.exit_code == 2
    assert f"--score-threshold {text}: expected a number from 0 to 1, or auto" in result.output


def test_a_threshold_of_one_s_own_holds_for_the_kaggle_csv_too(images, tmp_path):
    assert len(_rows(_run(tmp_path / "low", images, SCORES, score_threshold=0.2).folder / "kaggle.csv")) == 14
    assert len(_rows(_run(tmp_path / "high", images, SCORES, score_threshold=0.95).folder / "kaggle.csv")) == 7


def test_other_tiles_than_the_version_s_own_have_no_probabilities(monkeypatch, caplog):
    caplog.set_level("INFO")
    monkeypatch.setattr(common, "read_spec", lambda folder: SimpleNamespace(scores=SCORES))
    assert common.scores_of("m/1", Path(), JobSettings(batch_size=4)) == SCORES
    assert common.scores_of("m/1", Path(), JobSettings(tiling={"size": 128})) is None
    assert "m/1: no probabilities" in caplog.text
