"""What shows how far a use case is: nothing by default, bars and lines where a command asks for them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from pipelines.progress import Progress, pass_through


class TrainingDisplay(Protocol):
    """A listener of one training (`pipelines.training.loop.Listener`) that is closed at its end."""

    def on_start(self, history: Sequence[dict[str, Any]], total: int) -> None:
        """Training begins or goes on after ``history``."""

    def on_step(self, record: dict[str, Any]) -> None:
        """A step is done."""

    def on_checkpoint(self, history: Sequence[dict[str, Any]]) -> None:
        """All of ``history`` is safe on disk."""

    def stopped(self) -> str:
        """What a training that was stopped goes on from, as a sentence."""

    def close(self) -> None:
        """The training is over."""


class Silent:
    """Shows nothing of a training."""

    def __init__(self, title: str = "") -> None:
        self.title = title

    def on_start(self, history: Sequence[dict[str, Any]], total: int) -> None:
        """Nothing."""

    def on_step(self, record: dict[str, Any]) -> None:
        """Nothing."""

    def on_checkpoint(self, history: Sequence[dict[str, Any]]) -> None:
        """Nothing."""

    def stopped(self) -> str:
        """That the next call goes on."""
        return "Stopped; the same call goes on from the last checkpoint."

    def close(self) -> None:
        """Nothing."""


@dataclass(frozen=True)
class Display:
    """How long work is shown.

    Attributes:
        items: wraps what is gone through, given how many and a title.
        training: makes the display of one training from its title.
    """

    items: Progress = pass_through
    training: Callable[[str], TrainingDisplay] = Silent


SILENT = Display()
