"""Recipes: YAML <- overrides -> typed settings; unknown keys name the nearest known one."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, TypeAdapter, ValidationError

from models.errors import RecipeError, invalid_field, one_line
from pipelines.recipes.settings import DetectorRecipe, Detectron2Recipe, MaskRecipe, Recipe, UNetRecipe

RECIPES = Path(__file__).parent


KINDS: dict[tuple[str, str], type[Recipe]] = {
    ("unet", "torch"): UNetRecipe,
    ("detector", "torchvision"): DetectorRecipe,
    ("detector", "detectron2"): Detectron2Recipe,
    ("maskrcnn", "torchvision"): MaskRecipe,
    ("maskrcnn", "detectron2"): Detectron2Recipe,
}

# Short names that mean the same in every engine.
SHORT = {
    "steps": ("training.steps", "opts.SOLVER.MAX_ITER"),
    "epochs": ("training.epochs", ""),
    "batch_size": ("training.batch_size", "opts.SOLVER.IMS_PER_BATCH"),
    "lr": ("optimizer.lr", "opts.SOLVER.BASE_LR"),
    "seed": ("training.seed", "opts.SEED"),
}


def known_recipes() -> list[str]:
    """Names of the recipes that come with the project."""
    return sorted(p.stem for p in RECIPES.glob("*.yaml"))


def load_recipe(name: str, overrides: Sequence[str] = (), *, task: str | None = None, engine: str | None = None) -> Recipe:
    """Read a recipe by name or path and apply ``section.key=value`` overrides.

    Where ``engine`` is another than the recipe's, its twin of that engine is taken,
    the recipe called ``<name>_<engine>``. ``steps``, ``epochs``, ``batch_size``, ``lr``
    and ``seed`` without a section mean the same in every engine.

    Raises:
        RecipeError: unknown recipe, unknown key (naming the nearest), or a bad value.
    """
    content, path = _read(name)
    if engine and _engine(content) != engine:
        if f"{name}_{engine}" not in known_recipes():
            others = [n for n in known_recipes() if (c := _read(n)[0]).get("task") == task and _engine(c) == engine]
            raise RecipeError(
                f"recipe {name}: is for engine {_engine(content)}; for {engine} there are {', '.join(others)}"
            )
        name = f"{name}_{engine}"
        content, path = _read(name)
    for override in overrides:
        _apply(content, override)
    if _engine(content) != "detectron2" and "opts" in content:
        raise RecipeError(f"recipe {name}: opts are Detectron2's settings and this is for {_engine(content)}; use --set")
    content.setdefault("name", path.stem)
    return parse_recipe(content, f"recipe {name}", task)


def _read(name: str) -> tuple[dict[str, Any], Path]:
    path = Path(name) if name.endswith((".yaml", ".yml")) else RECIPES / f"{name}.yaml"
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        near = difflib.get_close_matches(name, known_recipes(), 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise RecipeError(f"recipe {name!r}: not found{hint} Known: {', '.join(known_recipes())}") from error
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise RecipeError(f"recipe {path}: not valid YAML ({one_line(error, 200)})") from error
    if not isinstance(content, dict):
        raise RecipeError(f"recipe {path}: expected keys and values")
    return content, path


def _engine(content: Mapping[str, Any]) -> str:
    return str(content.get("engine", "torch" if content.get("task") == "unet" else "torchvision"))


def parse_recipe(content: Mapping[str, Any], where: str, task: str | None = None) -> Recipe:
    """Validate raw settings; ``where`` begins the error message."""
    kind, engine = content.get("task"), _engine(content)
    if task and kind != task:
        raise RecipeError(f"{where}: is for task {kind!r}, this command trains {task!r}")
    model = KINDS.get((str(kind), engine))
    if model is None:
        known = ", ".join(f"{t} with {e}" for t, e in KINDS)
        raise RecipeError(f"{where}: task {kind!r} with engine {engine!r}: expected one of {known}")
    try:
        return TypeAdapter(model).validate_python(content)
    except ValidationError as error:
        first = error.errors()[0]
        loc = [v for v in first["loc"] if isinstance(v, str)]
        if first["type"] == "extra_forbidden":
            raise RecipeError(f"{where}: {unknown_key(model, loc)}") from error
        # Settings that exclude each other are named in the message; all of them would fill the screen.
        found = "" if not first["loc"] else f", found {first['input']!r}"
        raise RecipeError(f"{where}: {invalid_field(error)}{found}") from error


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
        # A section, or one that may be null.
        kinds = [
            k for k in (info.annotation, *get_args(info.annotation)) if isinstance(k, type) and issubclass(k, BaseModel)
        ]
        if kinds:
            paths += _paths(kinds[0], f"{prefix}{name}.")
        else:
            paths.append(prefix + name)
    return paths


def opts_overrides(pairs: Sequence[str]) -> list[str]:
    """Detectron2's ``KEY VALUE KEY VALUE ...`` as overrides.

    Raises:
        RecipeError: a key without a value.
    """
    if len(pairs) % 2:
        raise RecipeError(f"opts {' '.join(pairs)}: expected pairs of KEY VALUE, the last has no value")
    return [f"opts.{key}={value}" for key, value in zip(pairs[::2], pairs[1::2], strict=True)]


def _apply(content: dict[str, Any], override: str) -> None:
    key, sign, value = override.partition("=")
    if not sign or not key.strip():
        raise RecipeError(f"override {override!r}: expected section.key=value")
    key = key.strip()
    if key in SHORT:
        if key == "steps" and _engine(content) != "detectron2":
            # Where a recipe counts epochs, they would decide.
            content.setdefault("training", {})["epochs"] = None
        key = SHORT[key][_engine(content) == "detectron2"]
        if not key:
            raise RecipeError(f"override {override!r}: Detectron2 counts iterations; give steps instead")
    if key.split(".")[0].isupper() and _engine(content) == "detectron2":
        key = f"opts.{key}"
    # Detectron2's own keys have dots; they stay whole.
    *sections, last = key.split(".", 1) if key.startswith("opts.") else key.split(".")
    for section in sections:
        inner = content.setdefault(section, {})
        if not isinstance(inner, dict):
            raise RecipeError(f"override {override!r}: {section} is a value, not a section")
        content = inner
    try:
        content[last] = yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise RecipeError(f"override {override!r}: value is not valid YAML") from error
    # YAML 1.1 reads 1e-4 as text; a number was meant.
    if isinstance(content[last], str):
        try:
            content[last] = float(content[last])
        except ValueError:
            pass
