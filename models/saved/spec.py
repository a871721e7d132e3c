"""What model.json says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from models.errors import ModelError, invalid_field, one_line
from models.images.rendering import Rendering
from models.saved.allowed_files import MAX_BYTES, SPEC_FILE
from models.saved.scores import Scores
from models.tiling.settings import Tiling

A = TypeVar("A", bound=BaseModel)

FORMAT = 1


class ModelSpec(BaseModel):
    """Content of model.json. Unknown keys are errors; ``architecture`` is checked by its engine.

    ``tiling``: images are predicted by such tiles; null for whole images. ``rendering``: how image
    files become the RGB uint8 arrays that the model was trained on. ``scores``: what its scores mean, null where
    nothing was held back to learn that from.
    """

    model_config = ConfigDict(extra="forbid")

    format: Literal[1] = 1
    kind: str = Field(max_length=64)
    engine: str = Field(max_length=64)
    architecture: dict[str, Any]
    classes: list[Annotated[str, Field(max_length=200)]] = Field(min_length=1, max_length=10_000)
    versions: dict[str, str] = Field(default_factory=dict, max_length=100)
    tiling: Tiling | None = None
    rendering: Rendering = Rendering()
    scores: Scores | None = None


def read_spec(folder: str | Path) -> ModelSpec:
    """Read and validate model.json.

    Raises:
        ModelError: missing, not JSON, of an unknown format, or with wrong fields.
    """
    path = Path(folder) / SPEC_FILE
    try:
        if path.stat().st_size > MAX_BYTES[SPEC_FILE]:
            raise ModelError(f"{path}: larger than {MAX_BYTES[SPEC_FILE]:,} bytes, not a model description")
        content = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise ModelError(f"{folder}: not a saved model (no {SPEC_FILE})") from error
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path}: not valid JSON ({one_line(error)})") from error
    if isinstance(content, dict) and content.get("format") not in (None, FORMAT):
        raise ModelError(f"{path}: format {content['format']!r}, this release reads {FORMAT}; install the matching release")
    try:
        return ModelSpec.model_validate(content)
    except ValidationError as error:
        raise ModelError(f"{path}: {invalid_field(error)}") from error


def parse_architecture(spec: ModelSpec, kind: type[A]) -> A:
    """The spec's architecture as its engine's settings.

    Raises:
        ModelError: a field that is unknown or out of range, by name.
    """
    try:
        return kind.model_validate(spec.architecture)
    except ValidationError as error:
        raise ModelError(f"{SPEC_FILE}: architecture.{invalid_field(error)}") from error
