"""MLflow runs: the store, params, metrics by model and data set, artefacts, the loop's listener."""

from __future__ import annotations

import contextlib
import logging
import os
import platform
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

# Schema migrations and system metric threads are no news to our users.
for _name in ("alembic", "mlflow"):
    logging.getLogger(_name).setLevel(logging.WARNING)

import mlflow  # noqa: E402
import numpy as np  # noqa: E402
from mlflow.data.meta_dataset import MetaDataset  # noqa: E402
from mlflow.data.sources import LocalArtifactDatasetSource  # type: ignore[attr-defined]  # noqa: E402
from mlflow.entities import LoggedModelInput, Metric  # noqa: E402
from mlflow.tracking import MlflowClient  # noqa: E402

from models.errors import RegistryError, one_line  # noqa: E402
from pipelines.data.dataset import Dataset  # noqa: E402
from pipelines.evaluation.metrics import Evaluation  # noqa: E402
from pipelines.start_up import importing  # noqa: E402
from pipelines.tracking.moved_store import follow_move  # noqa: E402
from pipelines.tracking.pictures import PictureLog  # noqa: E402

EXPERIMENT = "planes"
STORE = "mlflow.db"
# That of `mlflow ui` where none is given.
UI_PORT = 5000
# Tag of every run: the kind of work that it is of, "train" for trainings of all tasks, else the task itself.
JOB_TYPE = "job_type"
_TRAININGS = ("unet", "detector", "maskrcnn")
_ADDRESS = threading.RLock()


def connect(given: str | None = None) -> MlflowClient:
    """Choose and open the tracking store; return its client. MLflow's own address is left as it is.

    ``given``, else ``MLFLOW_TRACKING_URI`` decides; without it the store is ``mlflow.db`` in the
    working folder, artefacts in ``mlruns`` beside it, which is also what a plain
    ``mlflow ui`` there shows.

    Raises:
        RegistryError: the store cannot be reached.
    """
    warnings.filterwarnings("ignore", category=FutureWarning, module="mlflow")
    uri = given or os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{Path.cwd() / STORE}"
    # A server that is down should say so in seconds, not after minutes of retries.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "3")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "30")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    try:
        # The libraries of a store are imported when it is opened.
        with importing(), _store_lock(uri):
            client = MlflowClient(uri)
            client.search_experiments(max_results=1)
            if uri.startswith("sqlite:///"):
                for left in follow_move(Path(uri.removeprefix("sqlite:///"))):
                    logging.getLogger(__name__).warning("%s: was moved here from %s; its paths are put right", uri, left)
    except Exception as error:
        raise RegistryError(
            f"tracking store {uri}: cannot be reached ({one_line(error, 200)}); "
            "check MLFLOW_TRACKING_URI and that the server runs"
        ) from error
    return client


@contextmanager
def addressed(client: MlflowClient) -> Iterator[None]:
    """MLflow's one address of the process is that of ``client`` inside; as it was afterwards.

    Its fluent calls (``mlflow.log_metrics``), and its SQL stores when a version is made of another one,
    look for it there (3.17). One thread at a time.
    """
    uri = str(client.tracking_uri)
    with _ADDRESS:
        # An address that the environment gives is no address that somebody has set.
        environment = os.environ.pop("MLFLOW_TRACKING_URI", None)
        before = mlflow.get_tracking_uri() if mlflow.is_tracking_uri_set() else None
        mlflow.set_tracking_uri(uri)
        os.environ["MLFLOW_TRACKING_URI"] = uri
        try:
            yield
        finally:
            mlflow.set_tracking_uri(before)  # type: ignore[arg-type]
            if environment is None:
                os.environ.pop("MLFLOW_TRACKING_URI", None)
            else:
                os.environ["MLFLOW_TRACKING_URI"] = environment


@contextmanager
def _store_lock(uri: str) -> Iterator[None]:
    """Hold a file lock while a SQLite store may be created: two processes at once break it."""
    if not uri.startswith("sqlite:///"):
        yield
        return
    from filelock import FileLock

    path = Path(uri.removeprefix("sqlite:///"))
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{path}.lock", timeout=120):
        yield


@contextmanager
def tracked_run(
    client: MlflowClient, name: str, tags: Mapping[str, str], *, resume_id: str | None = None, system_metrics: bool = False
) -> Iterator[mlflow.ActiveRun]:
    """An MLflow run: the one that ``mlflow run`` opened, else ``resume_id``, else a new one.

    ``tags`` name its ``task``, from which the tag `JOB_TYPE` follows.
    Ctrl-C ends it as KILLED, an error as FAILED. MLflow's fluent calls go to it inside.
    """
    with addressed(client), _run(client, name, tags, resume_id=resume_id, system_metrics=system_metrics) as run:
        yield run


@contextmanager
def _run(
    client: MlflowClient, name: str, tags: Mapping[str, str], *, resume_id: str | None, system_metrics: bool
) -> Iterator[mlflow.ActiveRun]:
    given = os.environ.get("MLFLOW_RUN_ID")
    if system_metrics:
        mlflow.set_system_metrics_sampling_interval(2)
    run_id = given or (resume_id if resume_id and _exists(client, resume_id) else None)
    named = os.environ.get("MLFLOW_EXPERIMENT_NAME") or os.environ.get("MLFLOW_EXPERIMENT_ID")
    experiment = None if run_id or named else _own_experiment(client)
    # Under `mlflow run` the run has a random name; ours says what it is.
    nested = mlflow.active_run() is not None
    options: dict[str, Any] = {"run_name": name, "log_system_metrics": system_metrics, "nested": nested}
    with mlflow.start_run(run_id=run_id, experiment_id=experiment, **options) as run:
        if given:
            mlflow.set_tag("mlflow.runName", name)
        task = tags.get("task", "other")
        mlflow.set_tags({**source_tags(), JOB_TYPE: "train" if task in _TRAININGS else task, **tags})
        parent = os.environ.get("PLANES_PARENT_RUN_ID")
        if parent:
            mlflow.set_tag("mlflow.parentRunId", parent)
        try:
            yield run
        except KeyboardInterrupt:
            mlflow.end_run("KILLED")
            raise


def _own_experiment(client: MlflowClient) -> str:
    """The id of this project's experiment, which is made where there is none."""
    known = client.get_experiment_by_name(EXPERIMENT)
    if known is None:
        try:
            return str(client.create_experiment(EXPERIMENT))
        except mlflow.MlflowException:
            # Another process was faster.
            known = client.get_experiment_by_name(EXPERIMENT)
            if known is None:
                raise
    return str(known.experiment_id)


def _exists(client: MlflowClient, run_id: str) -> bool:
    try:
        return client.get_run(run_id).info.lifecycle_stage == "active"
    except mlflow.MlflowException:
        return False


@contextlib.contextmanager
def store_errors(what: str, *more: type[Exception]) -> Iterator[None]:
    """Turn errors of the store, and ``more``, into one line: ``what`` could not be done, and why.

    Raises:
        RegistryError: such an error, which is kept as its cause.
    """
    kinds: tuple[type[Exception], ...] = (mlflow.MlflowException, *more)
    try:
        yield
    except kinds as error:
        raise RegistryError(f"{what} ({one_line(error, 300)})") from error


def source_tags() -> dict[str, str]:
    """The git commit of this project's code and whether it was changed since."""
    root = Path(__file__).parents[2]

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, timeout=20)
        return done.stdout.strip() if done.returncode == 0 else ""

    try:
        commit = git("rev-parse", "HEAD")
        changed = bool(git("status", "--porcelain", "--untracked-files=no"))
    except (OSError, subprocess.TimeoutExpired):
        commit, changed = "", False
    return {"git_commit": commit or "unknown", "git_changed": str(changed).lower()}


def log_dataset(dataset: Dataset, context: str) -> MetaDataset:
    """Record a data set with its digest as an input of the active run."""
    logged = mlflow_dataset(dataset)
    mlflow.log_input(logged, context=context)
    return logged


def log_listing(name: str, source: str, digest: str) -> None:
    """Record images that are known by their names alone as an input of the active run."""
    listed = MetaDataset(LocalArtifactDatasetSource(source), name=name, digest=digest)  # type: ignore[abstract]
    mlflow.log_input(listed, context="scoring")


def mlflow_dataset(dataset: Dataset) -> MetaDataset:
    """MLflow's form of a data set: name with split, source, digest."""
    source = LocalArtifactDatasetSource(str(dataset.source.resolve() if dataset.source.exists() else dataset.source))
    return MetaDataset(  # type: ignore[abstract]
        source, name=f"{dataset.name}/{dataset.split}", digest=dataset.digest()
    )


def log_evaluation(prefix: str, evaluation: Evaluation, dataset: Dataset, *, model_id: str | None = None) -> None:
    """Log metrics under ``prefix``, linked to the data set and, where given, the logged model.

    The settings (score threshold, maxDets, digest, split) go into a JSON artefact.
    """
    mlflow.log_metrics(evaluation.finite(prefix), model_id=model_id, dataset=mlflow_dataset(dataset))
    content = {"metrics": evaluation.finite(), "settings": evaluation.settings}
    mlflow.log_dict(content, f"evaluation/{prefix.strip('/').replace('/', '-') or 'metrics'}.json")


def link_model(model_id: str | None) -> str | None:
    """Record a logged model as an input of the active run; its id, None where this user may only read it."""
    if model_id is None:
        return None
    try:
        mlflow.log_input(model=LoggedModelInput(model_id))
    except mlflow.MlflowException as error:
        if not denied(error):
            raise
        return None
    return model_id


def denied(error: BaseException) -> bool:
    """Whether a server with logins refused for want of rights or a login."""
    return getattr(error, "error_code", "") == "PERMISSION_DENIED" or "permission denied" in str(error).lower()


def log_params(params: Mapping[str, Any]) -> None:
    """Log params of the active run; those that a resumed run has already are equal and stay.

    ``mlflow run`` logs an entry point's parameters as they were given (``device``
    auto): where ours says something else, it is logged as ``device.used``.
    """
    run = mlflow.active_run()
    known = mlflow.get_run(run.info.run_id).data.params if run else {}
    texts = {k: "none" if v is None else str(v) for k, v in params.items()}
    mlflow.log_params({f"{k}.used" if known.get(k, v) != v else k: v for k, v in texts.items()})


def log_environment() -> None:
    """Log interpreter, machine and installed packages as ``environment.txt``."""
    head = [f"# Python {platform.python_version()}", f"# {platform.platform()}", f"# {os.cpu_count()} logical CPUs"]
    mlflow.log_text("\n".join([*head, *_installed()]) + "\n", "environment.txt")


@cache
def _installed() -> list[str]:
    """``package==version`` of all installed packages; a second to read, and the same as long as this process runs."""
    return sorted({f"{d.metadata['Name']}=={d.version}" for d in distributions()}, key=str.lower)


class MlflowListener:
    """Logs the loop's records once they are safe in a checkpoint: none is lost, none is logged twice.

    Pictures are logged at once: the same step, taken again, makes the same ones.
    """

    def __init__(self, run_id: str, uri: str) -> None:
        self.run_id, self.uri = run_id, uri
        self._client = MlflowClient(uri)
        self._pictures = PictureLog(self._client, run_id)
        self._logged = 0

    def __reduce__(self) -> tuple[Any, ...]:
        # Sent to the process that trains on several GPUs; a client cannot travel.
        return MlflowListener, (self.run_id, self.uri)

    def on_start(self, history: Sequence[dict[str, Any]], total: int) -> None:
        """Catch up with a history that an earlier process left."""
        points = self._client.get_metric_history(self.run_id, "train/loss") if history else []
        self._logged = max((p.step for p in points), default=0)
        self.on_checkpoint(history)

    def on_step(self, record: dict[str, Any]) -> None:
        """Nothing: the step may still be lost."""

    def on_pictures(self, step: int, pictures: Mapping[str, np.ndarray]) -> None:
        """Log pictures of a validation."""
        self._pictures.log(pictures, step)

    def on_checkpoint(self, history: Sequence[dict[str, Any]]) -> None:
        """Log what is new in the history."""
        now = int(time.time() * 1000)
        new = [r for r in history if r["step"] > self._logged]
        # The server takes at most 1,000 metrics a call; a step is never parted.
        for start in range(0, len(new), 50):
            part = new[start : start + 50]
            metrics = [Metric(k, float(v), now, r["step"]) for r in part for k, v in r.items() if k != "step"]
            self._client.log_batch(self.run_id, metrics=metrics)
        self._logged = max((r["step"] for r in new), default=self._logged)


def ui_link(client: MlflowClient, run_id: str | None = None) -> str:
    """Where the runs are seen in MLflow's UI: the command that starts it, where no server runs, and the address.

    Args:
        run_id: the run whose page is meant; without one, or where it cannot be found, the table of this project's runs
            (without the workflow type MLflow opens both among its pages for generative models).
    """
    uri = str(client.tracking_uri)
    base, first = uri, ""
    if not uri.startswith("http"):
        base = f"http://127.0.0.1:{UI_PORT}"
        first = f"{Path(sys.executable).parent / 'mlflow'} ui --backend-store-uri {uri} --port {UI_PORT}, then "
    place = f"{_experiment(client)}/runs"
    # A run that was deleted since, a server that went down: a link must not end what went well.
    with contextlib.suppress(mlflow.MlflowException):
        if run_id is not None:
            place = f"{client.get_run(run_id).info.experiment_id}/runs/{run_id}"
    return f"{first}{base.rstrip('/')}/#/experiments/{place}?workflowType=machine_learning"


def _experiment(client: MlflowClient) -> str:
    if given := os.environ.get("MLFLOW_EXPERIMENT_ID"):
        return given
    with contextlib.suppress(mlflow.MlflowException):
        known = client.get_experiment_by_name(os.environ.get("MLFLOW_EXPERIMENT_NAME", EXPERIMENT))
        return str(known.experiment_id) if known else "0"
    return "0"
