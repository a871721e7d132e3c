"""An example predicted again: rounding of other machines passes, anything else does not."""

from types import SimpleNamespace

import numpy as np
import pytest

from models.engines.torchvision.predictor import guess_strides
from models.errors import EngineMissing
from models.geometry.rle import rle_encode
from models.instances import Instances
from models.loading import load_model
from pipelines.registry import verification
from pipelines.registry.verification import _compare, verify
from tests.models.test_contract import MAKERS


def _example(move=0.0, score=0.0, rows=20, masks=True, planes=2):
    boxes = np.array([[2, 2, 22, 22], [30, 30, 50, 50]], np.float32)[:planes]
    dense = np.zeros((2, 60, 60), bool)
    dense[0, 2 : 2 + rows, 2:22] = dense[1, 30:50, 30:50] = True
    outlines = [rle_encode(mask) for mask in dense[:planes]] if masks else None
    return Instances.make("0", 60, 60, boxes + move, np.array([0.9, 0.6])[:planes] - score, masks=outlines)


@pytest.mark.parametrize(
    ("change", "passed"),
    [
        ({"move": 0.01, "score": 0.001}, True),
        ({"move": 0.6}, False),
        ({"score": 0.02}, False),
        ({"rows": 19}, False),
        ({"masks": False}, False),
        ({"planes": 1}, False),
        ({"planes": 0}, False),
    ],
)
def test_what_is_as_logged(change, passed):
    assert _compare(_example(**change), _example()).passed == passed


def test_a_model_whose_library_is_missing_is_not_called_wrong(tmp_path, monkeypatch):
    def missing(folder, device):
        raise EngineMissing("Detectron2 is not installed: get it")

    monkeypatch.setattr(verification, "load_model", missing)
    monkeypatch.setattr(verification, "folder_digest", lambda folder: "0" * 64)
    registry = SimpleNamespace(fetch=lambda version: tmp_path)
    findings = verify(registry, SimpleNamespace(digest="0" * 64, name=None))
    assert [(f.what, f.passed) for f in findings] == [("files", True), ("model", None)]
    assert "Detectron2 is not installed" in findings[1].result


def test_nothing_then_and_now_is_the_same():
    assert _compare(_example(planes=0), None).passed
    assert not _compare(_example(), None).passed


@pytest.mark.parametrize("maker", ["detector", "composed"])
def test_an_example_of_wrong_strides_is_said_to_be_one(maker, tmp_path):
    """What a release up to 0.6.1 logged of an image 40 pixels high; anything else is no example of this version."""
    folder = MAKERS[maker](tmp_path / "model")
    image = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    earlier = load_model(folder)
    assert guess_strides(earlier)
    logged = earlier.predict([image])[0].named("0")
    assert verification._compare(load_model(folder).predict([image])[0].named("0"), logged).passed is False
    example = SimpleNamespace(decoded=lambda: image)
    finding = verification._compare_as_before(folder, example, logged)
    assert finding.passed
    assert "by the strides of releases up to 0.6.1" in finding.result
    assert verification._compare_as_before(folder, example, logged.above(float(logged.scores[0]))) is None
    other = MAKERS["unet"](tmp_path / "unet")
    assert verification._compare_as_before(other, example, logged) is None
