"""Typed training settings: built-in defaults <- recipe YAML <- overrides; unknown keys name the nearest known one."""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from models.errors import RecipeError, one_line
from models.torchvision_engine import DetectorArchitecture
from models.unet import SegmenterArchitecture
from pipelines.data.augment import Augmentation

RECIPES = Path(__file__).parent / "recipes"


class _Settings(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class DataSettings(_Settings):
    """Which planes to learn from and what is held back for validation."""

    category: str = "plane"
    val_fraction: float = Field(default=0.15, ge=0, lt=1)
    scene_pattern: str | None = None


class OptimizerSettings(_Settings):
    """Optimiser and learning rate; ``clip_norm`` 0 switches gradient clipping off."""

    name: Literal["adam", "adamw", "sgd"] = "adamw"
    lr: float = Field(default=5e-4, gt=0)
    weight_decay: float = Field(default=1e-4, ge=0)
    momentum: float = Field(default=0.9, ge=0, lt=1)
    clip_norm: float = Field(default=5.0, ge=0)
    schedule: Literal["constant", "cosine", "steps"] = "cosine"
    warmup_steps: int = Field(default=50, ge=0)
    milestones: list[int] = []
    gamma: float = Field(default=0.1, gt=0, le=1)


class TrainingSettings(_Settings):
    """How long and how often; ``epochs``, where given, decides instead of ``steps``.

    ``evaluate_every`` and ``checkpoint_every`` count steps; null means an epoch.
    """

    steps: int = Field(default=1000, ge=1)
    epochs: int | None = Field(default=None, ge=1)
    batch_size: int = Field(default=8, ge=1)
    evaluate_every: int | None = Field(default=None, ge=1)
    checkpoint_every: int | None = Field(default=None, ge=1)
    workers: int = Field(default=0, ge=0)
    seed: int = Field(default=0, ge=0)


class _Recipe(_Settings):
    name: str = Field(min_length=1, pattern=r"^[A-Za-z0-9_.-]+$")
    weights: str = "none"
    data: DataSettings = DataSettings()
    augmentation: Augmentation = Augmentation()
    optimizer: OptimizerSettings = OptimizerSettings()
    training: TrainingSettings = TrainingSettings()

    def flat(self) -> dict[str, Any]:
        """All settings as ``section.key`` -> value, for MLflow params."""
        return dict(_flatten(self.model_dump()))

    def key(self, *more: str) -> str:
        """Digest of all settings and ``more``, 12 hex digits."""
        return hashlib.sha256(json.dumps([self.model_dump(), more], sort_keys=True).encode()).hexdigest()[:12]


class DetectorRecipe(_Recipe):
    """Settings of ``train_detector``.

    ``window``: side in pixels of the random windows to train on, null for whole
    images; ``focus``: share of windows placed on a plane; ``min_visible``: share of a
    cut plane's box that must be inside for it to count.
    """

    task: Literal["detector"]
    architecture: DetectorArchitecture = DetectorArchitecture()
    window: int | None = Field(default=None, ge=64, le=8192)
    focus: float = Field(default=0.8, ge=0, le=1)
    min_visible: float = Field(default=0.35, gt=0, le=1)


class UNetRecipe(_Recipe):
    """Settings of ``train_unet``; ``box_jitter`` moves each side by up to that share of the box."""

    task: Literal["unet"]
    architecture: SegmenterArchitecture = SegmenterArchitecture()
    loss: Literal["bce", "bce_dice"] = "bce_dice"
    box_jitter: float = Field(default=0.0, ge=0, le=0.5)


Recipe = Annotated[DetectorRecipe | UNetRecipe, Field(discriminator="task")]


def known_recipes() -> list[str]:
    """Names of the recipes that come with the project."""
    return sorted(p.stem for p in RECIPES.glob("*.yaml"))


def load_recipe(name: str, overrides: Sequence[str] = (), task: str | None = None) -> DetectorRecipe | UNetRecipe:
    """Read a recipe by name or path and apply ``section.key=value`` overrides.

    Raises:
        RecipeError: unknown recipe, unknown key (naming the nearest), or a bad value.
    """
    path = Path(name) if name.endswith((".yaml", ".yml")) else RECIPES / f"{name}.yaml"
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        near = difflib.get_close_matches(name, known_recipes(), 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise RecipeError(f"recipe {name!r}: not found{hint} Known: {', '.join(known_recipes())}") from None
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise RecipeError(f"recipe {path}: not valid YAML ({one_line(error)[:200]})") from None
    if not isinstance(content, dict):
        raise RecipeError(f"recipe {path}: expected keys and values")
    for override in overrides:
        _apply(content, override)
    content.setdefault("name", path.stem)
    return parse_recipe(content, f"recipe {name}", task)


def parse_recipe(content: Mapping[str, Any], where: str, task: str | None = None) -> DetectorRecipe | UNetRecipe:
    """Validate raw settings; ``where`` begins the error message."""
    found = content.get("task")
    if task and found != task:
        raise RecipeError(f"{where}: is for task {found!r}, this command trains {task!r}")
    model = {"detector": DetectorRecipe, "unet": UNetRecipe}.get(str(found))
    if model is None:
        raise RecipeError(f"{where}: task: expected detector or unet, found {found!r}")
    try:
        return TypeAdapter(model).validate_python(content)
    except ValidationError as error:
        first = error.errors()[0]
        loc = [v for v in first["loc"] if isinstance(v, str)]
        if first["type"] == "extra_forbidden":
            raise RecipeError(f"{where}: {unknown_key(model, loc)}") from None
        raise RecipeError(
            f"{where}: {'.'.join(map(str, first['loc']))}: {first['msg']}, found {first['input']!r}"
        ) from None


def unknown_key(model: type[BaseModel], loc: Sequence[str]) -> str:
    """The message for a key that ``model`` does not have: names the nearest one beside it, or of that name elsewhere."""
    known = _paths(model)
    parent = "".join(f"{section}." for section in loc[:-1])
    beside = list(dict.fromkeys(k.removeprefix(parent).split(".")[0] for k in known if k.startswith(parent)))
    near = [parent + k for k in difflib.get_close_matches(loc[-1], beside, 1, 0.6)]
    near = near or [k for k in known if k.split(".")[-1] == loc[-1]]
    key = ".".join(loc)
    if near:
        return f"unknown key {key!r}; did you mean {near[0]!r}?"
    return f"unknown key {key!r}; known here: {', '.join(parent + k for k in beside)}"


def _paths(model: type[BaseModel], prefix: str = "") -> list[str]:
    paths = []
    for name, info in model.model_fields.items():
        kind = info.annotation
        if get_origin(kind) is None and isinstance(kind, type) and issubclass(kind, BaseModel):
            paths += _paths(kind, f"{prefix}{name}.")
        else:
            paths.append(prefix + name)
    return paths


def _apply(content: dict[str, Any], override: str) -> None:
    key, sign, value = override.partition("=")
    if not sign or not key.strip():
        raise RecipeError(f"override {override!r}: expected section.key=value")
    *sections, last = key.strip().split(".")
    for section in sections:
        inner = content.setdefault(section, {})
        if not isinstance(inner, dict):
            raise RecipeError(f"override {override!r}: {section} is a value, not a section")
        content = inner
    try:
        content[last] = yaml.safe_load(value)
    except yaml.YAMLError:
        raise RecipeError(f"override {override!r}: value is not valid YAML") from None
    # YAML 1.1 reads 1e-4 as text; a number was meant.
    if isinstance(content[last], str):
        try:
            content[last] = float(content[last])
        except ValueError:
            pass


def _flatten(content: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    rows: list[tuple[str, Any]] = []
    for name, value in content.items():
        rows += _flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else [(prefix + name, value)]
    return rows
