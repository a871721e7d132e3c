"""Exception tree of the project.

PlanesError
├── DataError      an image, annotation file or data set that cannot be used
├── RecipeError    a setting that is unknown or out of range
├── ModelError     a saved model that cannot be built, saved or loaded
│   └── EngineMissing   a library that a model needs is not installed
├── RegistryError  a name, version, alias or stage that cannot be resolved or moved
└── OutputError    a result that cannot be written
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any, Protocol


class PlanesError(Exception):
    """Root of all errors meant for people: one line that says what to do."""


class DataError(PlanesError):
    """An image, annotation file or data set that cannot be used.

    ``kind`` says in a word or two what is wrong with an image, for counting.
    """

    def __init__(self, message: str, kind: str = "unusable") -> None:
        super().__init__(message)
        self.kind = kind


class RecipeError(PlanesError):
    """A setting that is unknown or out of range."""


class ModelError(PlanesError):
    """A saved model that cannot be built, saved or loaded."""


class EngineMissing(ModelError):
    """A library that a model needs is not installed."""


class RegistryError(PlanesError):
    """A name, version, alias or stage that cannot be resolved or moved."""


class OutputError(PlanesError):
    """A result that cannot be written."""


def one_line(error: BaseException, longest: int | None = None) -> str:
    """The message of any exception as one line, never empty, cut after ``longest`` characters.

    >>> one_line(ValueError("first\\n  second")), one_line(ValueError("first second"), 5), one_line(ValueError())
    ('first second', 'first', 'ValueError')
    """
    text = " ".join(str(error).split())
    return (text or type(error).__name__)[:longest]


def did_you_mean(word: str, known: Iterable[str], cutoff: float = 0.6) -> str:
    """The end of a message: the nearest of the known words, empty where none is near.

    >>> did_you_mean("planes-dte", ["planes-det", "planes-unet"]), did_you_mean("boats", ["planes-det"])
    ('; did you mean planes-det?', '')
    """
    near = difflib.get_close_matches(word, list(known), 1, cutoff)
    return f"; did you mean {near[0]}?" if near else ""


class _Invalid(Protocol):
    """pydantic's ValidationError, which need not be imported for it."""

    def errors(self) -> list[Any]: ...


def invalid_field(error: _Invalid) -> str:
    """The first problem of a pydantic ValidationError: ``section.field: what is wrong``."""
    first = error.errors()[0]
    where = ".".join(map(str, first["loc"])) or "whole file"
    return f"{where}: {first['msg'].removeprefix('Value error, ')}"
