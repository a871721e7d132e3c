"""What a served request may hold: rows that are no paths unless whoever starts the server says so, and params."""

from __future__ import annotations

import base64
import os
import sys
import types

import cv2
import mlflow
import numpy as np
import pandas as pd
import pytest
import torch

from models.engines.torchvision.network import build_detector
from models.engines.torchvision.predictor import detector_spec
from models.images.rendering import DEFAULT
from models.instances import Instances
from models.loading import load_model
from models.pyfunc import MOST_PIXELS, MOST_ROWS, SERVERS, Params, PlanesModel, image_bytes, paths_allowed, together
from models.saved.folder import save_model
from models.tiling.settings import Tiling
from tests.models.test_contract import MAKERS, SMALL


@pytest.fixture(autouse=True)
def unset(monkeypatch):
    monkeypatch.delenv("PLANES_ALLOW_PATHS", raising=False)
    for name in SERVERS:
        monkeypatch.delitem(sys.modules, name, raising=False)


@pytest.mark.parametrize("server", SERVERS)
def test_a_server_takes_no_paths_unless_it_is_told_to(server, monkeypatch):
    assert paths_allowed()
    monkeypatch.setitem(sys.modules, server, types.ModuleType(server))
    assert not paths_allowed()
    monkeypatch.setenv("PLANES_ALLOW_PATHS", "1")
    assert paths_allowed()


def test_any_process_can_be_told_to_take_no_paths(monkeypatch):
    monkeypatch.setenv("PLANES_ALLOW_PATHS", "0")
    assert not paths_allowed()


def test_the_disk_is_not_looked_at_where_paths_are_not_allowed(tmp_path, monkeypatch):
    (tmp_path / "there.png").write_bytes(b"x")
    monkeypatch.chdir(tmp_path)
    looked = []
    monkeypatch.setattr(os.path, "exists", lambda path: looked.append(path) or True)
    messages = []
    for path in ("there.png", "absent.png"):
        with pytest.raises(mlflow.MlflowException) as error:
            image_bytes(path, paths=False)
        messages.append(str(error.value).replace(path, "PATH"))
    assert len(set(messages)) == 1
    assert "this server takes no paths" in messages[0]
    assert looked == []


def test_bytes_base64_and_data_urls_are_understood(tmp_path):
    content = bytes(range(256))
    text = base64.b64encode(content).decode()
    for value in (content, text, f"data:image/png;base64,{text}"):
        assert image_bytes(value, paths=False) == content
    (tmp_path / "a.png").write_bytes(content)
    assert image_bytes(str(tmp_path / "a.png"), paths=True) == str(tmp_path / "a.png")
    for odd in ("http://127.0.0.1/a.png", "file:///etc/passwd", "s3://bucket/a.png", ""):
        if odd:
            with pytest.raises(mlflow.MlflowException, match="not a base64-encoded image file"):
                image_bytes(odd, paths=True)


@pytest.fixture(params=["detector", "mask rcnn", "composed", "unet"])
def served(request, tmp_path):
    """A served model as MLflow loads it, over a small random network."""
    return _served(MAKERS[request.param](tmp_path / "m"))


def _served(folder):
    model = PlanesModel()
    model.folder, model.device, model.rendering = folder, "cpu", DEFAULT
    model.predictor, model.retiled = load_model(folder), (None, None)
    return model


def _rows(count=5):
    rng = np.random.default_rng(3)
    sizes = [(96, 128), (128, 96), (96, 128), (40, 50), (96, 128)][:count]
    images = [rng.integers(0, 256, (*size, 3), dtype=np.uint8) for size in sizes]
    return pd.DataFrame({"image": [base64.b64encode(cv2.imencode(".png", i)[1]).decode() for i in images]})


def test_rows_that_are_predicted_together_give_what_each_gives_by_itself(served):
    rows = _rows()
    answer = served.predict(None, rows)
    assert list(dict.fromkeys(answer.image_id)) == [str(i) for i in range(len(rows)) if str(i) in set(answer.image_id)]
    for i in range(len(rows)):
        alone = served.predict(None, rows.iloc[[i]].reset_index(drop=True))
        mine = answer[answer.image_id == str(i)]
        assert len(alone) == len(mine)
        np.testing.assert_allclose(mine[["x1", "y1", "x2", "y2"]], alone[["x1", "y1", "x2", "y2"]], atol=1e-2)
        np.testing.assert_allclose(mine.score, alone.score, atol=1e-4)
    assert served.predict(None, rows.iloc[:0]).empty


class _Counting:
    """Finds one plane in each image, and notes how many images come at a time."""

    def __init__(self):
        self.calls = []

    def predict(self, images):
        self.calls.append(len(images))
        return [Instances.make(str(i), *x.shape[:2], [[1, 2, 3, 4]], [0.5]) for i, x in enumerate(images)]


def test_few_rows_at_a_time_and_large_images_by_themselves():
    small, large = np.zeros((100, 100, 3), np.uint8), np.zeros((2, MOST_PIXELS, 3), np.uint8)
    images = [*[small] * (MOST_ROWS + 1), large, small]
    assert [len(batch) for batch in together(images)] == [MOST_ROWS, 1, 1, 1]
    assert [i.shape for batch in together(images) for i in batch] == [i.shape for i in images]
    half = np.zeros((2, MOST_PIXELS // 4, 3), np.uint8)
    assert [len(batch) for batch in together([half] * 5)] == [2, 2, 1]


def test_small_rows_of_a_request_reach_the_model_together(tmp_path):
    model = _served(MAKERS["detector"](tmp_path / "m"))
    model.predictor = _Counting()
    answer = model.predict(None, pd.concat([_rows()] * 2))
    assert model.predictor.calls == [MOST_ROWS, 2]
    assert answer.image_id.tolist() == [str(i) for i in range(10)]


def test_params_ask_for_less_or_for_other_tiles(tmp_path):
    model = _served(MAKERS["composed"](tmp_path / "m"))
    rows = _rows(2)
    plain = model.predict(None, rows)
    assert model.predict(None, rows, {"score_threshold": None, "tile": None}).equals(plain)
    middle = float(plain.score.median())
    fewer = model.predict(None, rows, {"score_threshold": middle})
    assert 0 < len(fewer) < len(plain)
    assert fewer.score.min() >= np.float32(middle)
    assert model.predict(None, rows, {"score_threshold": 1.0}).empty
    for tile in (64, 0):
        expected = load_model(model.folder, tiling={"size": tile}).predict(list(model._images(rows.image)))
        answer = model.predict(None, rows, {"tile": tile})
        assert len(answer) == sum(map(len, expected))
        np.testing.assert_allclose(answer.score, np.concatenate([e.scores for e in expected]), atol=1e-4)
    # The networks are the same: memory holds them once.
    assert model.retiled[1].segmenter is model.predictor.segmenter
    assert model.predict(None, rows).equals(plain)


def test_other_tiles_take_the_place_of_those_that_a_version_has(tmp_path):
    torch.manual_seed(0)
    spec = detector_spec(SMALL, ["plane"], tiling=Tiling(size=64, overlap=0.5))
    model = _served(save_model(tmp_path / "m", spec, build_detector(SMALL, 1).state_dict()))
    rows = _rows(2)
    images = list(model._images(rows.image))
    for tile in (96, 0):
        expected = load_model(model.folder, tiling={"size": tile}).predict(images)
        answer = model.predict(None, rows, {"tile": tile})
        np.testing.assert_allclose(answer.score, np.concatenate([e.scores for e in expected]), atol=1e-4)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"score_threshold": 1.5}, "score_threshold 1.5: expected a number from 0 to 1"),
        ({"score_threshold": float("nan")}, "score_threshold nan: expected a number from 0 to 1"),
        ({"tile": 7}, "tile 7: tiles: size: Input should be greater than or equal to 32"),
        ({"tile": -1}, "tile -1: tiles: size: Input should be greater than or equal to 32"),
    ],
)
def test_params_out_of_range_are_refused_in_one_line(params, message, tmp_path):
    model = _served(MAKERS["detector"](tmp_path / "m"))
    with pytest.raises(mlflow.MlflowException) as error:
        model.predict(None, _rows(1), params)
    assert (str(error.value), error.value.get_http_status_code()) == (message, 400)


def test_a_row_that_is_no_image_is_named(tmp_path):
    model = _served(MAKERS["detector"](tmp_path / "m"))
    rows = pd.DataFrame({"image": [*_rows(1).image, base64.b64encode(b"no image").decode()]})
    with pytest.raises(mlflow.MlflowException, match=r"^row 1: image bytes: ") as error:
        model.predict(None, rows)
    assert error.value.get_http_status_code() == 400


def test_a_segmenter_takes_no_tiles(tmp_path):
    model = _served(MAKERS["unet"](tmp_path / "m"))
    with pytest.raises(mlflow.MlflowException, match="tile 64: tiles: this model segments planes in given boxes"):
        model.predict(None, _rows(1), {"tile": 64})
    assert Params.of({}) == Params.of(None) == Params(None, None)
