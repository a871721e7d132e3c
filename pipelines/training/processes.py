"""One training in several processes: they are started, watched and ended here, where its listeners are.

The processes train and nothing else; this one hears what they report, tells them of Ctrl-C and ends all of them when
one is lost. They end with this one, however that ends.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import pickle
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from typing import Any

import numpy as np
import torch
from torch import distributed

from models.errors import ModelError, PlanesError, one_line
from pipelines.training.group import ALONE, Group, check_processes
from pipelines.training.loop import Interrupt, Listener, Outcome, Record

# A forked process could not use a GPU that this one has looked at.
START = "spawn"
# Seconds: between two looks at whether all processes live; for processes that are done to end by themselves; after an
# error of a process, to see whether another one was lost before.
LOOK, GRACE, LOST = 0.2, 20.0, 3.0
# Others wait as long as a validation takes. That a process is lost is seen here, not by the time that it takes.
WAIT = timedelta(days=30)
LOOPBACK = {"linux": "lo", "darwin": "lo0"}
LOGGERS = ("models", "pipelines", "scoring")

# Called as ``work(*arguments, device=..., listeners=..., group=...)`` in each process.
Work = Callable[..., Outcome]


def train_in_processes(
    work: Work, arguments: Sequence[Any], number: int, *, device: str, batch_size: int, listeners: Sequence[Listener]
) -> Outcome:
    """Let ``number`` processes that share each batch call ``work``; wait for process 0's outcome.

    One process is this one. Several are started, and talk through gloo on the CPU, through NCCL on GPUs, of which they
    have one each. Their outcome comes without weights. Ctrl-C is held back until all are done with their step.

    Args:
        work: a function that can be imported.
        arguments: that can be pickled.
        device: as `pick_device` says it.
        batch_size: of all processes together.

    Raises:
        RecipeError: the device or the batch has no room for so many.
        PlanesError: what one of them raised, or that one was lost.
    """
    check_processes(number, device, batch_size)
    if number == 1:
        return work(*arguments, device=device, listeners=listeners, group=ALONE)
    members: list[_Member] = []
    interrupt = Interrupt(listeners)
    with tempfile.TemporaryDirectory(prefix="planes-") as meeting:
        try:
            with _ctrl_c_blocked(), _warnings_off():
                for rank in range(number):
                    members.append(_start(_Place(rank, number, device, f"{meeting}/store"), work, arguments))
            outcome = _Watch(members, listeners, interrupt).outcome()
            deadline = time.monotonic() + GRACE
            for member in members:
                member.process.join(max(0.0, deadline - time.monotonic()))
            interrupt.check()
            return outcome
        finally:
            interrupt.restore()
            for member in members:
                member.process.kill()
                member.process.join()
                member.connection.close()


@dataclass(frozen=True)
class _Place:
    """What a process must know to find the others."""

    rank: int
    world: int
    device: str
    store: str

    @property
    def name(self) -> str:
        return f"training process {self.rank + 1} of {self.world}"


@dataclass
class _Member:
    place: _Place
    process: Any
    connection: Connection
    begun: bool = False
    open: bool = True

    @property
    def lost(self) -> bool:
        """Whether it has ended otherwise than with its work done, as far as nothing else is heard of it."""
        code = self.process.exitcode
        return code is not None and (code != 0 or self.place.rank == 0)


def _start(place: _Place, work: Work, arguments: Sequence[Any]) -> _Member:
    context: Any = multiprocessing.get_context(START)
    here, there = context.Pipe()
    threads = max(1, torch.get_num_threads() // place.world)
    # Processes that prepare batches are theirs, so that they cannot be daemons themselves.
    process = context.Process(target=_enter, args=(there, place, threads, work, tuple(arguments)), daemon=False)
    process.start()
    there.close()
    return _Member(place, process, here)


@contextmanager
def _ctrl_c_blocked() -> Iterator[None]:
    """Processes started inside begin with Ctrl-C blocked, until they ignore it; here it comes a little later."""
    # It unblocks the signal when it is started, which it would be by the first process.
    resource_tracker.ensure_running()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def _warnings_off() -> Iterator[None]:
    """Processes started inside are silent about what torch finds slow in how gradients are shared (`Group.joined`)."""
    name = "TORCH_CPP_LOG_LEVEL"
    given = name in os.environ
    os.environ.setdefault(name, "ERROR")
    try:
        yield
    finally:
        if not given:
            del os.environ[name]


@dataclass
class _Watch:
    """Hears what the processes send and sees that they live."""

    members: Sequence[_Member]
    listeners: Sequence[Listener]
    interrupt: Interrupt
    history: list[Record] = field(default_factory=list)
    told: bool = False

    def outcome(self) -> Outcome:
        """Wait for process 0's.

        Raises:
            PlanesError: of a process, or that it was lost.
            KeyboardInterrupt: they have stopped.
        """
        while True:
            self._tell()
            heard = wait([m.connection for m in self.members if m.open], LOOK)
            # A process that has ended may have said why.
            ended = [m for m in self.members if m.process.exitcode is not None]
            for member in self.members:
                while member.open and (member.connection in heard or member in ended) and self._waiting(member):
                    outcome = self._hear(member)
                    if outcome is not None:
                        return outcome
            for member in ended:
                if member.lost:
                    raise _lost(member)

    def _tell(self) -> None:
        if self.interrupt.requested and not self.told:
            self.told = True
            # One that is gone is noticed elsewhere.
            with suppress(OSError):
                self.members[0].connection.send("stop")

    def _waiting(self, member: _Member) -> bool:
        try:
            return member.connection.poll()
        except OSError:
            member.open = False
            return False

    def _hear(self, member: _Member) -> Outcome | None:
        try:
            kind, *rest = member.connection.recv()
        except (EOFError, OSError):
            member.open = False
            return None
        if kind == "begun":
            member.begun = True
        elif kind == "log":
            name, level, text = rest
            logging.getLogger(name).log(level, "%s", text)
        elif kind == "done":
            return rest[0] if member.place.rank == 0 else None
        elif kind == "stopped" and member.place.rank == 0:
            raise KeyboardInterrupt
        elif kind == "failed":
            raise self._failed(member, *rest)
        elif kind.startswith("on_"):
            self._report(kind, rest)
        return None

    def _report(self, kind: str, rest: list[Any]) -> None:
        if kind == "on_start":
            self.history = list(rest[0])
        elif kind == "on_step":
            self.history.append(rest[0])
        elif kind == "on_checkpoint":
            rest = [self.history[: rest[0]]]
        for listener in self.listeners:
            if kind != "on_pictures" or hasattr(listener, kind):
                getattr(listener, kind)(*rest)

    def _failed(self, member: _Member, error: PlanesError | None, what: str, trace: str) -> PlanesError:
        """What to raise for the error of a process: that of another one which was lost, where it comes from that."""
        if error is not None:
            return error
        deadline = time.monotonic() + LOST
        while time.monotonic() < deadline:
            for other in self.members:
                if other.lost:
                    return _lost(other)
            time.sleep(LOOK / 4)
        failed = ModelError(f"{member.place.name} failed: {what}")
        failed.__cause__ = RuntimeError(trace)
        return failed


def _lost(member: _Member) -> ModelError:
    code, name = member.process.exitcode, member.place.name
    if code < 0:
        number = -code
        memory = "; is the memory full?" if number == signal.SIGKILL else ""
        end = f"was ended by signal {number} ({signal.Signals(number).name}){memory}"
    else:
        end = f"ended with exit code {code}"
    if not member.begun and code >= 0:
        remedy = 'a script that trains must do so below: if __name__ == "__main__"'
        return ModelError(f"{name} {end} before it began; {remedy}")
    return ModelError(f"{name} {end}; the same call goes on from the last checkpoint")


def _enter(connection: Connection, place: _Place, threads: int, work: Work, arguments: tuple[Any, ...]) -> None:
    """What a process does, from its first step to its last."""
    # A terminal sends Ctrl-C to all processes; this one is told by the one that started it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    _end_with_parent(place)
    # gloo says there whom it met.
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    torch.set_num_threads(threads)
    _send_logs(connection)
    connection.send(("begun",))
    try:
        device = _meet(place)
        group = Group(place.rank, place.world, _Asked(connection))
        listeners = (_Reporter(connection),) if place.rank == 0 else ()
        outcome = work(*arguments, device=device, listeners=listeners, group=group)
        outcome.weights = {}
        connection.send(("done", outcome))
        distributed.destroy_process_group()
    except KeyboardInterrupt:
        connection.send(("stopped",))
    except Exception as error:
        what = f"{type(error).__name__}: {one_line(error, 300)}"
        # The last lines name the place; a message is short, so that none is parted by another one.
        trace = "".join(traceback.format_exception(error))[-2000:]
        connection.send(("failed", _portable(error), what, trace))
        # Others would notice that this one is gone, and report that instead.
        threading.Event().wait()


def _portable(error: Exception) -> PlanesError | None:
    """The error, where it is one of ours that another process can read."""
    if not isinstance(error, PlanesError):
        return None
    try:
        return pickle.loads(pickle.dumps(error))
    except Exception:
        return ModelError(one_line(error))


def _meet(place: _Place) -> str:
    """Join the group; this process's device."""
    device = own_device(place.device, place.rank)
    if device != "cpu":
        torch.cuda.set_device(torch.device(device))
    # All processes are on this machine, whatever its name leads to.
    if sys.platform in LOOPBACK:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", LOOPBACK[sys.platform])
    store = distributed.FileStore(place.store, place.world)
    distributed.init_process_group(backend_of(device), store=store, rank=place.rank, world_size=place.world, timeout=WAIT)
    # One that is done before another one has met it closes what they meet through.
    distributed.all_reduce(torch.zeros(1))
    return device


def own_device(device: str, rank: int) -> str:
    """The device of a process: cpu, or a GPU each in their order."""
    return "cpu" if device == "cpu" else f"cuda:{rank}"


def backend_of(device: str) -> str:
    """torch's name of the libraries that processes talk through; what is on the CPU goes through gloo in any case."""
    return "gloo" if device == "cpu" else "cpu:gloo,cuda:nccl"


def _end_with_parent(place: _Place) -> None:
    """End this process when the one that started it is gone, even by kill -9, and do what that one cannot any more."""
    parent = multiprocessing.parent_process()
    assert parent is not None, "this process was started by another one"

    def end() -> None:
        wait([parent.sentinel])
        shutil.rmtree(os.path.dirname(place.store), ignore_errors=True)
        os._exit(1)

    threading.Thread(target=end, daemon=True, name="end-with-parent").start()


@dataclass
class _Asked:
    """Whether the process that started this one has told it to stop."""

    connection: Connection
    asked: bool = False

    def __call__(self) -> bool:
        if not self.asked and self.connection.poll():
            self.asked = self.connection.recv() == "stop"
        return self.asked


class _Reporter:
    """A listener that tells the listeners of the process that started this one."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def on_start(self, history: Sequence[Record], total: int) -> None:
        """Send it."""
        self._connection.send(("on_start", list(history), total))

    def on_step(self, record: Record) -> None:
        """Send it."""
        self._connection.send(("on_step", record))

    def on_checkpoint(self, history: Sequence[Record]) -> None:
        """Send how long the history is: it was sent step by step."""
        self._connection.send(("on_checkpoint", len(history)))

    def on_pictures(self, step: int, pictures: Mapping[str, np.ndarray]) -> None:
        """Send them."""
        self._connection.send(("on_pictures", step, dict(pictures)))


class _Sender(logging.Handler):
    """Sends messages to the process that started this one."""

    def __init__(self, connection: Connection) -> None:
        super().__init__()
        self._connection = connection

    def emit(self, record: logging.LogRecord) -> None:
        """Send one."""
        with suppress(OSError):
            self._connection.send(("log", record.name, record.levelno, record.getMessage()[:1500]))


def _send_logs(connection: Connection) -> None:
    for name in LOGGERS:
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [_Sender(connection)], False
        logger.setLevel(logging.INFO)
