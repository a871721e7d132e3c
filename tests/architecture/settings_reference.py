"""Writes docs/settings.md from the settings' own descriptions: `python -m tests.architecture.settings_reference`."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from models.engines.composed import ComposedArchitecture
from pipelines.recipes.settings import DetectorRecipe, Detectron2Recipe, MaskRecipe, UNetRecipe
from pipelines.registry.gates import GateFile
from pipelines.use_cases.requests import (
    AblationRequest,
    AccelerateRequest,
    ComposeRequest,
    PromotionRequest,
    TrainingRequest,
)
from scoring.requests import ComparisonRequest, Execution, JobSettings, LayerSettings, ScoreRequest

PAGE = Path(__file__).parents[2] / "docs" / "settings.md"
HEAD = """# Settings

Every setting of recipes, compositions, gates and requests, with its default and its limits. A recipe is a YAML file of
these keys (`pipelines/recipes/`), `--set section.key=value` changes one for a training, and MLflow logs all of them as
parameters.
This page is made by `python -m tests.architecture.settings_reference`.
"""
SECTIONS: list[tuple[str, type[BaseModel]]] = [
    ("Recipes of `train_detector`, engine torchvision", DetectorRecipe),
    ("Recipes of `train_maskrcnn`, engine torchvision", MaskRecipe),
    ("Recipes of both, engine detectron2", Detectron2Recipe),
    ("Recipes of `train_unet`", UNetRecipe),
    ("Compositions", ComposedArchitecture),
    ("Gates", GateFile),
]
REQUESTS_HEAD = """
## Requests

What the functions of [the Python API](python.md) take. The commands' options have these texts, and most have these names.
Those that differ: `register_as` is `--name`, `overrides` `--set`, `models` `--model`, `batch_size` `--batch`, `shard_size`
`--shard`, `value_range` `--range`, `address` `--ray-address`, `precisions` `--precision`, `alias` of a promotion `--to`."""
REQUESTS: list[tuple[str, type]] = [
    ("train", TrainingRequest),
    ("ablate", AblationRequest),
    ("compose", ComposeRequest),
    ("promote", PromotionRequest),
    ("accelerate", AccelerateRequest),
    ("score", ScoreRequest),
    ("score", JobSettings),
    ("score", Execution),
    ("score export", LayerSettings),
    ("compare_targets", ComparisonRequest),
]


def models_in(annotation: Any) -> list[type[BaseModel]]:
    """The settings models that an annotation mentions."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [m for part in get_args(annotation) for m in models_in(part)]


def rows(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, str, str, str]]:
    """Key, type, default and description of every setting; those of sections under ``section.``."""
    for name, field in model.model_fields.items():
        inner = models_in(field.annotation)
        many = get_origin(field.annotation) in (dict, list)
        if inner:
            yield f"{prefix}{name}", "section" if not many else "sections", _default(field), str(field.description)
            yield from rows(inner[0], f"{prefix}{name}.{'NAME.' if get_origin(field.annotation) is dict else ''}")
        else:
            limits = ", ".join(str(m).removeprefix("annotated_types.") for m in map(_limit, field.metadata) if m)
            kind = _type(field.annotation) + (f", {limits}" if limits else "")
            yield f"{prefix}{name}", kind, _default(field), str(field.description)


def _default(field: Any) -> str:
    default = field.default
    if default is PydanticUndefined:
        return "required"
    if isinstance(default, BaseModel):
        return ""
    if default is None or isinstance(default, bool):
        return {None: "null", True: "`true`", False: "`false`"}[default]
    default = list(default) if isinstance(default, tuple) else default
    return f"`{default}`" if default != "" else "empty"


def request_rows(request: type) -> Iterator[tuple[str, str, str, str]]:
    """Field, type, default and help of every field of a request."""
    kinds = get_type_hints(request)
    for field in dataclasses.fields(request):
        made = field.default_factory is not dataclasses.MISSING
        required = field.default is dataclasses.MISSING and not made
        default = "required" if required else "" if made else _python_value(field.default)
        yield field.name, _type(kinds[field.name]).replace("null", "None"), default, field.metadata["help"]


def _python_value(value: object) -> str:
    return "" if dataclasses.is_dataclass(value) else f"`{value!r}`" if value != "" else "empty"


def _limit(limit: Any) -> str:
    signs = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<", "multiple_of": "multiple of"}
    for name, sign in signs.items():
        if hasattr(limit, name):
            return f"{sign} {getattr(limit, name)}"
    return ""


def _type(annotation: Any) -> str:
    origin, inside = get_origin(annotation), get_args(annotation)
    if annotation is type(None):
        return "null"
    if origin is Literal:
        return " or ".join(f"`{value}`" for value in inside)
    if origin in (Union, UnionType):
        return " or ".join(_type(part) for part in inside)
    if hasattr(annotation, "__metadata__"):
        return _type(inside[0])
    if origin in (list, tuple, dict, Mapping):
        return {list: "list", tuple: "list"}.get(origin, "mapping")
    if dataclasses.is_dataclass(annotation):
        return f"`{annotation.__name__}`"
    return {int: "whole number", float: "number", str: "text", bool: "true or false"}.get(annotation, str(annotation))


def page() -> str:
    """The page's text; what two recipes share is written once."""
    parts = [HEAD]
    written: dict[tuple[str, str, str, str], str] = {}
    for title, model in SECTIONS:
        table = list(rows(model))
        new = [row for row in table if row not in written]
        parts.append(f"\n## {title}\n")
        for above in dict.fromkeys(written[row] for row in table if row in written):
            keys = dict.fromkeys(row[0].split(".")[0] for row in table if written.get(row) == above)
            parts.append(f"{', '.join(f'`{key}`' for key in keys)}: as under {above}.\n")
        parts += ["| key | value | default | what it does |", "|---|---|---|---|"]
        parts += [f"| `{key}` | {kind.replace('|', '/')} | {default} | {text} |" for key, kind, default, text in new]
        written |= dict.fromkeys(new, f'"{title}"')
    parts.append(REQUESTS_HEAD)
    for function, request in REQUESTS:
        parts.append(f"\n### `{request.__name__}`, of `{function}`\n")
        parts += ["| field | value | default | what it is |", "|---|---|---|---|"]
        parts += [f"| `{name}` | {kind} | {default} | {text} |" for name, kind, default, text in request_rows(request)]
    return "\n".join(parts) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page())
