"""The edge between our errors and the command line, and the progress shown there."""

from __future__ import annotations

import functools
import logging
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, TypeVar

import click

from models.errors import PlanesError, one_line
from pipelines.start_up import prepare_command
from pipelines.steps.reporting import INTERRUPTED, end, is_quiet
from pipelines.use_cases.display import Display

T = TypeVar("T")


def friendly(command: Callable[..., T]) -> Callable[..., T]:
    """Turn our errors, and MLflow's, into one line on stderr with exit code 1; Ctrl-C into exit code 130.

    With PLANES_TRACEBACK=1 they are raised as they are. What our libraries log is printed.
    """

    @functools.wraps(command)
    def wrapped(*arguments: Any, **options: Any) -> T:
        prepare_command()
        with printed_logs():
            return run(*arguments, **options)

    def run(*arguments: Any, **options: Any) -> T:
        if os.environ.get("PLANES_TRACEBACK"):
            return command(*arguments, **options)
        try:
            return command(*arguments, **options)
        except PlanesError as error:
            raise click.ClickException(one_line(error)) from error
        except Exception as error:
            # MLflow is not imported here: a mistake in a file name should be reported at once.
            if type(error).__module__.partition(".")[0] != "mlflow":
                raise
            raise click.ClickException(f"MLflow: {one_line(error, 400)}") from error
        except KeyboardInterrupt:
            click.echo("Interrupted.", err=True)
            end(INTERRUPTED, "interrupted")

    return wrapped


class _Print(logging.Handler):
    """Prints messages as they are: warnings on stderr, others on stdout."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print one."""
        click.echo(record.getMessage(), err=record.levelno >= logging.WARNING)


@contextmanager
def printed_logs() -> Iterator[None]:
    """Print what models, pipelines and scoring log from level INFO on, of a quiet command errors alone."""
    handler = _Print()
    loggers = [logging.getLogger(name) for name in ("models", "pipelines", "scoring")]
    levels = [logger.level for logger in loggers]
    nested = any(isinstance(h, _Print) for h in loggers[0].handlers)
    for logger in () if nested else loggers:
        logger.addHandler(handler)
        logger.setLevel(logging.ERROR if is_quiet() else logging.INFO)
    try:
        yield
    finally:
        for logger, level in () if nested else zip(loggers, levels, strict=True):
            logger.removeHandler(handler)
            logger.setLevel(level)


class ProgressListener:
    """Shows training: a bar on a terminal, else a line every ``seconds``."""

    def __init__(self, title: str, seconds: float = 20.0) -> None:
        self.title, self.seconds = title, seconds
        self._bar: Any = None
        self._task: Any = None
        self._total, self._begin, self._reported = 0, 0, 0.0
        self._done = self._safe = 0
        self._started = time.monotonic()

    def on_start(self, history: Sequence[dict[str, Any]], total: int) -> None:
        """Open the bar; say so when training goes on from a checkpoint."""
        self._total, self._begin = total, len(history)
        self._done = self._safe = len(history)
        self._started = self._reported = time.monotonic()
        if history and len(history) < total:
            click.echo(f"{self.title}: going on from step {len(history)} of {total}")
        self._bar = terminal_bar()
        if self._bar:
            self._bar.start()
            self._task = self._bar.add_task(self.title, total=total, completed=self._begin)

    def on_step(self, record: dict[str, Any]) -> None:
        """Advance; a validation is always printed."""
        now, step = time.monotonic(), record["step"]
        self._done = step
        validation = " ".join(f"{k} {v:.3f}" for k, v in record.items() if k in ("val/AP", "val/AP50", "val/IoU"))
        if self._bar:
            self._bar.update(self._task, completed=step, description=f"{self.title}  loss {record['train/loss']:.3f}")
            if validation:
                self._bar.console.print(f"{self.title}: step {step} {validation}")
        elif validation or now - self._reported > self.seconds:
            self._reported = now
            left = (now - self._started) / max(1, step - self._begin) * (self._total - step)
            text = f"{self.title}: step {step}/{self._total} loss {record['train/loss']:.3f}"
            click.echo(f"{text} {validation or f'about {left:.0f} s left'}")
        if step == self._total:
            self.close()

    def on_checkpoint(self, history: Sequence[dict[str, Any]]) -> None:
        """Nothing to show, but to know when it stops."""
        self._safe = len(history)

    def on_interrupt(self) -> None:
        """Say that Ctrl-C was heard, and what a second one would cost."""
        lost = self._done - self._safe
        cost = f"and loses {lost} {'step' if lost == 1 else 'steps'} and the one it is in"
        text = f"\n{self.title}: stops when this step is done and saved; Ctrl-C again stops at once {cost}\n"
        # A signal's handler: the streams may be in the middle of a write.
        os.write(2, text.encode())

    def stopped(self) -> str:
        """What a training that was stopped goes on from."""
        if not self._total:
            # Before the first step, or in processes of their own.
            return "Stopped; the same command goes on from the last checkpoint."
        lost = self._done - self._safe
        unsaved = f"; {lost} {'step' if lost == 1 else 'steps'} after it not saved" if lost else ""
        begin = f"goes on from step {self._safe}" if self._safe else "begins anew"
        return f"Stopped; the same command {begin}{unsaved}."

    def close(self) -> None:
        """Take the bar down."""
        if self._bar:
            self._bar.stop()
            self._bar = None


def terminal_bar(*fields: str) -> Any:
    """A rich progress bar on stderr, or None where stderr is no terminal or wants none; ``fields`` are shown beside it."""
    if is_quiet():
        return None
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    console = Console(stderr=True)
    if not console.is_terminal:
        return None
    columns = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()]
    more = [TextColumn(f"{{task.fields[{name}]}}") for name in fields]
    return Progress(*columns, TimeRemainingColumn(), *more, console=console)


def show_progress(
    items: Iterable[T], total: int, title: str, *, seconds: float = 60.0, failed: Callable[[T], bool] | None = None
) -> Iterator[T]:
    """Pass items through, showing how many are done, how many a second, the time left, and how many ``failed``.

    On a terminal a bar, else a line every ``seconds``.
    """
    bar = terminal_bar("speed", "errors")
    started = reported = time.monotonic()
    errors = 0
    with bar or nullcontext():
        task = bar.add_task(title, total=total, speed="", errors="") if bar else None
        for done, item in enumerate(items, start=1):
            yield item
            errors += failed is not None and failed(item)
            now = time.monotonic()
            speed = done / max(now - started, 1e-9)
            if bar:
                # The time left is rich's; the bar redraws itself ten times a second.
                counted = f"{errors} errors" if errors else ""
                bar.update(task, completed=done, speed=f"{speed:.3g}/s", errors=counted)
            elif now - reported > seconds or done == total:
                reported = now
                left = f", about {_duration((total - done) / speed)} left" if done < total else ""
                click.echo(f"{title}: {done}/{total}, {speed:.3g}/s{left}" + (f", {errors} errors" if errors else ""))


def _duration(seconds: float) -> str:
    """Time for people.

    >>> _duration(42), _duration(600), _duration(9000)
    ('42 s', '10 min', '2.5 h')
    """
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


@contextmanager
def stage(title: str) -> Iterator[None]:
    """Say what begins and how long it took."""
    started = time.monotonic()
    click.echo(f"== {title}")
    yield
    click.echo(f"   done in {time.monotonic() - started:.0f} s")


# Bars on a terminal, lines elsewhere.
TERMINAL = Display(show_progress, ProgressListener)
