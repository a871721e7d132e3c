"""What a saved folder may hold, and how large what it asks for may be."""

from __future__ import annotations

import os

import pytest
import torch

from models.engines.unet.predictor import build_segmenter, segmenter_spec
from models.engines.unet.settings import SegmenterArchitecture
from models.errors import ModelError
from models.loading import load_model
from models.saved.allowed_files import MAX_BYTES, check_folder, check_names
from models.saved.checkpoints import build_fitting
from models.saved.folder import save_model


@pytest.mark.parametrize(
    "names",
    [["model.json", "weights.safetensors"], ["detector/model.json", "segmenter/weights.safetensors", "model.json"], []],
)
def test_what_we_save_is_allowed(names):
    check_names([(name, 10) for name in names], "x")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("../model.json", "leads out of it"),
        ("/etc/model.json", "leads out of it"),
        ("detector/../../model.json", "leads out of it"),
        ("..", "leads out of it"),
        ("..\\model.json", "leads out of it"),
        ("a\nmodel.json", "leads out of it"),
        ("weights.pkl", "no saved model has"),
        ("MODEL.JSON", "no saved model has"),
        ("detector/weights.pt", "no saved model has"),
        ("other/model.json", "no saved model has"),
        ("detector/detector/model.json", "no saved model has"),
        ("detector/", "no saved model has"),
        ("", "no saved model has"),
    ],
)
def test_other_names_are_refused(name, message):
    with pytest.raises(ModelError, match=message) as error:
        check_names([(name, 1)], "models:/x/1")
    assert "models:/x/1" in str(error.value)
    assert "\n" not in str(error.value)


def test_sizes_are_bounded():
    for name, most in MAX_BYTES.items():
        check_names([(name, most)], "x")
        with pytest.raises(ModelError, match="more than"):
            check_names([(name, most + 1)], "x")


def test_links_and_other_things_are_refused(tmp_path):
    (tmp_path / "m").mkdir()
    check_folder(tmp_path / "m")
    (tmp_path / "m" / "model.json").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ModelError, match=r"model\.json is a link"):
        check_folder(tmp_path / "m")
    (tmp_path / "m" / "model.json").unlink()
    os.mkfifo(tmp_path / "m" / "weights.safetensors")
    with pytest.raises(ModelError, match="is no plain file"):
        load_model(tmp_path / "m")


def test_a_network_larger_than_its_weights_takes_no_memory():
    """Terabytes are requested; the answer comes before any of it is taken."""
    built = []

    def build():
        built.append(torch.empty(0).device.type)
        return torch.nn.Linear(10**6, 10**6)

    with pytest.raises(ModelError, match="weights do not fit the architecture"):
        build_fitting(build, {"weight": torch.zeros(2, 2), "bias": torch.zeros(2)}, "x")
    assert built == ["meta"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"decoder_channels": [10**9] * 5}, "less than or equal to 4096"),
        ({"decoder_channels": [8] * 1000}, "at most 10 items"),
        ({"crop_size": 10**6}, "less than or equal to 1024"),
        ({"network": "x" * 10**5}, "at most 100 characters"),
    ],
)
def test_sizes_in_the_description_are_bounded(tmp_path, changes, message):
    architecture = SegmenterArchitecture(network="skipnet", crop_size=64)
    spec = segmenter_spec(architecture, ["plane"])
    spec = spec.model_copy(update={"architecture": {**spec.architecture, **changes}})
    saved = save_model(tmp_path / "m", spec, build_segmenter(architecture).state_dict())
    with pytest.raises(ModelError, match=message):
        load_model(saved)


def test_sizes_of_a_detectron2_network_are_bounded():
    from pydantic import ValidationError

    from models.engines.detectron2.architecture import Detectron2Architecture

    Detectron2Architecture(
        config="x", settings={"MODEL.FPN.OUT_CHANNELS": 256, "MODEL.MASK_ON": True, "SOLVER.MAX_ITER": 10**6}
    )
    for settings in ({"MODEL.FPN.OUT_CHANNELS": 10**6}, {"INPUT.MIN_SIZE_TEST": [10**6]}):
        with pytest.raises(ValidationError, match="is larger than 20,000"):
            Detectron2Architecture(config="x", settings=settings)
