"""The class that a version detects; it decides which annotations the version is measured against."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from models.errors import ModelError
from models.saved.spec import read_spec

# The default category.
PLANE = "plane"


def category_of(folder: Path, label: str, measured: bool = True) -> str:
    """The class of a saved model; ``label`` is how messages call it.

    Raises:
        ModelError: it finds several classes and is to be ``measured``: one of them would be held against all.
    """
    classes = read_spec(folder).classes
    if len(classes) > 1 and measured:
        raise ModelError(
            f"{label}: finds {len(classes)} classes ({', '.join(classes)}) and can only be measured by one; "
            "score images without annotations"
        )
    return classes[0]


def common_category(categories: Mapping[str, str], what: str) -> str:
    """The one class of all that is named; ``what`` begins the error message.

    Raises:
        ModelError: they find different classes.
    """
    if len({c.lower() for c in categories.values()}) > 1:
        finds = ", ".join(f"{label} finds {category}" for label, category in categories.items())
        raise ModelError(f"{what}: {finds}; only versions of one class can be held against each other")
    return next(iter(categories.values()), PLANE)
