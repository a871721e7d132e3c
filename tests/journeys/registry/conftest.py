"""A team and its registry, on SQLite and on PostgreSQL + S3 behind a server with logins: the same assertions on both."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import mlflow
import pytest
import torch
import yaml
from mlflow.entities.model_registry import ModelVersion
from mlflow.tracking import MlflowClient

from models.engines.torchvision.network import build_detector
from models.engines.torchvision.predictor import detector_spec
from models.saved.folder import save_model
from pipelines.data.readers.opening import open_dataset
from pipelines.recipes.reading import load_recipe
from pipelines.recipes.settings import DetectorRecipe, UNetRecipe
from pipelines.registry import journal
from pipelines.registry.model_versions import Registry
from pipelines.training.unet import train_unet
from tests.journeys import commands
from tests.journeys.conftest import DETECTOR, UNET, Project
from tests.journeys.stack import BUCKET, MlflowServer, ObjectStore, Postgres

NOTHING_REQUIRED: dict[str, Any] = {"gates": {"production": {}}}


@dataclass
class Team:
    """A working folder and the registry that its commands use.

    ``weak`` and ``good`` are saved folders of U-Nets, registered as ``seed-weak/1`` and
    ``seed-good/1``, ``detector`` that of ``planes-det/1``.
    """

    project: Project
    env: dict[str, str]
    weak: Path
    good: Path
    detector: Path
    server: MlflowServer | None = None
    store: ObjectStore | None = None

    @property
    def folder(self) -> Path:
        """Where its commands run."""
        return self.project.folder

    @property
    def data(self) -> str:
        """The airfield."""
        return str(self.project.data)

    @property
    def client(self) -> MlflowClient:
        """A client of the registry."""
        return MlflowClient(self.env["MLFLOW_TRACKING_URI"])

    def registry(self, *arguments, **options):
        """Run the planes-registry command."""
        return self.project.registry(*arguments, **{**self.env, **options})

    def score(self, *arguments, **options):
        """Run the score command, without overlays."""
        return self.project.score(*arguments, "--overlays", "0", **{**self.env, **options})

    def register(self, saved: Path, name: str, **tags: str) -> None:
        """Register a saved folder with files of its own, as a training does."""
        self.project.register(saved, name, tags, **self.env)

    def model(self, name: str, *seeds: str, tags: Mapping[str, str] | None = None) -> str:
        """Register versions 1, 2, ... with the files and tags of ``seed-weak`` or ``seed-good``; return the name."""
        with commands.working_in(self.folder, self.project.env(**self.env)):
            for seed in seeds:
                of = self.seed(seed)
                mlflow.register_model(str(of.source), name, tags={**of.tags, **(tags or {})})
        return name

    def seed(self, name: str) -> ModelVersion:
        """The version that others are made of."""
        return self.client.get_model_version(f"seed-{name}", "1")

    def aliases(self, name: str) -> dict[str, str]:
        """Alias -> version."""
        return {k: str(v) for k, v in self.client.get_registered_model(name).aliases.items()}

    def gates(self, name: str, content: dict) -> str:
        """The path of a gates' file with this content."""
        path = self.folder / f"{name}.yaml"
        path.write_text(yaml.safe_dump(content))
        return str(path)

    @property
    def no_gates(self) -> tuple[str, str]:
        """The option for gates that require nothing."""
        return "--gates", self.gates("nothing", NOTHING_REQUIRED)

    def promote(self, version: str, alias: str = "production", **options):
        """Promote through gates that require nothing."""
        return self.registry("promote", version, "--to", alias, *self.no_gates, **options)

    def entries(self, name: str) -> list[dict]:
        """The journal as the history tells it, read without a command."""
        return [asdict(e) for e in journal.read_journal(Registry(self.client), name)]

    def content(self, version: ModelVersion, path: str) -> bytes:
        """A file of a version, read where the store keeps it."""
        source = self.client.get_model_version_download_uri(version.name, version.version)
        if self.store is None:
            return (Path(source) / "artifacts" / path).read_bytes()
        key = f"artefacts/{source.partition(':/')[2].strip('/')}/artifacts/{path}"
        return self.store.s3.get_object(Bucket=BUCKET, Key=key)["Body"].read()


# Logins and verification are tried on both stores, the rest on PostgreSQL in `make soak`, races thirty rounds long.
ON_BOTH = ("test_rights", "test_verification")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leave the half of the other files that runs on PostgreSQL to `make soak`."""
    for item in items:
        parameters = item.callspec.params if isinstance(item, pytest.Function) and hasattr(item, "callspec") else {}
        if parameters.get("_team") == "postgresql-s3" and item.path.stem not in ON_BOTH:
            item.add_marker(pytest.mark.soak)


def gates_on(team: Team, **production: Any) -> dict:
    """Gates for production that are evaluated on the airfield's test scenes, and for a challenger."""
    data = [{"path": team.data, "split": "test"}]
    challenger = {"against": "production", "metrics": {"IoU": {"minimum": 0.1}}}
    return {"data": data, "gates": {"production": production, "challenger": challenger}}


@pytest.fixture(scope="session")
def saved(tmp_path_factory, airfield) -> tuple[Path, Path, Path]:
    """Saved folders of a U-Net of 4 steps, one of 24, and a detector with random weights."""
    folder, train = tmp_path_factory.mktemp("saved"), open_dataset(str(airfield), "train")

    def segmenter(steps: int) -> Path:
        recipe = load_recipe("demo_unet", [*UNET, "training.epochs=null", f"training.steps={steps}"])
        assert isinstance(recipe, UNetRecipe)
        return train_unet(recipe, train, None, folder=folder / str(steps), device="cpu")[0]

    recipe = load_recipe("demo_detector", DETECTOR)
    assert isinstance(recipe, DetectorRecipe)
    torch.manual_seed(0)
    weights = build_detector(recipe.architecture, 1).state_dict()
    detector = save_model(folder / "detector", detector_spec(recipe.architecture, ["plane"], tiling=recipe.tiling), weights)
    return segmenter(4), segmenter(24), detector


@pytest.fixture(scope="session", params=["sqlite", "postgresql-s3"])
def _team(request, saved, airfield, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    weak, good, detector = saved
    made = Team(Project(folder, airfield), {}, weak, good, detector)
    started: list[Any] = []
    if request.param == "sqlite":
        made.env["MLFLOW_TRACKING_URI"] = f"sqlite:///{folder / 'mlflow.db'}"
    else:
        for kind in (Postgres, ObjectStore):
            if kind.missing():
                pytest.skip(kind.missing())
        base = tmp_path_factory.mktemp("servers")
        database, store = Postgres(base / "postgres"), ObjectStore(base / "s3")
        started += [database, store]
        database.start()
        store.start()
        made.server = MlflowServer(base / "mlflow", {**made.project.env(), **store.env}, database.uri, store.uri, auth=True)
        made.server.start()
        started.append(made.server)
        made.store = store
        made.env |= {"MLFLOW_TRACKING_URI": made.server.uri, "PLANES_CACHE": str(folder / "cache"), **made.server.admin}
    known = {"data": "airfield/train", "data_digest": "0" * 16, "git_commit": "0" * 40}
    made.register(weak, "seed-weak", **known)
    made.register(good, "seed-good", **known)
    made.register(detector, "planes-det")
    yield made
    for server in reversed(started):
        server.stop()


@pytest.fixture
def team(_team, monkeypatch):
    """The team; tests that use its client are logged in as its administrator."""
    for key, value in (_team.server.admin if _team.server else {}).items():
        monkeypatch.setenv(key, value)
    return _team


@pytest.fixture
def team_with_logins(team):
    """The team whose server has logins."""
    if team.server is None:
        pytest.skip("a SQLite store has no logins")
    return team


def history(team: Team, name: str) -> list[tuple]:
    """Every move of a model's aliases as the command tells it: alias, from, to, kind, state."""
    told = json.loads(team.registry("history", name, "--json").stdout)
    return [
        (m["move"]["alias"], m["move"]["origin"], m["move"]["to"], m["move"]["kind"], m["state"]) for m in told["moves"]
    ]
