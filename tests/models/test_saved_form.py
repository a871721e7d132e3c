"""The saved folder: whole or not at all, checked on reading, nothing in it executed."""

import json
import pickle

import pytest
import torch

from models.engines.composed import ComposedArchitecture, save_composed
from models.engines.unet.predictor import build_segmenter, segmenter_spec
from models.engines.unet.settings import SegmenterArchitecture
from models.errors import ModelError
from models.loading import load_model, retiled
from models.saved.checkpoints import read_checkpoint
from models.saved.folder import read_weights, save_model
from models.saved.spec import ModelSpec, read_spec
from models.tiling.predictor import tiling_of
from models.tiling.settings import Tiling
from tests.models.test_contract import _detector

ARCHITECTURE = SegmenterArchitecture(network="skipnet", crop_size=64)


@pytest.fixture
def folder(tmp_path):
    return save_model(tmp_path / "m", segmenter_spec(ARCHITECTURE, ["plane"]), build_segmenter(ARCHITECTURE).state_dict())


def test_folder_holds_two_files_and_can_be_overwritten(folder):
    assert sorted(p.name for p in folder.iterdir()) == ["model.json", "weights.safetensors"]
    save_model(folder, read_spec(folder), build_segmenter(ARCHITECTURE).state_dict())
    assert [p.name for p in folder.parent.iterdir()] == ["m"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 99}, "format 99, this release reads 1"),
        ({"kind": "oracle"}, "unknown model oracle/skipnet"),
        ({"extra": 1}, "extra: Extra inputs"),
        ({"classes": []}, "classes"),
        ({"architecture": {"crop_sise": 64}}, "architecture.crop_sise"),
        ({"architecture": {"network": "unet", "crop_size": 64}}, "weights do not fit"),
    ],
)
def test_a_wrong_description_names_the_field(folder, change, message):
    path = folder / "model.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(ModelError, match=message):
        load_model(folder)


def test_loading_draws_no_random_numbers(folder, tmp_path):
    detector = _detector(tmp_path / "d")
    state = torch.get_rng_state()
    for saved in (folder, detector):
        load_model(saved)
        assert torch.equal(torch.get_rng_state(), state)


def test_damaged_or_missing_parts(folder):
    weights = folder / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(ModelError, match="damaged weights"):
        load_model(folder)
    weights.unlink()
    with pytest.raises(ModelError, match=r"no weights\.safetensors"):
        load_model(folder)
    (folder / "model.json").write_text("{")
    with pytest.raises(ModelError, match="not valid JSON"):
        load_model(folder)
    (folder / "model.json").unlink()
    with pytest.raises(ModelError, match="not a saved model"):
        load_model(folder)


class _Bomb:
    def __reduce__(self):
        return (open, ("/tmp/planes-test-pickle-ran", "w"))


def test_a_pickle_with_code_is_refused_and_not_run(tmp_path):
    path = tmp_path / "weights.pth"
    torch.save({"a": torch.zeros(1), "b": _Bomb()}, path)
    with pytest.raises(ModelError, match="cannot be read safely"):
        read_checkpoint(path)
    path.write_bytes(pickle.dumps(_Bomb()))
    with pytest.raises(ModelError, match="cannot be read safely"):
        read_checkpoint(path)


DETECTOR = ModelSpec(kind="detector", engine="torchvision", architecture={}, classes=["plane"])
TILED = DETECTOR.model_copy(update={"tiling": Tiling(size=640, overlap=0.3)})


@pytest.mark.parametrize(
    ("spec", "changes", "expected"),
    [
        (DETECTOR, {}, None),
        (DETECTOR, {"batch": 4}, None),
        (DETECTOR, {"size": 512, "batch": 4}, Tiling(size=512, batch=4)),
        (TILED, {}, Tiling(size=640, overlap=0.3)),
        (TILED, {"size": 0}, None),
        (TILED, {"merge": "nms", "size": 700}, Tiling(size=700, overlap=0.3, merge="nms")),
        (segmenter_spec(ARCHITECTURE, ["plane"]), {"batch": 4}, None),
    ],
)
def test_tiles_of_the_version_and_those_asked_for(spec, changes, expected):
    assert retiled(spec, changes) == expected


@pytest.mark.parametrize(
    ("spec", "changes", "message"),
    [
        (TILED, {"size": 10}, "tiles: size: Input should be greater than or equal to 32"),
        (TILED, {"overlap": 0.95}, r"tiles: overlap: Input should be less than or equal to 0\.9"),
        (DETECTOR, {"merge": "nms"}, "predicts whole images; give the size of a tile too"),
        (segmenter_spec(ARCHITECTURE, ["plane"]), {"size": 128}, "segments planes in given boxes"),
    ],
)
def test_tiles_that_cannot_be_say_why(spec, changes, message):
    with pytest.raises(ModelError, match=message):
        retiled(spec, changes)


def test_tiling_is_saved_and_a_composition_hands_changes_to_its_detector(tmp_path):
    detector = _detector(tmp_path / "d")
    spec = read_spec(detector).model_copy(update={"tiling": Tiling(size=64)})
    save_model(detector, spec, read_weights(detector))
    unet = save_model(tmp_path / "u", segmenter_spec(ARCHITECTURE, ["plane"]), build_segmenter(ARCHITECTURE).state_dict())
    composed = save_composed(tmp_path / "c", detector, unet, ComposedArchitecture(), components={})
    assert tiling_of(load_model(detector)) == Tiling(size=64)
    assert tiling_of(load_model(composed)) == Tiling(size=64)
    assert tiling_of(load_model(composed, tiling={"size": 96, "overlap": 0.5})) == Tiling(size=96, overlap=0.5)
    assert tiling_of(load_model(composed, tiling={"size": 0})) is None
