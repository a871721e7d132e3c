"""What runs a version's networks: the fastest twin that this CPU computes, or PyTorch, on a GPU in what was approved."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from models.errors import DataError, RegistryError
from models.runtime.devices import Precision, TwinPrecision
from models.twins import is_twin, precisions_of
from pipelines.registry.gpu_precisions import gpu_precisions_of, usable_on
from pipelines.registry.model_versions import Registry, Resolved
from pipelines.registry.twins import Twin, fetch_twin, twins_of, usable
from scoring.jobs.manifest import MANIFEST, read_manifest
from scoring.requests import TORCH, Runtime

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Chosen:
    """What is run.

    Attributes:
        folder: saved folder whose networks are run.
        name: of what runs them: ``torch`` or ``openvino bf16``.
        precision: of PyTorch's networks, where an approved one takes the place of the requested one.
    """

    folder: Path
    name: str = TORCH
    precision: Precision | None = None


@dataclass(frozen=True, kw_only=True)
class Conditions:
    """What decides between runtimes.

    Attributes:
        device: of the job.
        precision: the requested one.
        job: folder of the job; None for one in parts.
        settings: of the job in parts that is there.
        elsewhere: the job runs on machines of which nothing is known here.
        fresh: what is in the folder does not count.
    """

    device: str
    precision: str
    job: Path | None = None
    settings: Mapping[str, Any] | None = None
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
    if runtime == "auto" and now.device.startswith("cuda"):
        return Chosen(parent, precision=_on_gpu(registry, version, now))
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


def _on_gpu(registry: Registry, version: Resolved, now: Conditions) -> Precision | None:
    """The approved half precision that a GPU takes, None for the requested one."""
    if now.elsewhere or not version.name or now.precision != "32":
        return None
    approved = gpu_precisions_of(registry.version_of(version))
    reasons = {one: usable_on(now.device, one) for one in approved}
    ready = [one for one in approved if reasons[one] is None]
    held = _held(now, "precision")
    if held is not None:
        ready = [one for one in ready if one.precision == held]
    if ready:
        log.info(f"{version.label}: runs in {ready[0]}")
        return ready[0].precision
    if held == "32":
        why = "as the scoring in the folder began"
    elif held is not None:
        why = f"the scoring in the folder began in {held}, which this version has no more"
    elif approved:
        why = "; ".join(str(reason) for reason in reasons.values())
    else:
        why = f"no other is approved; planes-registry accelerate {version.label} --device cuda measures them"
    log.info(f"{version.label}: runs in full precision ({why})")
    return None


def _name(twin: Twin) -> str:
    return f"openvino {twin.precision}"


def _name_of_folder(folder: Path) -> str:
    return f"openvino {' '.join(dict.fromkeys(precisions_of(folder)))}"


def _held(now: Conditions, setting: str = "runtime") -> str | None:
    """A setting of the job in the folder, if there is one."""
    if now.fresh:
        return None
    if now.settings is not None:
        return str(now.settings[setting])
    if now.job is None or not (now.job / MANIFEST).exists():
        return None
    try:
        return str(read_manifest(now.job).settings[setting])
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
