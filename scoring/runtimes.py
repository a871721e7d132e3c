"""What runs a version's networks: PyTorch, or the fastest of its twins that this CPU can compute."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from models.errors import DataError, RegistryError
from models.runtime.devices import TwinPrecision
from models.twins import is_twin, precisions_of
from pipelines.registry.model_versions import Registry, Resolved
from pipelines.registry.twins import Twin, fetch_twin, twins_of, usable
from scoring.jobs.manifest import MANIFEST, read_manifest
from scoring.requests import TORCH, Runtime

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Chosen:
    """The saved folder whose networks are run, and by what: ``torch`` or ``openvino bf16``."""

    folder: Path
    name: str = TORCH


@dataclass(frozen=True, kw_only=True)
class Conditions:
    """What decides between runtimes.

    Attributes:
        device: of the job.
        precision: the requested one.
        job: folder of the job.
        elsewhere: the job runs on machines of which nothing is known here.
        fresh: what is in the folder does not count.
    """

    device: str
    precision: str
    job: Path
    elsewhere: bool = False
    fresh: bool = False


def choose_runtime(registry: Registry, version: Resolved, parent: Path, *, runtime: Runtime, now: Conditions) -> Chosen:
    """Choose what runs a version, and say which and why.

    ``auto`` keeps what the job in the folder began with.

    Raises:
        RegistryError: ``openvino``, and there is no twin that can be used; a twin that is not what was measured.
        ModelError: a twin of another model.
    """
    if version.name is None and is_twin(parent):
        why = "it is a twin, name its parent" if runtime == "torch" else _why_torch(now)
        if why is not None:
            raise RegistryError(f"{version.text}: a twin, which OpenVINO alone runs ({why})")
        return Chosen(parent, _name_of_folder(parent))
    if runtime == "torch":
        return Chosen(parent)
    twins = twins_of(registry.version_of(version)) if version.name else []
    unusable = {twin.precision: usable(twin) for twin in twins}
    ready = [twin for twin in twins if unusable[twin.precision] is None]
    why = _why_torch(now) or _why_none(version, twins, unusable)
    held = _held(now)
    if runtime == "auto" and held is not None:
        ready = [twin for twin in ready if _name(twin) == held]
        if held == TORCH:
            why = "as the scoring in the folder began"
        elif not ready:
            why = why or f"the scoring in the folder began as {held}, which this version has no more"
    if why is None and ready:
        chosen = ready[0]
        log.info(f"{version.label}: runs as its twin, {chosen}")
        return Chosen(fetch_twin(registry, version, parent, chosen), _name(chosen))
    if runtime == "openvino":
        raise RegistryError(f"{version.label}: --runtime openvino: {why}")
    if find_spec("torch") is None:
        raise RegistryError(f"{version.label}: PyTorch is not installed here, and a twin cannot stand in: {why}")
    log.info(f"{version.label}: runs on PyTorch ({why})")
    return Chosen(parent)


def _name(twin: Twin) -> str:
    return f"openvino {twin.precision}"


def _name_of_folder(folder: Path) -> str:
    return f"openvino {' '.join(dict.fromkeys(precisions_of(folder)))}"


def _held(now: Conditions) -> str | None:
    """What runs the job in the folder, if there is one."""
    if now.fresh or not (now.job / MANIFEST).exists():
        return None
    try:
        return str(read_manifest(now.job).settings["runtime"])
    except DataError:
        # Said where the folder is claimed.
        return None


def _why_torch(now: Conditions) -> str | None:
    if now.elsewhere:
        return "of the cluster's CPUs nothing is known here"
    if now.device != "cpu":
        return f"twins are for CPUs, the device is {now.device}"
    if now.precision != "32":
        return f"--precision {now.precision} is PyTorch's"
    return None


def _why_none(version: Resolved, twins: list[Twin], unusable: Mapping[TwinPrecision, str | None]) -> str | None:
    if not version.name:
        return "a saved folder has no twins; name a registered version"
    if not twins:
        return f"no twin is approved; planes-registry accelerate {version.label} makes them"
    if all(unusable.values()):
        return "; ".join(f"{precision}: {reason}" for precision, reason in unusable.items())
    return None
