"""docs/settings.md is what the settings say of themselves, and every setting says something."""

from __future__ import annotations

import pytest

from pipelines.recipes.reading import known_recipes, load_recipe
from tests.architecture.settings_reference import PAGE, SECTIONS, models_in, page, rows


def test_the_page_is_up_to_date():
    assert PAGE.read_text() == page(), "run: python -m tests.architecture.settings_reference"


@pytest.mark.parametrize("model", [m for _, m in SECTIONS], ids=lambda m: m.__name__)
def test_every_setting_has_a_description(model):
    def walk(settings):
        for name, field in settings.model_fields.items():
            assert field.description, f"{settings.__name__}.{name}"
            assert field.description[0].isupper() or " " in field.description, field.description
            assert field.description.endswith("."), f"{settings.__name__}.{name}: {field.description}"
            for inner in models_in(field.annotation):
                walk(inner)

    walk(model)


def test_the_page_has_every_key_that_a_recipe_logs():
    sections = {m.__name__: {row[0] for row in rows(m)} for _, m in SECTIONS}
    for name in known_recipes():
        recipe = load_recipe(name)
        keys = {key for key in recipe.flat() if not key.startswith("opts.")}
        assert keys - {"opts"} <= sections[type(recipe).__name__], name
