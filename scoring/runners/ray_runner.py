"""Runs a job on Ray Data: shards go to actors, here or on a cluster, and their results come back to be written here.

The job's own shards and manifest decide what is still to be done, not Ray Data's checkpoints:
those know rows that its own sinks have written, keep no order, and do not notice another
model, settings or inputs. So a job may be begun by one runner and ended by the other.
"""

from __future__ import annotations

import logging
import os
import pickle
import socket
import sys
import tempfile
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from models.errors import EngineMissing, ModelError, PlanesError, one_line
from models.instances import Instances
from models.loading import load_model
from models.runtime.devices import Precision, set_threads
from pipelines.data.dataset import Sample
from pipelines.data.remote import absolute
from scoring.reader import Failure
from scoring.runners.local import LocalRunner
from scoring.runners.runner import ShardResult

ROOT = Path(__file__).parents[2]
PACKAGES = ("models", "pipelines", "scoring")
# Shards of a Ray dataset, each a block: what a lost actor does again. More of them are several
# datasets, one after the other, so that millions of images need not be in memory as rows.
MOST_BLOCKS = 4096


@dataclass(frozen=True, kw_only=True)
class RaySettings:
    """How actors predict, and where.

    Attributes:
        device: of each actor's model, as `LocalRunner` takes it.
        batch_size: images that an actor predicts together.
        workers: threads of an actor that decode images.
        precision: of the networks.
        tiling: what to change of the version's tiling.
        address: of a running cluster; None for one in this machine that ends with the job.
        actors: how many; None for one a GPU, or on CPUs one for every two.
        most_actors: with it ``actors`` are those at the beginning, and more are started while the cluster has room for
            them, such as one that adds nodes by itself.
    """

    device: str = "cpu"
    batch_size: int = 1
    workers: int = 1
    precision: Precision = "32"
    tiling: Mapping[str, Any] = field(default_factory=dict)
    address: str | None = None
    actors: int | None = None
    most_actors: int | None = None


class RayRunner:
    """A saved model in the actors of a Ray cluster.

    Raises:
        EngineMissing: Ray is not installed.
    """

    def __init__(self, folder: Path, settings: RaySettings) -> None:
        import_ray()
        self.folder, self.settings = folder, settings
        self._timings: dict[str, float] = {}
        self._peaks: dict[str, float] = {}
        self._little: dict[int, list[str]] = {}

    def timings(self) -> dict[str, float]:
        """See `Runner`; of the actors."""
        return dict(self._timings)

    def peak_megabytes(self) -> dict[str, float]:
        """See `Runner`; of the actor with the most."""
        return dict(self._peaks)

    def little(self, position: int) -> list[str]:
        """See `Runner`."""
        return self._little.pop(position, [])

    def results(self, shards: Sequence[Sequence[Sample]]) -> Generator[ShardResult, None, None]:
        """See `Runner`. A lost actor is started anew, and its shards are predicted again.

        Raises:
            PlanesError: what a local runner raises; the cluster cannot be reached.
        """
        with cluster(self.settings.address), actor_errors():
            packed = packed_model(self.folder)
            for start in range(0, len(shards), MOST_BLOCKS):
                rows = iter(self._dataset(packed, shards[start : start + MOST_BLOCKS]).iter_rows())
                # Whoever stops halfway ends Ray's pipeline before its cluster: after it, its end never comes.
                with closing(rows):
                    for row in rows:
                        yield from self._unpacked(row, shards, start)

    def _unpacked(self, row: Mapping[str, Any], shards: Sequence[Sequence[Sample]], start: int) -> Iterator[ShardResult]:
        """The results of one shard, whose position is counted from ``start``; its timings and peaks are added to ours."""
        results, timings, peaks, little = pickle.loads(row["results"])
        position = start + row["position"]
        self._little[position] = little
        for operation, seconds in timings.items():
            self._timings[operation] = self._timings.get(operation, 0.0) + seconds
        for kind, megabytes in peaks.items():
            self._peaks[kind] = max(self._peaks.get(kind, 0.0), megabytes)
        for _, index, result in results:
            yield position, index, _as_named_here(result, shards[position][index])

    def _dataset(self, packed: bytes, shards: Sequence[Sequence[Sample]]) -> Any:
        items = [{"position": i, "samples": pickle.dumps([_anywhere(s) for s in shard])} for i, shard in enumerate(shards)]
        dataset = import_ray().data.from_items(items, override_num_blocks=len(items))
        how = pool(self.settings, len(shards))
        threads = how.pop("threads")
        more = {"packed": packed, "settings": self.settings, "threads": threads}
        return dataset.map_batches(_Actor, fn_constructor_kwargs=more, **how)


def packed_model(folder: Path) -> bytes:
    """A saved model in the object store of the cluster, as actors of now and later take it."""
    ray = import_ray()
    content = ray.put({p.relative_to(folder).as_posix(): p.read_bytes() for p in _files(folder)})
    # Pickled by hand the reference holds as long as the cluster: a new actor must find the model too.
    return ray.cloudpickle.dumps(content)


def pool(settings: RaySettings, most: int) -> dict[str, Any]:
    """How Ray Data runs actors over blocks of one row, ``most`` at a time; ``threads``: of each actor, for itself.

    Raises:
        ModelError: a GPU is asked for, and the cluster has none.
    """
    ray = import_ray()
    resources = ray.cluster_resources()
    cpus, gpus = resources.get("CPU", 1), resources.get("GPU", 0)
    on_gpu = settings.device != "cpu"
    if on_gpu and not gpus:
        raise ModelError(f"device {settings.device!r}: the Ray cluster has no GPU; use --device cpu")
    actors = min(settings.actors or int(gpus if on_gpu else max(1, cpus // 2)), most)
    share = max(1, int(cpus / actors)) if cpus >= actors else cpus / actors
    threads = int(os.environ.get("OMP_NUM_THREADS") or max(1, int(share)))
    strategy = ray.data.ActorPoolStrategy(size=actors)
    if settings.most_actors is not None:
        # A share of the CPUs that are there now says nothing of those that come; a node must have room for an actor.
        largest = max((int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"]), default=1)
        share = threads = int(os.environ.get("OMP_NUM_THREADS") or max(1, min(2, largest)))
        strategy = ray.data.ActorPoolStrategy(min_size=actors, max_size=max(actors, min(settings.most_actors, most)))
    return {
        # Said here, the number holds in the actors too: with another one results differ in the last bits.
        "threads": threads,
        "batch_size": 1,
        "compute": strategy,
        "num_cpus": share if not on_gpu else 1,
        "num_gpus": 1 if on_gpu else None,
    }


def actor_runner(packed: bytes, settings: RaySettings, threads: int) -> LocalRunner:
    """What predicts in an actor: the model of `packed_model`, loaded there."""
    import ray

    set_threads(threads)
    with tempfile.TemporaryDirectory(prefix="planes-model-") as folder:
        for name, content in ray.get(ray.cloudpickle.loads(packed)).items():
            path = Path(folder) / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        device = device_in_actor(settings.device)
        predictor = load_model(folder, device, settings.tiling)
    return LocalRunner(predictor, device, batch_size=settings.batch_size, workers=settings.workers, kind=settings.precision)


def device_in_actor(device: str) -> str:
    """The job's device as an actor sees it: Ray shows each one a single GPU, which is number 0 there."""
    return device.partition(":")[0]


class _Actor:
    """Loads the model once, predicts a shard a call."""

    def __init__(self, packed: bytes, settings: RaySettings, threads: int) -> None:
        self.runner = actor_runner(packed, settings, threads)

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[Any]]:
        out: dict[str, list[Any]] = {"position": [], "results": []}
        for position, samples in zip(batch["position"], batch["samples"], strict=True):
            before = self.runner.timings()
            results = list(self.runner.results([pickle.loads(samples)]))
            timings = {k: v - before.get(k, 0.0) for k, v in self.runner.timings().items()}
            out["position"].append(int(position))
            out["results"].append(pickle.dumps((results, timings, self.runner.peak_megabytes(), self.runner.little(0))))
        return out


def _anywhere(sample: Sample) -> Sample:
    """The sample with a path that means the same in an actor's working folder."""
    return replace(sample, path=Path(absolute(sample.path))) if isinstance(sample.path, Path) else sample


def _as_named_here(result: Instances | Failure, sample: Sample) -> Instances | Failure:
    """A failure as the local runner tells it: with the path as it was given."""
    if isinstance(result, Instances) or not isinstance(sample.path, Path):
        return result
    given, sent = str(sample.path), absolute(sample.path)
    return replace(result, path=given, message=result.message.replace(sent, given))


def _files(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*") if p.is_file())


def import_ray() -> Any:
    """Ray.

    Raises:
        EngineMissing: it is not installed.
    """
    # Ray reports its use to its makers by default, and warns of what Ray Data
    # itself does, that its actors' arguments lie in the object store.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    try:
        import ray
        import ray.data  # noqa: F401
    except ImportError as error:
        raise EngineMissing("--runner ray: Ray is not installed; pip install 'ray[data]' (the extra 'ray')") from error
    return ray


@contextmanager
def cluster(address: str | None) -> Iterator[None]:
    """A Ray cluster: the running one of an address, one in this machine, or the one that this process is connected to.

    Raises:
        ModelError: it cannot be started or reached.
    """
    ray = import_ray()
    if ray.is_initialized():
        yield
        return
    environment: dict[str, Any] = {"env_vars": {"PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, sys.path)])}}
    if address:
        environment = {"py_modules": [str(ROOT / name) for name in PACKAGES]}
    quiet = {"logging_level": logging.ERROR, "log_to_driver": False}
    local = {} if address else {"include_dashboard": False}
    try:
        _check_reachable(address)
        ray.init(address=address or "local", runtime_env=environment, **quiet, **local)
    except (ConnectionError, RuntimeError, ValueError, OSError) as error:
        raise ModelError(
            f"Ray at {address or 'this machine'}: cannot be started or reached ({one_line(error, 200)})"
        ) from error
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = sys.stderr.isatty()
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    try:
        yield
    finally:
        ray.shutdown()


def _check_reachable(address: str | None) -> None:
    """Raise OSError where no server listens; Ray itself would try for minutes."""
    host, _, port = (address or "").removeprefix("ray://").rpartition(":")
    if host and port.isdigit():
        socket.create_connection((host, int(port)), timeout=10).close()


@contextmanager
def actor_errors() -> Iterator[None]:
    """Raise errors of actors as if they had been raised here."""
    import ray

    try:
        yield
    except ray.exceptions.RayError as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, PlanesError):
            cause = getattr(cause, "cause", None) or cause.__cause__
        if cause is not None:
            raise cause from error
        raise ModelError(f"Ray: {one_line(error)[-300:]}") from error
