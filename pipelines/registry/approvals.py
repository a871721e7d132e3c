"""What a version's tags name as approved, each by its precision: twins, and half precisions on a GPU."""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar, TypeVar

from mlflow.entities.model_registry import ModelVersion
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from models.errors import RegistryError


class Approved(BaseModel):
    """Content of such a tag."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    # Of the tag: what comes before the precision.
    prefix: ClassVar[str]

    precision: str
    speedup: float = Field(gt=0, description="Seconds an image before, over those after, when it was measured.")
    run_id: str = Field(pattern=r"^\w{1,64}$", description="Run that measured it.")

    @property
    def tag(self) -> str:
        """Name of the tag that names it."""
        return self.prefix + self.precision


A = TypeVar("A", bound=Approved)


def approved_of(record: ModelVersion, kind: type[A], precisions: Iterable[str], remedy: str) -> list[A]:
    """What a version's tags of a kind name, the fastest first.

    Args:
        remedy: options of ``planes-registry accelerate`` that make a damaged tag again.

    Raises:
        RegistryError: a tag that names none.
    """
    known = []
    for precision in precisions:
        text = record.tags.get(kind.prefix + precision)
        if text is None:
            continue
        try:
            one = kind.model_validate_json(text)
            if one.precision != precision:
                raise ValueError("is of another precision")
        except (ValidationError, ValueError) as error:
            label = f"{record.name}/{record.version}"
            command = " ".join(filter(None, ["planes-registry accelerate", label, remedy]))
            tag = kind.prefix + precision
            raise RegistryError(f"{label}: its tag {tag} names none; {command} makes it again") from error
        known.append(one)
    return sorted(known, key=lambda one: -one.speedup)
