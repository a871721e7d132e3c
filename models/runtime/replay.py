"""Kernels of a GPU recorded once and replayed: where launching them takes longer than what they do.

Source: CUDA graphs as PyTorch has them (torch.cuda.CUDAGraph). Measured on an H200: a ResNet-18 U-Net on one crop of
128 pixels 2.06 ms, replayed 0.64 ms; the dense layers of the recipe detector_scratch on one tile of 640 pixels 1.18
and 0.52 ms; 16 crops 2.07 and 1.21 ms; 16 tiles or 128 crops gain nothing.
"""

from __future__ import annotations

import logging
import threading
import weakref
from dataclasses import dataclass
from typing import Any

import torch
from cachetools import LRUCache
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

log = logging.getLogger(__name__)

# Height times width times batch of the first input, from which on kernels take longer than their launch.
MOST_PIXELS = 1_200_000
# A shape is recorded when it comes for the third time: recording takes several passes itself.
SIGHTINGS = 3
# Recorded shapes that are held, each with the memory of its intermediate results, and that are recorded at all.
HELD, MOST_RECORDED = 8, 24
# Passes before a recording, in which libraries choose their kernels.
WARM_UP = 3


# Those of this process.
_all: weakref.WeakSet[Replayed] = weakref.WeakSet()


def forget_recordings() -> bool:
    """Give the memory of all recordings back, and record no more; whether there was any."""
    forgotten = [replayed.forget() for replayed in list(_all)]
    if any(forgotten) and torch.cuda.is_available():
        torch.cuda.empty_cache()
    return any(forgotten)


@dataclass(frozen=True)
class _Recording:
    graph: Any
    inputs: list[Tensor]
    outputs: list[Tensor]
    form: Any


class Replayed(nn.Module):
    """A network for prediction on a GPU; same results as the network itself, which runs wherever nothing is gained.

    Takes and returns tensors, lists and dictionaries of them. May be called by several threads.
    """

    def __init__(self, network: nn.Module, most_pixels: int = MOST_PIXELS) -> None:
        super().__init__()
        self.network, self.most_pixels = network, most_pixels
        self._recordings: LRUCache[Any, _Recording] = LRUCache(HELD)
        self._sightings: LRUCache[Any, int] = LRUCache(256)
        self._recorded = 0
        self._lock = threading.Lock()
        _all.add(self)

    def forget(self) -> bool:
        """Drop the recordings, and make no more; whether there was one."""
        with self._lock:
            had = bool(self._recordings)
            self._recordings.clear()
            self._recorded = MOST_RECORDED
        return had

    def forward(self, *arguments: Any) -> Any:
        """What the network returns, in memory of its own."""
        inputs, form = tree_flatten(arguments)
        if not self._gains(inputs):
            return self.network(*arguments)
        half = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
        key = (*((tuple(i.shape), i.stride(), i.dtype, i.device) for i in inputs), *half)
        # The next call overwrites inputs and outputs of the recording. What is put on the stream under the lock is done
        # in that order.
        with self._lock:
            recording = self._recordings.get(key) or self._record(key, inputs, form, half)
            if recording is None:
                return self.network(*arguments)
            for held, given in zip(recording.inputs, inputs, strict=True):
                held.copy_(given)
            recording.graph.replay()
            return tree_unflatten([output.clone() for output in recording.outputs], recording.form)

    def _gains(self, inputs: list[Any]) -> bool:
        first = inputs[0]
        small = first.is_cuda and first.shape[0] * first.shape[-2] * first.shape[-1] <= self.most_pixels
        return small and torch.is_inference_mode_enabled() and not torch.cuda.is_current_stream_capturing()

    def _record(self, key: Any, inputs: list[Tensor], form: Any, half: tuple[bool, torch.dtype]) -> _Recording | None:
        """Record a shape that came often enough; None if it did not or cannot be."""
        seen = self._sightings[key] = self._sightings.get(key, 0) + 1
        if seen < SIGHTINGS or self._recorded >= MOST_RECORDED or not _much_is_free(inputs[0].device):
            return None
        self._recorded += 1
        try:
            recording = _recorded(self.network, inputs, form, half)
        except RuntimeError as error:
            # Out of memory too: the network may still fit without.
            log.debug(f"not recorded: {error}")
            self._recorded = MOST_RECORDED
            return None
        self._recordings[key] = recording
        return recording


def _much_is_free(device: torch.device) -> bool:
    """Whether half of a GPU's memory is: what recordings take, larger batches cannot have."""
    free, total = torch.cuda.mem_get_info(device)
    return free >= total / 2


def _recorded(network: nn.Module, inputs: list[Tensor], form: Any, half: tuple[bool, torch.dtype]) -> _Recording:
    device = inputs[0].device
    held = [given.clone() for given in inputs]
    arguments = tree_unflatten(held, form)
    # Weights that autocast keeps converted would be gone at the replay.
    with torch.cuda.device(device), torch.autocast("cuda", half[1], enabled=half[0], cache_enabled=False):
        beside = torch.cuda.Stream(device)
        beside.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(beside):
            for _ in range(WARM_UP):
                network(*arguments)
        torch.cuda.current_stream(device).wait_stream(beside)
        graph = torch.cuda.CUDAGraph()
        # Other threads may use the GPU meanwhile.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            outputs, form_out = tree_flatten(network(*arguments))
    return _Recording(graph, held, outputs, form_out)
