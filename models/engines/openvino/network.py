"""A saved OpenVINO network, compiled for this CPU."""

from __future__ import annotations

import contextlib
import hashlib
import platform
import threading
from collections.abc import Sequence
from functools import cache
from importlib.metadata import version
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import numpy as np
from filelock import FileLock

from models.engines.openvino.compiled import LOCK, note_digests, open_cache
from models.engines.openvino.telemetry import opt_out
from models.errors import EngineMissing, ModelError, one_line
from models.runtime.devices import TwinPrecision
from models.runtime.instructions import cpu_flags, cpu_threads
from models.saved.allowed_files import NETWORK_FILE, NETWORK_WEIGHTS_FILE

GET_IT = "OpenVINO is not installed: pip install openvino (the extra 'openvino'), or score with --runtime torch"
# Instructions without which a precision is emulated, slower than full precision.
NEEDS: dict[str, tuple[str, ...]] = {
    "f32": (),
    "bf16": ("amx_bf16", "avx512_bf16"),
    "int8": ("amx_int8", "avx512_vnni", "avx_vnni"),
}


def require_openvino() -> Any:
    """The package, imported.

    Raises:
        EngineMissing: it is not installed.
    """
    opt_out()
    try:
        import openvino
    except ImportError as error:
        raise EngineMissing(GET_IT) from error
    return openvino


def supports(precision: TwinPrecision) -> bool:
    """Whether this CPU computes in a precision by itself."""
    return not NEEDS[precision] or any(flag in cpu_flags() for flag in NEEDS[precision])


@cache
def _core() -> Any:
    return require_openvino().Core()


_MAKING = threading.Lock()


def shared_core() -> Any:
    """OpenVINO's core, one for the whole process, whatever threads ask for it.

    Each gives the thread that it is made in an alternate stack for signals, for the size of AMX's registers. Of two
    whose lives overlap, the second to go puts back the stack of the first, which is unmapped: the next signal, be it
    of a child that ended, ends the process without a word (seen with 2026.4).
    """
    with _MAKING:
        return _core()


# Calls that a network of one shape works on at a time; each takes the memory of one more.
MOST_STREAMS = 4


class Network:
    """A network on this CPU: arrays in, arrays out. Several threads may call it.

    The compiled form is kept on disk, by the digest of the network's files, the CPU and OpenVINO's version.
    """

    def __init__(
        self,
        folder: Path,
        precision: TwinPrecision,
        inputs: Sequence[tuple[str, int]],
        outputs: Sequence[int],
        *,
        fixed: tuple[int, ...] | None = None,
    ) -> None:
        """Read and compile.

        Args:
            folder: holds network.xml and network.bin.
            precision: what the network computes in.
            inputs: element type and rank that each input must have.
            outputs: ranks of the outputs.
            fixed: shape of the first input that most calls will have. It is compiled for that shape alone: what
                depends on shapes, such as anchors, is computed once. Other shapes take a network compiled for any.
                Of this shape as many calls as `streams` says can share the threads: one thread with a call of its
                own does more than two threads with one call.

        Raises:
            EngineMissing: OpenVINO is not installed.
            ModelError: files that are no such network; a precision that this CPU only emulates.
        """
        if not supports(precision):
            needed = " or ".join(NEEDS[precision])
            raise ModelError(f"{folder}: computes in {precision}, which needs a CPU with {needed}; use --runtime torch")
        openvino = require_openvino()
        files = [folder / NETWORK_FILE, folder / NETWORK_WEIGHTS_FILE]
        for path in files:
            if not path.is_file():
                raise ModelError(f"{folder}: not a saved twin (no {path.name})")
        try:
            model = shared_core().read_model(*map(str, files))
            given = [(i.get_element_type().get_type_name(), len(i.get_partial_shape())) for i in model.inputs]
            ranks = [len(o.get_partial_shape()) for o in model.outputs]
        except RuntimeError as error:
            raise ModelError(f"{files[0]}: damaged network ({one_line(error, 160)})") from error
        if given != list(inputs) or ranks != list(outputs):
            raise ModelError(f"{files[0]}: takes {given} and gives arrays of ranks {ranks}; no network of this kind does")
        self._files, self._fixed, self._model = files, fixed, model
        self.streams = min(cpu_threads(), MOST_STREAMS) if fixed else 1
        self._settings = {
            # On its own OpenVINO takes bfloat16 wherever the CPU has it.
            "INFERENCE_PRECISION_HINT": "bf16" if precision == "bf16" else "f32",
            "INFERENCE_NUM_THREADS": cpu_threads(),
            # Two jobs on one machine would be pinned to the same cores.
            "ENABLE_CPU_PINNING": False,
        }
        self._cache = open_cache(_key(files, openvino))
        self._compiling = threading.Lock()
        self._requests: dict[tuple[tuple[int, ...] | None, int], SimpleQueue[Any]] = {}
        self._idle(fixed, self.streams)

    def _idle(self, shape: tuple[int, ...] | None, streams: int = 1) -> SimpleQueue[Any]:
        """Requests that nobody uses, of the network compiled for one shape, or for any, and for calls at a time."""
        with self._compiling:
            if (shape, streams) not in self._requests:
                model = self._model
                try:
                    if shape is not None:
                        model = model.clone()
                        model.reshape({0: list(shape)})
                    compiled = self._compile(model, streams)
                    requests: SimpleQueue[Any] = SimpleQueue()
                    for _ in range(streams):
                        requests.put(compiled.create_infer_request())
                except RuntimeError as error:
                    raise ModelError(f"{self._files[0]}: OpenVINO cannot compile it ({one_line(error, 160)})") from error
                self._requests[shape, streams] = requests
            return self._requests[shape, streams]

    def _compile(self, model: Any, streams: int) -> Any:
        settings = {**self._settings, "NUM_STREAMS": streams}
        if self._cache is not None:
            # A full disk costs the compiled form, not the job.
            # One process at a time: OpenVINO writes into the file itself, which another one may have mapped by then.
            with contextlib.suppress(RuntimeError, OSError), FileLock(self._cache / LOCK):
                compiled = shared_core().compile_model(model, "CPU", {**settings, "CACHE_DIR": str(self._cache)})
                note_digests(self._cache)
                return compiled
        return shared_core().compile_model(model, "CPU", settings)

    def __call__(self, *inputs: np.ndarray, at_a_time: bool = False) -> list[np.ndarray]:
        """The outputs, in the order of the network.

        Args:
            at_a_time: as many threads call as there are `streams`, so that each call takes its share of the CPU; a
                call by itself takes all of it.

        Raises:
            ModelError: OpenVINO cannot run it on these, or a number that is not finite comes out.
        """
        # By the shape alone, so that a call gives the same however many came before it.
        fixed = self._fixed is not None and inputs[0].shape == self._fixed
        idle = self._idle(self._fixed, self.streams if at_a_time else 1) if fixed else self._idle(None)
        request = idle.get()
        try:
            results = request.infer(list(inputs), share_inputs=True)
            arrays = [np.array(results[i]) for i in range(len(results))]
        except RuntimeError as error:
            raise ModelError(f"OpenVINO: {one_line(error, 200)}") from error
        finally:
            idle.put(request)
        if not all(np.isfinite(a).all() for a in arrays):
            raise ModelError("the twin's output holds numbers that are not finite; use --runtime torch")
        return arrays


def _key(files: Sequence[Path], openvino: Any) -> str:
    digest = hashlib.sha256()
    for path in files:
        with open(path, "rb") as handle:
            digest.update(hashlib.file_digest(handle, "sha256").digest())
    where = [platform.machine(), version("openvino"), *sorted(cpu_flags())]
    return f"{digest.hexdigest()[:16]}-{hashlib.sha256(' '.join(where).encode()).hexdigest()[:16]}"
