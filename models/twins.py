"""Twins: saved models converted to OpenVINO, each a saved folder of its own that belongs to its parent."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from models.engines.composed import ComposedArchitecture, save_composed
from models.engines.openvino.settings import TwinArchitecture
from models.errors import ModelError
from models.loading import load_model
from models.runtime.devices import TwinPrecision
from models.saved.allowed_files import COMPONENTS
from models.saved.folder import folder_digest
from models.saved.spec import ModelSpec, parse_architecture, read_spec

if TYPE_CHECKING:
    from models.engines.openvino.quantization import Example

    Calibration = Callable[[], Iterable[Example]]


def make_twin(
    parent: str | Path,
    into: str | Path,
    precision: TwinPrecision,
    *,
    calibration: Calibration | None = None,
    exact: Path | None = None,
) -> Path:
    """Convert a saved model; of a composition both components.

    Args:
        parent: saved folder of the model, which is not changed.
        into: where the twin's saved folder is written, whole or not at all.
        precision: what the twin computes in.
        calibration: gives the images, each with its planes' boxes, that ``int8`` takes its ranges from.
        exact: its twin in full precision where there is one already; others are made of it, and nothing converted again.

    Raises:
        EngineMissing: OpenVINO, NNCF for ``int8``, or the library of the model's engine, is not installed.
        ModelError: no saved model, a twin itself, a network that cannot be converted, or nothing to calibrate on.
    """
    from models.engines.openvino.conversion import halve_twin, save_twin
    from models.engines.openvino.quantization import quantise_twin, require_nncf

    parent = Path(parent)
    spec = read_spec(parent)
    if spec.engine == "openvino":
        raise ModelError(f"{parent}: is a twin itself; name the version that it was made of")
    if precision == "int8":
        if calibration is None:
            raise ModelError(f"{parent}: int8 takes its ranges from images; give data to calibrate on")
        require_nncf()
    with tempfile.TemporaryDirectory() as work:
        if spec.engine == "composed":
            names = {role: spec.versions.get(f"{role}.version", "") for role in COMPONENTS}
            detector, segmenter = (
                make_twin(
                    parent / role, Path(work) / role, precision, calibration=calibration, exact=exact and exact / role
                )
                for role in COMPONENTS
            )
            return save_composed(
                into, detector, segmenter, architecture=parse_architecture(spec, ComposedArchitecture), components=names
            )
        if precision == "f32":
            return save_twin(into, load_model(parent, "cpu", {"size": 0}), spec, folder_digest(parent))
        exact = exact or make_twin(parent, Path(work) / "f32", "f32")
        if precision == "int8" and calibration is not None:
            return quantise_twin(exact, into, load_model(exact, "cpu"), calibration())
        return halve_twin(exact, into)


def is_twin(folder: str | Path) -> bool:
    """Whether a saved folder holds a twin."""
    return all(spec.engine == "openvino" for _, spec in _networks(Path(folder)))


def precisions_of(twin: str | Path) -> list[TwinPrecision]:
    """What the networks of a saved twin compute in."""
    return [parse_architecture(spec, TwinArchitecture).precision for _, spec in _networks(Path(twin))]


def check_twin(parent: str | Path, twin: str | Path) -> None:
    """Check that a saved twin was made of this very parent and is used as it is.

    Raises:
        ModelError: it is of another model, or reads, cuts or names otherwise.
    """
    ours, its = _networks(Path(parent)), _networks(Path(twin))
    if len(ours) != len(its):
        raise ModelError(f"{twin}: is no twin of {parent}")
    for (folder, spec), (place, copy) in zip(ours, its, strict=True):
        if copy.engine != "openvino":
            raise ModelError(f"{place}: is no twin but a {copy.engine} model")
        architecture = parse_architecture(copy, TwinArchitecture)
        if (architecture.parent_engine, architecture.parent_digest) != (spec.engine, folder_digest(folder)):
            raise ModelError(f"{place}: is the twin of another model (digest {architecture.parent_digest[:16]})")
        for field in ("kind", "classes", "tiling", "rendering"):
            if getattr(copy, field) != getattr(spec, field):
                raise ModelError(f"{place}: its {field} is not that of its parent; make the twin again")
    if _composition(parent) != _composition(twin):
        raise ModelError(f"{twin}: composes otherwise than its parent; make the twin again")


def _composition(folder: str | Path) -> ComposedArchitecture | None:
    """How a composition composes; None for another model."""
    spec = read_spec(folder)
    return parse_architecture(spec, ComposedArchitecture) if spec.engine == "composed" else None


def _networks(folder: Path) -> list[tuple[Path, ModelSpec]]:
    """The saved folders of a model that hold networks: its own, or those of its components."""
    spec = read_spec(folder)
    if spec.engine != "composed":
        return [(folder, spec)]
    return [(folder / role, read_spec(folder / role)) for role in COMPONENTS]
