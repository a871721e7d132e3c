"""Recipes: every one that comes along is valid; mistakes name the nearest key."""

import pytest

from models.errors import RecipeError
from pipelines.recipe import known_recipes, load_recipe


@pytest.mark.parametrize("name", known_recipes())
def test_every_recipe_is_valid(name):
    recipe = load_recipe(name)
    assert recipe.name == name
    assert recipe.flat()["optimizer.lr"] > 0


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
        flat = load_recipe(f"course_det_{name}").flat()
        assert (flat["architecture.backbone"], flat["optimizer.lr"], flat["training.steps"]) == (backbone, rate, steps)
        assert (flat["training.batch_size"], flat["architecture.roi_batch_size"]) == (2, 512)


def test_overrides_reach_every_level_and_keep_types():
    recipe = load_recipe("demo_unet", ["training.steps=7", "optimizer.lr=1e-4", "architecture.flips=true", "name=mine"])
    assert (recipe.training.steps, recipe.optimizer.lr, recipe.architecture.flips, recipe.name) == (7, 1e-4, True, "mine")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.step=7", r"unknown key 'training\.step'; did you mean 'training\.steps'\?"),
        ("optimiser.lr=1", r"unknown key 'optimiser'; did you mean"),
        ("lr=1", r"unknown key 'lr'; did you mean 'optimizer\.lr'\?"),
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
    for text, message in (("[1", "not valid YAML"), ("- 1", "expected keys"), ("task: dance", "expected detector or unet")):
        path.write_text(text)
        with pytest.raises(RecipeError, match=message):
            load_recipe(str(path))


def test_the_key_changes_with_any_setting():
    keys = {load_recipe("demo_unet", o).key("data") for o in ([], ["training.seed=1"], ["augmentation.rotation=5"])}
    assert len({*keys, load_recipe("demo_unet").key("other data")}) == 4
