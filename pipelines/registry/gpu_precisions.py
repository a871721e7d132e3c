"""Half precisions that a version passed its gates in on a GPU, named by its tags.

The weights are the version's own: a precision is no artefact, only the tag ``gpu_bf16-mixed`` or ``gpu_16-mixed``.
"""

from __future__ import annotations

from typing import ClassVar

from mlflow.entities.model_registry import ModelVersion
from pydantic import Field

from models.runtime.devices import HalfPrecisionKind, computes_in
from pipelines.registry.approvals import Approved, approved_of
from pipelines.registry.model_versions import Registry, Resolved
from pipelines.tracking.mlflow_runs import store_errors

TAG = "gpu_"
KINDS: tuple[HalfPrecisionKind, ...] = ("bf16-mixed", "16-mixed")


class GpuPrecision(Approved):
    """What a version's tag says of a half precision that passed its gates."""

    prefix: ClassVar[str] = TAG

    precision: HalfPrecisionKind
    gpu: str = Field(max_length=200, description="Name of the GPU that it was measured on.")

    def __str__(self) -> str:
        return f"{self.precision}, {self.speedup:.2f} times as fast when measured ({self.gpu}, run {self.run_id})"


def usable_on(device: str, one: GpuPrecision) -> str | None:
    """Why a precision cannot be used on a GPU, if so."""
    return None if computes_in(device, one.precision) else f"this GPU does not compute in {one.precision}"


def gpu_precisions_of(record: ModelVersion) -> list[GpuPrecision]:
    """A version's approved half precisions, the fastest first.

    Raises:
        RegistryError: a tag that names none.
    """
    return approved_of(record, GpuPrecision, KINDS, "--device cuda")


def name_gpu_precision(registry: Registry, version: Resolved, one: GpuPrecision) -> None:
    """Tag a version with a precision that passed its gates; an earlier measurement gives way.

    Raises:
        RegistryError: the store refuses.
    """
    with store_errors(f"{version.label}: cannot be tagged"):
        registry.client.set_model_version_tag(str(version.name), str(version.version), one.tag, one.model_dump_json())


def forget_gpu_precision(registry: Registry, version: Resolved, kind: HalfPrecisionKind) -> None:
    """Remove the tag of a precision that does not pass its gates any more.

    Raises:
        RegistryError: the store refuses.
    """
    if TAG + kind in registry.version_of(version).tags:
        with store_errors(f"{version.label}: its tag cannot be removed"):
            registry.client.delete_model_version_tag(str(version.name), str(version.version), TAG + kind)
