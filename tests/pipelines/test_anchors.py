"""Anchor sizes from the data."""

import numpy as np
import pytest

from models.engines.torchvision.network import DetectorArchitecture, build_detector
from models.errors import DataError, ModelError
from pipelines.data.dataset import Dataset
from pipelines.data.readers.annotations import make_sample
from pipelines.data.readers.opening import open_dataset
from pipelines.recipes.reading import load_recipe
from pipelines.training.anchors import training_sizes, with_anchors
from pipelines.use_cases.requests import TrainingRequest
from pipelines.use_cases.training import plan_training


def _data(sides):
    boxes = np.array([[0, 0, w, h] for w, h in sides], np.float32)
    sample = make_sample("a", "a.png", (2000, 2000), "a", [])
    changed = {"boxes": boxes, "masks": (None,) * len(sides), "crowd": np.zeros(len(sides), bool)}
    return Dataset("d", sample.path, "train", "plane", (type(sample)(**{**sample.__dict__, **changed}),))


def _recipe(*overrides):
    return load_recipe("detector_scratch", ("architecture.anchor_sizes=auto", *overrides), task="detector")


def test_anchors_are_where_the_planes_are():
    rng = np.random.default_rng(0)
    true = np.array([20, 30, 45, 90, 140, 220])
    planes = [(s * a, s / a) for s in true for a in rng.uniform(0.8, 1.25, 12)]
    sizes = with_anchors(_recipe(), _data(planes)).architecture.anchor_sizes
    assert [len(s) for s in sizes] == [3, 3]
    assert np.allclose(np.ravel(sizes), true, atol=1)
    assert all(isinstance(v, int) for s in sizes for v in s)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ((), 100),
        (("architecture.zoom=0.5",), 50),
        (("architecture.zoom=0.5", "window_zoom=0.5"), 25),
        # A window of 320 pixels is scaled to 800, a whole image of 2000 to 800.
        (("architecture.min_size=800",), 250),
        (("architecture.min_size=800", "window=null", "tiles.size=400"), 200),
        (("architecture.min_size=800", "window=null"), 40),
    ],
)
def test_sizes_are_those_that_the_network_sees(overrides, expected):
    assert training_sizes(_recipe(*overrides), _data([(200, 50)])).tolist() == [pytest.approx(expected)]


def test_sizes_fill_the_range_that_windows_scale_planes_to():
    sizes = training_sizes(_recipe("plane_sizes=[32,128]"), _data([(200, 200), (20, 20), (2000, 2000)]))
    assert (sizes.min(), sizes.max()) == (32, 250)
    # One of 20 pixels is enlarged twice at most, one of 2,000 shrunk by eight at most.
    assert sizes[33:66].max() == 40
    assert set(sizes[66:].tolist()) == {250.0}


def test_too_few_sizes_are_said_and_a_model_never_has_auto():
    with pytest.raises(DataError, match=r"d/train: 1 sizes of planes for 2 feature maps; give architecture\.anchor_sizes"):
        with_anchors(_recipe(), _data([(50, 50)] * 9))
    with pytest.raises(ModelError, match="auto is found out by a training"):
        build_detector(DetectorArchitecture(anchor_sizes="auto"), 1)
    few = with_anchors(_recipe(), _data([(20, 20), (40, 40), (80, 80)])).architecture.anchor_sizes
    assert [len(s) for s in few] == [1, 1]


def test_the_plan_of_a_training_has_numbers_and_follows_its_data(airfield):
    request = TrainingRequest(
        task="detector", recipe="demo_detector", data=str(airfield), register_as="m", device="cpu",
        overrides=("architecture.anchor_sizes=auto",),
    )  # fmt: skip
    plan = plan_training(request)
    assert plan.recipe.architecture.anchor_sizes == with_anchors(plan.recipe, plan.data.train).architecture.anchor_sizes
    assert plan.recipe.architecture.anchor_sizes != "auto"
    everything = open_dataset(airfield, "train")
    assert plan_training(request).key == plan.key
    sizes = np.ravel(plan.recipe.architecture.anchor_sizes) / plan.recipe.architecture.zoom
    planes = np.concatenate([np.sqrt((s.boxes[:, 2:] - s.boxes[:, :2]).prod(axis=1)) for s in everything.samples])
    assert planes.min() * 0.9 <= sizes.min() < sizes.max() <= planes.max() * 1.1
