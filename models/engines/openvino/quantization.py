"""A twin in eight bits: post-training quantisation of the dense layers of one in full precision."""

from __future__ import annotations

import contextlib
import logging
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from models.engines.openvino.predictor import TwinDetector, TwinSegmenter
from models.engines.openvino.settings import TwinArchitecture
from models.errors import EngineMissing, ModelError
from models.predictor import Predictor
from models.saved.allowed_files import NETWORK_FILE
from models.saved.folder import write_folder
from models.saved.spec import parse_architecture, read_spec
from models.tiling.predictor import network_of

GET_IT = "NNCF, which quantises networks, is not installed: pip install nncf (the extra 'openvino')"
# Inputs of the network that ranges are taken from; at 800 x 1333 pixels each has 13 MB.
MOST_INPUTS = 64
INPUTS_OF_AN_IMAGE = 8

PROCESS = "models.engines.openvino.quantize_process"
TRIES = 4

log = logging.getLogger(__name__)

# An RGB uint8 image (H, W, 3) and its planes' boxes, xyxy (N, 4).
Example = tuple[np.ndarray, np.ndarray]


def quantise_twin(twin: str | Path, into: str | Path, predictor: Predictor, examples: Iterable[Example]) -> Path:
    """Write a twin whose dense layers compute in int8, whole or not at all; all else stays in float32.

    Weights by channel, activations by the ranges that they take on the examples (NNCF, mixed preset, with bias
    correction).

    Args:
        twin: saved folder of the twin in full precision.
        into: where the new twin's saved folder is written.
        predictor: that twin, loaded; it predicts the examples, by tiles where the version does.
        examples: images like those that will be scored, never those that the twin is measured on.

    Raises:
        EngineMissing: NNCF is not installed.
        ModelError: no example has anything to compute on, or the network cannot be quantised.
    """
    require_nncf()
    spec = read_spec(twin)
    architecture = parse_architecture(spec, TwinArchitecture).model_copy(update={"precision": "int8"})
    what = f"{spec.kind}/{architecture.parent_engine}"
    inputs = recorded_inputs(predictor, examples)
    if not inputs:
        raise ModelError(f"{what}: nothing to calibrate on: the data have no image, or no plane to segment")

    def fill(folder: Path) -> None:
        with tempfile.TemporaryDirectory() as work:
            for number, arrays in enumerate(inputs):
                np.savez(Path(work) / f"{number:04}.npz", *arrays)
            _quantise(what, Path(twin) / NETWORK_FILE, Path(work), folder / NETWORK_FILE)

    return write_folder(into, spec.model_copy(update={"architecture": architecture.model_dump()}), fill)


def _quantise(what: str, network: Path, inputs: Path, into: Path) -> None:
    """Run `quantize_process`, again where it crashes."""
    package = Path(__file__).parents[3]
    path = os.pathsep.join(filter(None, [str(package), os.environ.get("PYTHONPATH")]))
    # -P: a package of the same name in the working folder is not ours.
    program = [sys.executable, "-P", "-m", PROCESS, what.partition("/")[0], str(network), str(inputs), str(into)]
    for attempt in range(1, TRIES + 1):
        done = subprocess.run(program, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, check=False)
        if done.returncode == 0:
            return
        if done.returncode > 0:
            lines = done.stderr.strip().splitlines() or ["no reason was given"]
            raise ModelError(f"{what}: NNCF cannot quantise it ({lines[-1][:300]})")
        log.warning(f"NNCF's process ended by signal {-done.returncode}, attempt {attempt} of {TRIES}")
    raise ModelError(f"{what}: NNCF cannot quantise it (its process crashed {TRIES} times)")


def require_nncf() -> None:
    """Check that the package is there, without importing it.

    Raises:
        EngineMissing: it is not installed.
    """
    if find_spec("nncf") is None:
        raise EngineMissing(GET_IT)


def recorded_inputs(predictor: Predictor, examples: Iterable[Example]) -> list[list[np.ndarray]]:
    """What a twin's network is given when it predicts examples: `MOST_INPUTS` at most, spread over them.

    No more than these are held at a time, however large the examples are.
    """
    inner: Any = network_of(predictor)
    by_example: list[list[list[np.ndarray]]] = []
    for image, boxes in examples:
        with _recording(inner) as recorder:
            if isinstance(inner, TwinSegmenter):
                inner.crop_masks([image], [boxes])
            else:
                predictor.predict([image])
        if recorder.inputs:
            by_example.append(recorder.inputs)
        while sum(map(len, by_example)) > MOST_INPUTS:
            # Of several that have the most the latest, so that each keeps its first.
            max(reversed(by_example), key=len).pop()
    return [one for inputs in by_example for one in inputs]


class _Recorder:
    """A network that keeps a random sample of what it is given (reservoir sampling, Vitter 1985)."""

    def __init__(self, network: Any) -> None:
        self.network = network
        self.inputs: list[list[np.ndarray]] = []
        self._calls, self._random = 0, random.Random(0)

    def __call__(self, *inputs: np.ndarray, **how: bool) -> list[np.ndarray]:
        self._calls += 1
        place = len(self.inputs) if self._calls <= INPUTS_OF_AN_IMAGE else self._random.randrange(self._calls)
        if place < INPUTS_OF_AN_IMAGE:
            self.inputs[place : place + 1] = [[np.array(i) for i in inputs]]
        return list(self.network(*inputs, **how))


@contextlib.contextmanager
def _recording(inner: TwinDetector | TwinSegmenter) -> Iterator[_Recorder]:
    network, concurrent = inner.network, inner.concurrent
    recorder = _Recorder(network)
    # Of calls at a time nobody knows the order, and the sample would be another each time.
    inner.network, inner.concurrent = recorder, 1  # type: ignore[assignment]
    try:
        yield recorder
    finally:
        inner.network, inner.concurrent = network, concurrent
