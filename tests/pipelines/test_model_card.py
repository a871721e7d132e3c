"""The description of a version: what it says of what is known, and that a store which refuses costs nothing else."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
from mlflow.exceptions import MlflowException

from models.errors import RegistryError
from models.saved.scores import Scores
from models.saved.spec import ModelSpec
from models.tiling.settings import Tiling
from pipelines.registry.gates import Check
from pipelines.registry.model_card import LONGEST, about, card, write_card
from pipelines.registry.model_versions import GROUP, Registry
from pipelines.use_cases.promote import _describe

SPEC = ModelSpec(kind="detector", engine="torchvision", architecture={}, classes=["plane"])


def _version(number=3, **tags):
    known = {"data": "airfield/train", "data_digest": "aa", "test_digest": "bb", "git_commit": "c" * 40}
    return SimpleNamespace(name="planes-det", version=number, run_id="r" * 32, tags={**known, **tags})


def test_what_is_known_is_said():
    version = _version(metrics=json.dumps({"AP": 0.4371, "AP50": 0.7432, "APs": 0.02, "other": 1}))
    tiled = SPEC.model_copy(
        update={
            "tiling": Tiling(size=640, zooms=(0.5, 0.25)),
            "scores": Scores(slope=1, intercept=0, threshold=0.41, detections=9, fitted_on="validation, 9 images"),
        }
    )
    checks = [Check("AP", "airfield/test", ">= 0.3", "0.4371", "-", True)]
    text = card(version, tiled, [version], alias="production", checks=checks)
    assert text.startswith("Finds planes as boxes. Engine: torchvision.\n")
    for part in (
        'score --model planes-det/3 --data "photos/*.jpg"',
        "**Measured** on the test set bb; one seed, so how much of it is chance is not known",
        "| AP | 0.437 |",
        "trained on airfield/train (digest aa)",
        "predicts by tiles of 640 pixels at scales 0.5, 0.25",
        "planes below 32 x 32 pixels are hardly found (APs 0.020)",
        "best F1 from a score of 0.410 on validation, 9 images",
        "**Promoted to production**, by these gates:",
        "| AP | >= 0.3 | 0.4371 | passed |",
        "at commit cccccccccccc",
    ):
        assert part in text, part
    assert "other" not in text
    forced = [*checks, Check("AP50", "airfield/test", ">= 0.9", "0.7432", "-", False)]
    text = card(version, tiled, [version], alias="production", checks=forced)
    assert "**Promoted to production**, though gates failed:" in text
    assert "| AP50 | >= 0.9 | 0.7432 | FAILED |" in text


def test_seeds_have_their_spread_and_what_is_not_known_is_said_so():
    seeds = [_version(i, metrics=json.dumps({"AP": ap})) for i, ap in ((1, 0.4), (2, 0.5), (3, 0.45))]
    text = card(seeds[0], SPEC, seeds)
    assert "| metric | this version | 3 seeds |" in text
    assert "| AP | 0.400 | 0.450 ± 0.050 |" in text
    bare = card(_version(metrics="no json"), SPEC, [_version()])
    assert "**Not measured**" in bare
    assert "what its scores mean was not learnt" in bare
    parts = card(_version(detector="planes-det/1", segmenter="planes-unet/2"), SPEC, [_version()])
    assert "**Parts**: planes-det/1 and planes-unet/2" in parts
    two = SPEC.model_copy(update={"kind": "segmenter", "classes": ["ship", "plane"]})
    assert about(two) == "Outlines ship, plane inside their boxes."
    many = [Check(f"gate {i}", "d", "r" * 50, "c" * 50, "-", True) for i in range(200)]
    assert len(card(_version(), SPEC, [_version()], alias="a", checks=many)) <= LONGEST


class _Client:
    def __init__(self, refuses=False):
        self.refuses, self.written, self.about = refuses, {}, []

    def get_model_version(self, name, version):
        if self.refuses:
            raise MlflowException("permission denied")
        return _version(int(version), **{GROUP: "g"})

    def update_model_version(self, name, version, description):
        self.written[version] = description

    def get_registered_model(self, name):
        return SimpleNamespace(description="mine" if self.about else "")

    def update_registered_model(self, name, description):
        self.about.append(description)


@pytest.mark.parametrize("refuses", [False, True])
def test_it_is_written_to_the_version_and_a_refusal_ends_nothing(refuses, caplog):
    client = _Client(refuses)
    registry = SimpleNamespace(client=client, seeds_of=lambda version: [version])
    caplog.set_level("INFO")
    for _ in range(2):
        write_card(registry, _version(), SPEC)
    if refuses:
        assert not client.written
        assert "its description cannot be written" in caplog.text
        return
    assert client.written["3"].startswith("Finds planes as boxes.")
    # What somebody wrote about the model stays.
    assert client.about == ["Finds planes as boxes."]


def test_a_seed_that_was_trained_again_counts_once():
    versions = [_version(n, seed=seed, **{GROUP: "g"}) for n, seed in ((1, "0"), (2, "1"), (3, "0"))] + [_version(4)]
    registry = SimpleNamespace(versions_of=lambda name: versions)
    assert [v.version for v in Registry.seeds_of(registry, versions[1])] == [3, 2]
    # The version itself stands for its own seed.
    assert [v.version for v in Registry.seeds_of(registry, versions[0])] == [1, 2]
    assert Registry.seeds_of(registry, versions[3]) == [versions[3]]


def test_a_version_that_cannot_be_fetched_is_promoted_all_the_same(caplog):
    def lost(_):
        raise RegistryError("planes-det/3: its files are gone")

    registry = SimpleNamespace(version_of=lambda _: _version(), fetch=lost)
    caplog.set_level("INFO")
    _describe(registry, SimpleNamespace(label="planes-det/3"), "production", [])
    assert "planes-det/3: its description was not written (planes-det/3: its files are gone)" in caplog.text
