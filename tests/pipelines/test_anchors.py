"""Anchor sizes from the data."""

import numpy as np
import pytest

from models.engines.torchvision.network import DetectorArchitecture, build_detector
from models.errors import DataError, ModelError
from pipelines.data.dataset import Dataset
from pipelines.data.loading.batches import DetectorBatches
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


WHOLE = ("window=null", "window_zoom=1", "augmentation.scale=0", "synthetic=null")


def test_anchors_are_where_the_planes_are():
    rng = np.random.default_rng(0)
    true = np.array([20, 30, 45, 90, 140, 220])
    planes = [(s * a, s / a) for s in true for a in rng.uniform(0.8, 1.25, 12)]
    sizes = with_anchors(_recipe(*WHOLE), _data(planes)).architecture.anchor_sizes
    assert [len(s) for s in sizes] == [3, 3]
    assert np.allclose(np.ravel(sizes), true, atol=1)
    assert all(isinstance(v, int) for s in sizes for v in s)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ((), 100),
        (("architecture.zoom=0.5",), 50),
        (("architecture.min_size=800", "tiles.size=400"), 200),
        # A whole image of 2000 pixels becomes one of 800.
        (("architecture.min_size=800",), 40),
    ],
)
def test_sizes_are_those_that_the_network_sees(overrides, expected):
    assert training_sizes(_recipe(*WHOLE, *overrides), _data([(200, 50)])).tolist() == [pytest.approx(expected)]


@pytest.mark.parametrize(
    "overrides",
    [
        ("window=128", "window_zoom=1"),
        ("window=128", "window_zoom=0.5"),
        ("window=128", "window_zoom=1", "plane_sizes=[24,40]"),
        ("window=128", "plane_sizes=[24,40]", "window_zoom=0.5"),
        ("window=128", "plane_sizes=[24,40]", "architecture.zoom=2"),
        ("window=128", "plane_sizes=[24,40]", "architecture.min_size=256", "architecture.max_size=256"),
    ],
)
def test_sizes_are_those_of_the_training_s_own_windows(airfield, overrides):
    recipe, data = _recipe(*overrides), open_dataset(airfield, "train")
    batches = DetectorBatches(
        data, recipe.augmentation, batch_size=4, window=recipe.window, focus=recipe.focus, min_visible=recipe.min_visible,
        seed=3, zoom=recipe.window_zoom * (recipe.architecture.zoom if recipe.architecture.min_size is None else 1),
        plane_sizes=recipe.plane_sizes,
    )  # fmt: skip
    seen = [e.boxes for step in range(60) for e in batches[step]]
    shown = np.concatenate([np.sqrt((b[:, 2:] - b[:, :2]).prod(axis=1)) for b in seen])
    shown = shown * ((recipe.architecture.min_size or recipe.window) / recipe.window)
    ours = training_sizes(recipe, data)
    for share in (10, 50, 90):
        assert np.percentile(ours, share) == pytest.approx(np.percentile(shown, share), rel=0.15)


def test_too_few_sizes_are_said_and_a_model_never_has_auto():
    with pytest.raises(DataError, match=r"d/train: 1 sizes of planes for 2 feature maps; give architecture\.anchor_sizes"):
        with_anchors(_recipe(*WHOLE), _data([(50, 50)] * 9))
    with pytest.raises(ModelError, match="auto is found out by a training"):
        build_detector(DetectorArchitecture(anchor_sizes="auto"), 1)
    few = with_anchors(_recipe(*WHOLE), _data([(20, 20), (40, 40), (80, 80)])).architecture.anchor_sizes
    assert [len(s) for s in few] == [1, 1]


def test_the_plan_of_a_training_has_numbers_and_follows_its_data(airfield):
    request = TrainingRequest(
        task="detector", recipe="demo_detector", data=str(airfield), register_as="m", device="cpu",
        overrides=("architecture.anchor_sizes=auto",),
    )  # fmt: skip
    plan = plan_training(request)
    assert plan.recipe.architecture.anchor_sizes == with_anchors(plan.recipe, plan.data.train).architecture.anchor_sizes
    assert plan.recipe.architecture.anchor_sizes != "auto"
    assert plan_training(request).key == plan.key
