"""The saved folder: whole or not at all, checked on reading, nothing in it executed."""

import json
import pickle

import pytest
import torch

from models.errors import ModelError
from models.predictor import load_model, read_spec, save_model
from models.torch_tools import read_checkpoint
from models.unet import SegmenterArchitecture, build_segmenter, segmenter_spec

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
