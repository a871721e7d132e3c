"""docs/settings.md is what the settings say of themselves, and every setting says something."""

from __future__ import annotations

import dataclasses
import json

import click
import pytest
from click.testing import CliRunner

from pipelines.recipes.reading import known_recipes, load_recipe
from pipelines.steps.options import option
from pipelines.use_cases.requests import ComposeRequest, TrainingRequest
from scoring.requests import JobSettings
from tests.architecture.settings_reference import PAGE, REQUESTS, SECTIONS, models_in, page, rows


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


@pytest.mark.parametrize("request_type", dict.fromkeys(kind for _, kind in REQUESTS))
def test_fields_of_requests_are_given_by_name_and_have_help(request_type):
    fields = dataclasses.fields(request_type)
    assert all(field.kw_only and field.metadata["help"].endswith(".") for field in fields)
    with pytest.raises(TypeError):
        request_type("by place")


def test_a_field_of_a_request_becomes_an_option():
    @click.command()
    @option(ComposeRequest, "overlaps")
    @option(ComposeRequest, "min_score", type=click.FloatRange(0, 1))
    @option(ComposeRequest, "reuse", "--reuse/--no-reuse")
    @option(TrainingRequest, "overrides", "--set")
    @option(TrainingRequest, "fresh")
    @option(TrainingRequest, "register_as", "--name", default="planes-det")
    @option(JobSettings, "shard_size", "--shard", "shard")
    def command(**options):
        click.echo(json.dumps(options))

    def given(*arguments):
        done = CliRunner().invoke(command, arguments)
        return json.loads(done.output) if done.exit_code == 0 else done.output

    assert given() == {
        "overlaps": "exclusive",
        "min_score": 0.0,
        "reuse": False,
        "overrides": [],
        "fresh": False,
        "register_as": "planes-det",
        "shard": 32,
    }
    assert given("--set", "a=1", "--set", "b=2", "--fresh", "--name", "x", "--reuse")["overrides"] == ["a=1", "b=2"]
    assert "keep" in given("--overlaps", "none")
    assert "0<=x<=1" in given("--min-score", "2")
    helped = " ".join(CliRunner().invoke(command, ["--help"]).output.split())
    assert "Least score to segment. [default: 0.0; 0<=x<=1]" in helped
    assert "Registered model to add a version to. [default: planes-det]" in helped
    assert "with --folds or --seeds do all again. --name" in helped
