"""Two registries in one process, used in turn, while MLflow's own address points at a third that is never touched."""

from __future__ import annotations

import os
import threading
from importlib import import_module

import mlflow
import numpy as np
import pytest

from models.engines.unet.predictor import build_segmenter, segmenter_spec
from models.engines.unet.settings import SegmenterArchitecture
from models.errors import PlanesError, RegistryError
from models.saved.folder import folder_digest, save_model
from pipelines.registry import journal, lineage, promotion
from pipelines.registry.copying import copy_version
from pipelines.registry.model_versions import Registry
from pipelines.registry.registration import log_and_register
from pipelines.registry.verification import verify
from pipelines.tracking import mlflow_runs
from tests.stores import new_store


@pytest.fixture
def third(tmp_path, monkeypatch):
    """Where MLflow's own address points."""
    path = tmp_path / "third" / "mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{path}")
    return path


def _store(folder):
    folder.mkdir()
    registry = Registry.connect(new_store(folder / "mlflow.db"))
    registry.client.create_experiment("planes", artifact_location=(folder / "artefacts").as_uri())
    return registry


@pytest.fixture
def pair(tmp_path, third):
    """Two stores."""
    return _store(tmp_path / "a"), _store(tmp_path / "b")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Two saved folders that differ."""
    architecture = SegmenterArchitecture(network="skipnet", crop_size=64)
    made = []
    for name in "ab":
        weights = build_segmenter(architecture).state_dict()
        made.append(save_model(tmp_path_factory.mktemp("saved") / name, segmenter_spec(architecture, ["plane"]), weights))
    return made


def _register(registry, folder, name="planes-unet"):
    with mlflow_runs.tracked_run(registry.client, f"run of {name}", {"task": "unet"}) as run:
        version, _ = log_and_register(
            registry, folder, name, example=np.zeros((64, 64, 3), np.uint8), tags={}, run_id=run.info.run_id
        )
    return str(version.version)


def _promote(registry, number):
    state = promotion.read_alias_state(registry, "planes-unet", "production")
    promotion.move(registry, state, number, "promote", f"of {registry.uri}")


def test_each_holds_its_own_versions_aliases_and_history(pair, saved, third):
    first, second = pair
    for registry, folder in zip(pair, saved, strict=True):
        assert _register(registry, folder) == "1"
    assert _register(first, saved[1]) == "2"
    _promote(first, "1")
    _promote(second, "1")
    _promote(first, "2")
    assert first.resolve("planes-unet/production").version == "2"
    assert second.resolve("planes-unet/Production").version == "1"
    for registry, folder in ((first, saved[1]), (second, saved[1])):
        fetched = registry.fetch(registry.resolve("planes-unet/production"))
        assert folder_digest(fetched) == folder_digest(folder)
    assert [e.move.to for e in journal.read_journal(first, "planes-unet")] == ["1", "2"]
    assert [e.move.to for e in journal.read_journal(second, "planes-unet")] == ["1"]
    assert [r["version"] for r in lineage.overview(first)] == ["planes-unet/2", "planes-unet/1"]
    assert [r["version"] for r in lineage.overview(second)] == ["planes-unet/1"]
    assert all(f.passed is not False for r in pair for f in verify(r, r.resolve("planes-unet/1")))
    with pytest.raises(RegistryError, match="has no version, alias or stage '2'"):
        second.resolve("planes-unet/2")
    assert not third.exists()
    assert os.environ["MLFLOW_TRACKING_URI"] == f"sqlite:///{third}" == mlflow.get_tracking_uri()


def test_a_version_is_copied_from_one_to_the_other(pair, saved, third):
    first, second = pair
    _register(first, saved[0], "dev.planes-unet")
    copied = copy_version(first, first.resolve("dev.planes-unet/1"), "planes-unet", second)
    assert copied.label == "planes-unet/1"
    assert folder_digest(second.fetch(copied)) == folder_digest(saved[0])
    assert second.client.get_model_version("planes-unet", "1").tags["copied_from"] == "dev.planes-unet/1"
    # Once is enough, and the origin has no such model.
    assert copy_version(first, first.resolve("dev.planes-unet/1"), "planes-unet", second) == copied
    assert first.registered_names() == ["dev.planes-unet"]
    within = copy_version(first, first.resolve("dev.planes-unet/1"), "prod.planes-unet")
    assert within.label == "prod.planes-unet/1"
    assert second.registered_names() == ["planes-unet"]
    assert not third.exists()
    assert mlflow.get_tracking_uri() == f"sqlite:///{third}"


def test_a_copy_was_neither_promoted_nor_judged_where_it_comes_to(pair, saved, third):
    first, second = pair
    _register(first, saved[0])
    _promote(first, "1")
    for key in ("last_gates_run", "training_key", "recipe"):
        first.client.set_model_version_tag("planes-unet", "1", key, "x")
    for to in (None, second):
        copied = copy_version(first, first.resolve("planes-unet/1"), "prod.planes-unet", to)
        tags = (to or first).version_of(copied).tags
        assert {"digest", "recipe", "copied_from"} <= tags.keys()
        assert [key for key in tags if key.startswith(("promoted_to_", "last_gates_run", "training_key"))] == []


def test_two_threads_write_into_their_own(pair, saved, third):
    errors = []

    def work(registry, folder):
        try:
            for _ in range(2):
                _promote(registry, _register(registry, folder))
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=each) for each in zip(pair, saved, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert not third.exists()
    for registry, folder in zip(pair, saved, strict=True):
        assert registry.aliases_of("planes-unet") == {"production": "2", "previous": "1"}
        assert [e.state for e in journal.read_journal(registry, "planes-unet")] == ["committed"] * 2
        tags = registry.client.get_model_version("planes-unet", "2").tags
        assert folder_digest(folder).startswith(tags["digest"][:16])


def test_an_address_that_nobody_set_is_not_set_afterwards(pair, saved, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    _register(pair[0], saved[0])
    assert "MLFLOW_TRACKING_URI" not in os.environ
    assert not mlflow.is_tracking_uri_set()
    with pytest.raises(ZeroDivisionError), mlflow_runs.addressed(pair[1].client):
        assert mlflow.get_tracking_uri() == pair[1].uri
        raise ZeroDivisionError
    assert not mlflow.is_tracking_uri_set()


def test_a_changed_version_is_not_copied(pair, saved, third):
    first, second = pair
    _register(first, saved[0], "changed.planes-unet")
    version = first.resolve("changed.planes-unet/1")
    weights = first.fetch(version) / "weights.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(PlanesError, match="not those that were registered"):
        copy_version(first, version, "changed.planes-unet", second)
    assert "changed.planes-unet" not in second.registered_names()


def test_a_full_disk_where_models_are_kept_is_one_line(pair, saved, monkeypatch):
    def full(**_):
        raise OSError(28, "No space left on device")

    # The module itself: mlflow holds another object in its place until it is used.
    monkeypatch.setattr(import_module("mlflow.pyfunc"), "log_model", full)
    with pytest.raises(RegistryError, match=r"full.planes-unet: cannot be registered .*No space left"):
        _register(pair[0], saved[0], "full.planes-unet")
