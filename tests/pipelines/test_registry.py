"""Names to versions: numbers, aliases in any case, old stages, folders; and what does not exist."""

from __future__ import annotations

import warnings

import mlflow
import numpy as np
import pytest
from mlflow.tracking import MlflowClient

from models.engines.unet.predictor import build_segmenter, segmenter_spec
from models.engines.unet.settings import SegmenterArchitecture
from models.errors import RegistryError
from models.saved.folder import save_model
from models.saved.spec import read_spec
from pipelines.registry import model_versions
from pipelines.registry.model_versions import Registry
from pipelines.registry.registration import log_and_register
from pipelines.tracking import mlflow_runs
from tests.stores import new_store


@pytest.fixture(scope="module")
def registry(tmp_path_factory):
    """A real SQLite store with versions 1, 2, 3 of planes-x."""
    folder = tmp_path_factory.mktemp("store")
    registry = Registry.connect(new_store(folder / "mlflow.db"))
    registry.client.create_experiment("planes", artifact_location=(folder / "artefacts").as_uri())
    architecture = SegmenterArchitecture(network="skipnet", crop_size=64)
    saved = save_model(folder / "m", segmenter_spec(architecture, ["plane"]), build_segmenter(architecture).state_dict())
    image = np.zeros((8, 8, 3), np.uint8)
    for number in range(3):
        with mlflow_runs.tracked_run(registry.client, f"run {number}", {}) as run:
            tags = {"training_key": f"key{number}"}
            version, _ = log_and_register(registry, saved, "planes-x", example=image, tags=tags, run_id=run.info.run_id)
            again, _ = log_and_register(registry, saved, "planes-x", example=image, tags=tags, run_id=run.info.run_id)
            assert str(version.version) == str(again.version) == str(number + 1)
    return registry


@pytest.fixture
def client(registry):
    """The client of that store."""
    return registry.client


def _number(registry, text):
    return registry.resolve(text).version


def test_versions_and_latest(registry, client):
    assert [_number(registry, t) for t in ("planes-x/1", "planes-x/v2", "models:/planes-x/3", "planes-x/latest")] == [
        "1",
        "2",
        "3",
        "3",
    ]
    assert registry.resolve("planes-x/2").label == "planes-x/2"


def test_aliases_in_any_case_and_both_spellings(registry, client):
    registry.set_alias("planes-x", "Production", "2")
    assert set(registry.aliases_of("planes-x")) == {"production"}
    for text in ("planes-x/Production", "planes-x@PRODUCTION", "models:/planes-x@production", "planes-x/production"):
        assert _number(registry, text) == "2"


def test_one_spelling_is_left_after_writing(registry, client):
    client.set_registered_model_alias("planes-x", "Staged", "1")
    registry.set_alias("planes-x", "staged", "3")
    assert registry.aliases_of("planes-x")["staged"] == "3"
    assert "Staged" not in registry.aliases_of("planes-x")


def test_aliases_that_differ_only_in_case_are_an_error(registry, client):
    client.set_registered_model_alias("planes-x", "twice", "1")
    client.set_registered_model_alias("planes-x", "Twice", "2")
    with pytest.raises(RegistryError, match=r"differ only in case \(Twice -> 2, twice -> 1\)"):
        registry.resolve("planes-x/TWICE")


def test_a_number_is_a_version_even_if_an_alias_has_that_name(registry, client):
    client.set_registered_model_alias("planes-x", "1", "3")
    assert _number(registry, "planes-x/1") == "1"
    assert _number(registry, "planes-x@1") == "3"


def test_stages_are_read_where_no_alias_has_the_name(registry, client):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        client.transition_model_version_stage("planes-x", "1", "Archived")
        client.transition_model_version_stage("planes-x", "1", "Production")
        client.transition_model_version_stage("planes-x", "3", "Staging")
    assert _number(registry, "planes-x/staging") == "3"
    registry.set_alias("planes-x", "production", "2")
    assert _number(registry, "planes-x/Production") == "2"
    client.delete_registered_model_alias("planes-x", "production")
    assert _number(registry, "planes-x/Production") == "1"
    with pytest.raises(RegistryError, match="no version, alias or stage 'none'"):
        registry.resolve("planes-x/none")


def test_what_does_not_exist_lists_what_does(registry, client):
    with pytest.raises(
        RegistryError, match=r"no registered model 'planes-y'; did you mean planes-x\? registered: planes-x"
    ):
        registry.resolve("planes-y/1")
    with pytest.raises(RegistryError, match=r"no version, alias or stage '9'; versions: 1, 2, 3; aliases: "):
        registry.resolve("planes-x/9")
    for text in ("planes-x", "", "/", "a/b/c", "planes-x/"):
        with pytest.raises(RegistryError, match="expected a saved folder"):
            registry.resolve(text)


def test_fetch_gives_the_saved_folder_and_a_folder_is_itself(registry, client, tmp_path):
    folder = registry.fetch(registry.resolve("planes-x/1"))
    assert read_spec(folder).engine == "skipnet"
    assert registry.fetch(registry.resolve(str(folder))) == folder


def test_a_version_of_another_project_is_refused(registry, client, tmp_path):
    (tmp_path / "file.txt").write_text("x")
    with mlflow_runs.tracked_run(registry.client, "foreign", {}):
        mlflow.log_artifact(str(tmp_path / "file.txt"), "thing")
        client.create_registered_model("planes-foreign")
        client.create_model_version("planes-foreign", mlflow.get_artifact_uri("thing"))
    with pytest.raises(RegistryError, match="not a version made by this project"):
        registry.fetch(registry.resolve("planes-foreign/1"))


def test_trainings_are_found_by_their_key(registry, client):
    assert str(registry.find_trained("planes-x", "key1").version) == "2"
    assert registry.find_trained("planes-x", "key9") is None
    assert registry.find_trained("planes-nobody", "key1") is None


@pytest.mark.parametrize(
    ("listed", "message"),
    [
        ([("artifacts/m/../../owned", 5)], "leads out of it"),
        ([("artifacts/m/weights.pkl", 5)], "which no saved model has"),
        ([("artifacts/m/weights.safetensors", 9 * 1024**3)], "more than"),
        ([(f"artifacts/m/detector/{n}", 5) for n in range(30)], "more than 20 files"),
    ],
)
def test_what_a_hostile_server_lists_is_refused_before_anything_is_fetched(registry, client, monkeypatch, listed, message):
    from mlflow.entities import FileInfo

    from models.errors import PlanesError

    def lists(self, path=None):
        if path == "artifacts":
            return [FileInfo("artifacts/m", True, None), FileInfo("artifacts/example.json", False, 10)]
        return [FileInfo(path, False, size) for path, size in listed]

    def fetches(*_):
        raise AssertionError("fetched")

    monkeypatch.setattr(MlflowClient, "get_model_version_download_uri", lambda *_: "s3://somewhere/else")
    files = type("Files", (), {"list_artifacts": lists, "download_artifacts": fetches})
    monkeypatch.setattr(model_versions, "get_artifact_repository", lambda *_, **__: files())
    monkeypatch.setenv("PLANES_CACHE", "cache")
    with pytest.raises(PlanesError, match=message):
        registry.fetch(registry.resolve("planes-x/1"))
