"""Recipes: every one that comes along is valid; mistakes name the nearest key."""

import pytest

from models.errors import RecipeError
from pipelines.recipes.reading import known_recipes, load_recipe, opts_overrides


@pytest.mark.parametrize("name", known_recipes())
def test_every_recipe_is_valid(name):
    recipe = load_recipe(name)
    assert recipe.name == name
    flat = recipe.flat()
    assert flat.get("optimizer.lr", flat.get("opts.SOLVER.BASE_LR")) > 0


def test_the_course_settings_are_those_of_the_course():
    unet = load_recipe("course_unet").flat()
    expected = {
        "training.epochs": 50,
        "training.batch_size": 8,
        "optimizer.name": "adam",
        "optimizer.lr": 0.05,
        "loss": "bce",
    }
    assert {k: unet[k] for k in expected} == expected
    assert (unet["optimizer.weight_decay"], unet["architecture.crop_size"], unet["architecture.network"]) == (
        1e-5,
        128,
        "skipnet",
    )
    for name, backbone, rate, steps in (
        ("default", "resnet101", 0.00025, 500),
        ("final", "resnext101_32x8d", 0.0005, 5000),
    ):
        flat = load_recipe(f"course_det_{name}_torchvision").flat()
        assert (flat["architecture.backbone"], flat["optimizer.lr"], flat["training.steps"]) == (backbone, rate, steps)
        assert (flat["training.batch_size"], flat["architecture.roi_batch_size"]) == (2, 512)


@pytest.mark.parametrize(
    ("name", "config", "rate", "iterations"),
    [
        ("course_det_default", "COCO-Detection/faster_rcnn_R_101_FPN_3x", 0.00025, 500),
        ("course_det_final", "COCO-Detection/faster_rcnn_X_101_32x8d_FPN_3x", 0.0005, 5000),
        ("course_mask", "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_3x", 0.0005, 5000),
    ],
)
def test_the_course_settings_of_detectron2(name, config, rate, iterations):
    recipe = load_recipe(name)
    assert (recipe.engine, recipe.config, recipe.weights) == ("detectron2", config, "zoo")
    expected = {"SOLVER.IMS_PER_BATCH": 2, "SOLVER.BASE_LR": rate, "SOLVER.MAX_ITER": iterations}
    assert expected.items() <= recipe.opts.items()
    assert recipe.opts["MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE"] == 512


def test_an_engine_takes_the_recipes_twin():
    assert load_recipe("demo_detector", engine="detectron2").name == "demo_detector_detectron2"
    assert load_recipe("demo_detector", engine="torchvision").name == "demo_detector"
    assert load_recipe("course_mask", engine="torchvision").name == "course_mask_torchvision"
    with pytest.raises(RecipeError, match="is for engine torchvision; for detectron2 there are course_det_default, "):
        load_recipe("detector", task="detector", engine="detectron2")


def test_short_names_mean_the_same_in_every_engine():
    given = ["steps=7", "lr=1e-4", "batch_size=3", "seed=5"]
    flat = load_recipe("demo_detector", given).flat()
    assert [flat[k] for k in ("training.steps", "optimizer.lr", "training.batch_size", "training.seed")] == [7, 1e-4, 3, 5]
    recipe = load_recipe("demo_detector_detectron2", given)
    keys = ("SOLVER.MAX_ITER", "SOLVER.BASE_LR", "SOLVER.IMS_PER_BATCH", "SEED")
    assert [recipe.opts[k] for k in keys] == [7, 1e-4, 3, 5]
    assert recipe.seed == 5
    assert load_recipe("course_unet", ["steps=7"]).training.epochs is None
    with pytest.raises(RecipeError, match="counts iterations"):
        load_recipe("demo_detector_detectron2", ["epochs=3"])


def test_detectron2s_keys_are_taken_whole_and_weights_from_either_place():
    pairs = opts_overrides(["SOLVER.BASE_LR", "0.002", "MODEL.WEIGHTS", "a/b.pth", "INPUT.MIN_SIZE_TRAIN", "(64, 96)"])
    recipe = load_recipe("course_det_default", [*pairs, "SOLVER.STEPS=[3,4]"])
    assert (recipe.opts["SOLVER.BASE_LR"], recipe.weights, recipe.opts["SOLVER.STEPS"]) == (0.002, "a/b.pth", [3, 4])
    assert "MODEL.WEIGHTS" not in recipe.opts
    assert load_recipe("course_det_default", opts_overrides(["MODEL.WEIGHTS", ""])).weights == "none"
    with pytest.raises(RecipeError, match="the last has no value"):
        opts_overrides(["SOLVER.BASE_LR"])
    with pytest.raises(RecipeError, match="opts are Detectron2's settings and this is for torchvision"):
        load_recipe("demo_detector", pairs)


def test_overrides_reach_every_level_and_keep_types():
    recipe = load_recipe("demo_unet", ["training.steps=7", "optimizer.lr=1e-4", "architecture.flips=true", "name=mine"])
    assert (recipe.training.steps, recipe.optimizer.lr, recipe.architecture.flips, recipe.name) == (7, 1e-4, True, "mine")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.step=7", r"unknown key 'training\.step'; did you mean 'training\.steps'\?"),
        ("optimiser.lr=1", r"unknown key 'optimiser'; did you mean"),
        ("augmentation.zzz=1", "known here: augmentation.mirror"),
        ("training.steps=-1", r"training\.steps: .*greater than or equal to 1, found -1"),
        ("training.steps=many", r"training\.steps: .*found 'many'"),
        ("training", "expected section.key=value"),
        ("loss.kind=bce", "loss is a value|unknown|Input should be"),
    ],
)
def test_mistakes_are_named(override, message):
    with pytest.raises(RecipeError, match=message):
        load_recipe("demo_unet", [override])


def test_unknown_recipe_wrong_task_and_odd_files(tmp_path):
    with pytest.raises(RecipeError, match="did you mean 'demo_unet'"):
        load_recipe("demo_unett")
    with pytest.raises(RecipeError, match="is for task 'unet', this command trains 'detector'"):
        load_recipe("demo_unet", task="detector")
    path = tmp_path / "r.yaml"
    for text, message in (
        ("[1", "not valid YAML"),
        ("- 1", "expected keys"),
        ("task: dance", "expected one of unet with torch"),
    ):
        path.write_text(text)
        with pytest.raises(RecipeError, match=message):
            load_recipe(str(path))


def test_the_key_changes_with_any_setting():
    keys = {load_recipe("demo_unet", o).key("data") for o in ([], ["training.seed=1"], ["augmentation.rotation=5"])}
    assert len({*keys, load_recipe("demo_unet").key("other data")}) == 4


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (("window=null", "window_zoom=1", "plane_sizes=[20,200]"), "plane_sizes and window_zoom scale windows; set window"),
        (("window=null", "window_zoom=0.5"), "plane_sizes and window_zoom scale windows; set window"),
        (("plane_sizes=[200,20]",), r"least and largest in pixels, 4 or more, found \[200.0, 20.0\]"),
        (("plane_sizes=[1,20]",), "4 or more"),
        (("tiling.zooms=[1,0.5]", "tiling.zoom_weights=[1]"), "1 for 2 zooms"),
        (("tiling.zooms=[0.01]",), "tiling.zooms"),
        (("training.ema=1",), "training.ema"),
    ],
)
def test_settings_of_scales_that_do_not_fit_are_said(overrides, said):
    with pytest.raises(RecipeError, match=said) as error:
        load_recipe("detector_scratch", overrides)
    # Not all settings with it.
    assert len(str(error.value)) < 250
