"""What of this machine and environment the commands find: one line each, with what to do where something is missing."""

from __future__ import annotations

import os
import platform
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from models.errors import PlanesError, one_line
from models.runtime.instructions import cpu_flags, cpu_threads
from pipelines.registry.model_versions import Registry, cache_folder
from pipelines.tracking.mlflow_runs import STORE

State = Literal["ok", "optional", "problem"]

# What all of it needs, by the names of packages.
NEEDED = ("pycocotools", "pandas", "pyarrow", "click", "rasterio")
# What a scorer's environment, which has no torch, does without.
BESIDE_TORCH = ("mlflow", "segmentation-models-pytorch", "timm")
# Package -> what it is for, and how to get it.
OPTIONAL = {
    "detectron2": ("the engine detectron2", "conda install -c conda-forge detectron2, or its own installation page"),
    "openvino": ("twins that are faster on a CPU", "pip install openvino"),
    "nncf": ("twins in eight bits", "pip install nncf"),
    "ray": ("score --runner ray", 'pip install "ray[data]"'),
    "s3fs": ("images in s3://", "pip install s3fs"),
    "geopandas": ("score export --to geopackage", "pip install geopandas pyogrio"),
    "optuna": ("ablate --search", "pip install optuna"),
}
# torch and torchvision that belong together: minor version of torch 2 plus this is that of torchvision 0.
APART = 15
GIGABYTE = 1_000_000_000
LEAST_FREE = 5 * GIGABYTE


@dataclass(frozen=True)
class Check:
    """One line.

    Attributes:
        state: ok, optional (missing, and only some commands need it), or problem.
        name: what was looked at.
        found: what was found.
        remedy: what to do, empty where nothing is to be done.
    """

    state: State
    name: str
    found: str
    remedy: str = ""


def examine() -> list[Check]:
    """Look at everything; nothing is written, and no store is made."""
    checks: list[Check] = []
    for look in (_python, _packages_of_ours, _torch, _packages, _cpu, _gpu, _optional, _store, _disk):
        checks += look()
    return checks


def _python() -> Iterator[Check]:
    found = f"{platform.python_version()} in {sys.prefix}"
    yield Check("ok", "Python", found)


def _packages_of_ours() -> Iterator[Check]:
    """Other packages may have the names of ours; all three must lie in one folder."""
    here = Path(__file__).resolve().parents[2]
    specs = {name: find_spec(name) for name in ("models", "pipelines", "scoring")}
    places = {name: Path((spec.submodule_search_locations or [""])[0]) for name, spec in specs.items() if spec}
    others = {name: place for name, place in places.items() if place.resolve() != here / name}
    if not others:
        yield Check("ok", "planes", f"{_version('planes') or 'not installed, run from source'} in {here}")
        return
    name, place = next(iter(others.items()))
    remedy = "rename the other one, or take its folder out of PYTHONPATH"
    yield Check("problem", "planes", f"package {name} is that of {place}, not of {here / name}", remedy)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _torch() -> Iterator[Check]:
    torch, vision = _version("torch"), _version("torchvision")
    if torch is None:
        yield Check("optional", "PyTorch", "not installed: twins can be scored, no more", "pip install -r requirements.txt")
        return
    if vision is None:
        yield Check("problem", "PyTorch", "torchvision is not installed", "pip install -r requirements.txt")
        return
    found = f"torch {torch}, torchvision {vision}"
    try:
        fits = int(vision.split(".")[1]) - int(torch.split(".")[1]) == APART
    except (IndexError, ValueError):
        fits = False
    remedy = "" if fits else "they are not of one release; pip install -r requirements.txt"
    yield Check("ok" if fits else "problem", "PyTorch", found, remedy)


def _packages() -> Iterator[Check]:
    needed = (*NEEDED, *BESIDE_TORCH) if _version("torch") else NEEDED
    missing = [name for name in needed if _version(name) is None]
    # There are two packages of OpenCV, and either will do.
    opencv = next(
        (f"{name} {_version(name)}" for name in ("opencv-python", "opencv-python-headless") if _version(name)), ""
    )
    if not opencv:
        missing.append("opencv-python")
    if missing:
        yield Check("problem", "packages", f"not installed: {', '.join(missing)}", "pip install -r requirements.txt")
    else:
        yield Check(
            "ok", "packages", f"mlflow {_version('mlflow') or _version('mlflow-skinny')}, {opencv} and what else is needed"
        )


def _cpu() -> Iterator[Check]:
    kinds = {"amx_bf16": "AMX", "avx512_bf16": "AVX-512 BF16", "avx512_vnni": "VNNI"}
    known = [name for flag, name in kinds.items() if flag in cpu_flags()]
    fast = "trains in bfloat16" if {"AMX", "AVX-512 BF16"} & set(known) else "trains in full precision"
    threads = cpu_threads()
    said = " (OMP_NUM_THREADS)" if os.environ.get("OMP_NUM_THREADS") else ""
    yield Check("ok", "CPU", f"{threads} threads{said}, {', '.join(known) or 'none of AMX, AVX-512 BF16, VNNI'}: {fast}")


def _gpu() -> Iterator[Check]:
    if find_spec("torch") is None:
        return
    import torch

    if not torch.cuda.is_available():
        yield Check("optional", "GPU", "none that torch can use", "--device auto takes the CPU")
        return
    for number in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(number)
        name = torch.cuda.get_device_name(number)
        yield Check("ok", f"GPU {number}", f"{name}, {free / GIGABYTE:.0f} of {total / GIGABYTE:.0f} GB free")


def _optional() -> Iterator[Check]:
    for name, (purpose, remedy) in OPTIONAL.items():
        found = _version(name)
        if found is None:
            yield Check("optional", name, f"not installed; for {purpose}", remedy)
        else:
            yield Check("ok", name, f"{found}, for {purpose}")


def _store() -> Iterator[Check]:
    given = os.environ.get("MLFLOW_TRACKING_URI")
    local = Path.cwd() / STORE
    if not given and not local.exists():
        yield Check(
            "optional", "store", f"none yet in {local.parent}", "the first command makes one; or set MLFLOW_TRACKING_URI"
        )
        return
    begin = time.perf_counter()
    try:
        registry = Registry.connect()
        models = len(registry.client.search_registered_models(max_results=100))
    except PlanesError as error:
        yield Check("problem", "store", one_line(error, 300), "start the server, or unset MLFLOW_TRACKING_URI")
        return
    took = time.perf_counter() - begin
    yield Check("ok", "store", f"{registry.uri}, {models} registered models, answered in {took:.1f} s")


def _disk() -> Iterator[Check]:
    places: list[tuple[str, Callable[[], Path]]] = [
        ("disk here", Path.cwd),
        ("disk of downloaded versions", cache_folder),
        ("disk of temporary files", lambda: Path(tempfile.gettempdir())),
    ]
    for name, where in places:
        place = where()
        there = next(p for p in (place, *place.parents) if p.exists())
        free, writable = shutil.disk_usage(there).free, os.access(there, os.W_OK)
        found = f"{free / GIGABYTE:.0f} GB free in {place}"
        if not writable:
            yield Check("problem", name, f"{place} cannot be written", "choose another folder, or its permissions")
        elif free < LEAST_FREE:
            yield Check("problem", name, found, "make room: trainings and versions take some GB")
        else:
            yield Check("ok", name, found)
