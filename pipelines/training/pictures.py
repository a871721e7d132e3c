"""Pictures of validations, for the listeners of a training that show them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from models.errors import one_line

# RGB uint8 (H, W, 3) by name.
Pictures = Callable[[], Mapping[str, np.ndarray]]

# Of a training with more validations so many are shown, spread over it, and the last one.
MOST_SHOWN = 8
# What their names begin with.
VALIDATION_SAMPLE = "validation_sample"

log = logging.getLogger(__name__)


def is_shown(step: int, *, every: int, total: int) -> bool:
    """Whether the validation after ``step`` is one of those that are shown, whatever was shown before."""
    validations = -(-total // every) if every else 1
    return step == total or (step // every) % -(-validations // MOST_SHOWN) == 0


def show(listeners: Sequence[Any], pictures: Pictures | None, step: int, *, every: int, total: int) -> None:
    """Hand the pictures of the validation after ``step`` to the listeners that have an ``on_pictures``, if it is shown.

    Args:
        every: steps between validations; 0: there is one, at the end.
    """
    # Those of one that is not shown are no other one's.
    drawn = pictures() if pictures else {}
    if not drawn or not is_shown(step, every=every, total=total):
        return
    for listener in listeners:
        if hasattr(listener, "on_pictures"):
            try:
                listener.on_pictures(step, drawn)
            except Exception as error:
                # Whatever it is: steps since the last checkpoint are worth more than a picture.
                log.warning("step %d: no pictures of the validation (%s)", step, one_line(error, 200))
