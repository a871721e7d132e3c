"""How image files become RGB is a setting of the job and of the version: stored in both, followed everywhere."""

from __future__ import annotations

import json

import cv2
import numpy as np
import pytest

from models.engines.composed import ComposedArchitecture, save_composed
from models.errors import DataError, ModelError, RecipeError
from models.images.rendering import Rendering
from models.saved.folder import read_weights, save_model
from models.saved.spec import read_spec
from pipelines.data.loading.cache import MOST_OPEN, ImageCache
from pipelines.data.readers.opening import open_dataset
from pipelines.evaluation.side_by_side import measure
from pipelines.recipes.reading import load_recipe
from scoring.jobs.export import export_job
from scoring.jobs.job import run_job
from scoring.jobs.manifest import MANIFEST
from scoring.requests import JobSettings
from tests.models.test_contract import _detector, _segmenter
from tests.models.test_rasters import PLANE, RGB, scene, tiff
from tests.scoring.test_job import Brightness

FIXED = Rendering(range=(0, 2047), bands=(1, 1, 1))


@pytest.fixture
def rasters(tmp_path):
    """Two 11-bit images."""
    (tmp_path / "in").mkdir()
    for i in range(2):
        tiff(tmp_path / "in" / f"{i}.tif", scene(400 + 100 * i, 1500, 20, "uint16"), **RGB)
    return tmp_path / "in"


def _job(out, data, rendering, **more):
    settings = JobSettings(score_threshold=0.0, overlays=1, **more)
    return run_job(
        Brightness(), "m/1", open_dataset(data).rendered(rendering), out, settings=settings, progress=lambda r, *_: r
    )


def test_a_job_is_scored_with_its_range_and_keeps_it(rasters, tmp_path):
    job = _job(tmp_path / "out", rasters, FIXED)
    manifest = json.loads((job.folder / MANIFEST).read_text())
    assert manifest["settings"]["rendering"] == {"range": [0, 2047], "bands": [1, 1, 1]}
    from scoring.writers.parquet import read_instances

    expected = np.mean(scene(400, 1500, 20, "uint16")[0] / 2047)
    assert read_instances(job.folder / "instances.parquet")[0].scores[0] == pytest.approx(expected, abs=0.01)
    with pytest.raises(DataError, match=r"holds a scoring with rendering .*2047.*not .*auto.*--fresh"):
        _job(tmp_path / "out", rasters, Rendering())
    assert _job(tmp_path / "out", rasters, FIXED).resumed == 2


def test_pictures_are_drawn_as_the_job_saw_the_images(rasters, tmp_path):
    job = _job(tmp_path / "out", rasters, FIXED)
    export_job(job.folder, tmp_path / "later", {"overlays"})
    for folder in (job.folder, tmp_path / "later"):
        picture = cv2.imread(str(next((folder / "overlays").glob("*.jpg"))))[:, :, 0]
        assert picture[100:140, 150:200].mean() == pytest.approx(400 / 2047 * 255, abs=4)


def test_a_job_of_an_earlier_release_goes_on(rasters, tmp_path):
    job = _job(tmp_path / "out", rasters, Rendering())
    content = json.loads((job.folder / MANIFEST).read_text())
    del content["settings"]["rendering"]
    (job.folder / MANIFEST).write_text(json.dumps(content))
    assert _job(tmp_path / "out", rasters, Rendering()).resumed == 2
    with pytest.raises(DataError, match="rendering"):
        _job(tmp_path / "out", rasters, FIXED)


def test_a_version_keeps_what_it_was_trained_with(tmp_path):
    recipe = load_recipe("demo_unet", ["data.range=[0, 2047]", "data.bands=[4, 3, 2]"])
    assert recipe.data.rendering == Rendering(range=(0, 2047), bands=(4, 3, 2))
    assert recipe.key() != load_recipe("demo_unet").key()
    for bad in ("data.range=[9, 1]", "data.bands=[1, 2]", "data.range=wide"):
        with pytest.raises(RecipeError, match=r"data"):
            load_recipe("demo_unet", [bad])
    folder = _segmenter(tmp_path / "u", network="unet", encoder="resnet18")
    old = read_spec(folder)
    assert old.rendering == Rendering()
    save_model(folder, old.model_copy(update={"rendering": FIXED}), read_weights(folder))
    assert read_spec(folder).rendering == FIXED
    with pytest.raises(ModelError, match="detector and segmenter read image files differently"):
        save_composed(tmp_path / "c", _detector(tmp_path / "d"), folder, ComposedArchitecture(), components={})


def test_versions_are_measured_each_with_its_own_range(rasters):
    both = {"a": Brightness(), "b": Brightness()}
    dataset = open_dataset(rasters)
    from dataclasses import replace

    truth = replace(dataset, samples=tuple(replace(s, truth=True, height=150, width=210) for s in dataset.samples))
    measured = measure(both, truth, lambda items, *_: items, kept=None, renderings={"a": FIXED})
    assert measured["a"].predictions[0].scores[0] == pytest.approx(
        np.mean(scene(400, 1500, 20, "uint16")[0] / 2047), abs=0.01
    )
    assert abs(measured["b"].predictions[0].scores[0] - measured["a"].predictions[0].scores[0]) > 0.05


def test_training_reads_what_the_recipe_says(rasters):
    sample = open_dataset(rasters).rendered(FIXED).samples[0]
    image = ImageCache().read(sample)
    assert image[PLANE].mean() == pytest.approx(1500 / 2047 * 255, abs=2)
    assert (sample.read() == image).all()
    cache = ImageCache()
    assert not (cache.read(open_dataset(rasters).samples[0]) == cache.read(sample)).all()


def test_the_cache_lets_go_of_files_that_are_read_by_windows(tmp_path, monkeypatch):
    monkeypatch.setattr("models.images.windows.WINDOWED_PIXELS", 100)
    for i in range(MOST_OPEN + 5):
        tiff(tmp_path / f"{i}.tif", scene(90, 230, 6, "uint8"), **RGB)
    cache = ImageCache()
    for sample in open_dataset(tmp_path).samples:
        cache.read(sample)
    assert len(cache._opened) == MOST_OPEN


def test_images_that_fill_little_of_their_range_are_counted_once(rasters, tmp_path):
    deep = Rendering(range="depth")
    job = _job(tmp_path / "deep", rasters, deep, shard_size=1)
    assert (job.little, job.first_little) == (2, "0")
    assert _job(tmp_path / "deep", rasters, deep, shard_size=1).little == 2
    assert _job(tmp_path / "auto", rasters, Rendering()).little == 0

    def stopping(results, *_):
        for number, result in enumerate(results):
            if number == 1:
                raise KeyboardInterrupt
            yield result

    dataset, settings = open_dataset(rasters).rendered(deep), JobSettings(score_threshold=0.0, overlays=0, shard_size=1)
    with pytest.raises(KeyboardInterrupt):
        run_job(Brightness(), "m/1", dataset, tmp_path / "half", settings=settings, progress=stopping)
    assert run_job(Brightness(), "m/1", dataset, tmp_path / "half", settings=settings, progress=lambda r, *_: r).little == 2
