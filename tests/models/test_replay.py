"""Kernels that a GPU replays give what the network gives."""

from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from models.engines.unet import predictor as unet
from models.engines.unet.settings import SegmenterArchitecture
from models.instances import Instances
from models.runtime import replay
from models.runtime.out_of_memory import predict_in_halves
from models.runtime.replay import Replayed

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.passes = nn.Conv2d(3, 4, 3, padding=1), 0

    def forward(self, pixels):
        self.passes += 1
        y = self.layer(pixels).relu()
        return {"a": y, "b": [y.mean((2, 3)), -y]}


def equal(ours, theirs, tolerance=0.0):
    assert ours.keys() == theirs.keys()
    for a, b in ((ours["a"], theirs["a"]), *zip(ours["b"], theirs["b"], strict=True)):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


class Graph:
    """In place of a recording: computes into the same memory again, as a GPU would."""

    def __init__(self, network, arguments, outputs):
        self.network, self.arguments, self.outputs, self.replays = network, arguments, outputs, 0

    def replay(self):
        self.replays += 1
        for old, new in zip(self.outputs, replay.tree_flatten(self.network(*self.arguments))[0], strict=True):
            old.copy_(new)


@pytest.fixture
def faked(monkeypatch):
    """Lets a CPU record; returns the graphs that were recorded."""
    graphs = []

    def recorded(network, inputs, form, half):
        held = [given.clone() for given in inputs]
        arguments = replay.tree_unflatten(held, form)
        outputs, form_out = replay.tree_flatten(network(*arguments))
        graphs.append(Graph(network, arguments, outputs))
        return replay._Recording(graphs[-1], held, outputs, form_out)

    monkeypatch.setattr(Replayed, "_gains", lambda self, inputs: inputs[0].shape[0] <= 4)
    monkeypatch.setattr(replay, "_recorded", recorded)
    monkeypatch.setattr(replay, "_much_is_free", lambda device: True)
    return graphs


@torch.inference_mode()
def test_a_shape_is_recorded_when_it_came_often_enough(faked):
    network = Network()
    replayed = Replayed(network)
    for number in range(6):
        pixels = torch.rand(2, 3, 8, 8)
        equal(replayed(pixels), network(pixels))
        assert len(faked) == (number >= 2)
    assert faked[0].replays == 4


@torch.inference_mode()
def test_results_are_not_overwritten_by_the_next_call(faked):
    network = Network()
    replayed = Replayed(network)
    images = torch.rand(9, 1, 3, 8, 8)
    results = [replayed(pixels) for pixels in images]
    for pixels, result in zip(images, results, strict=True):
        equal(result, network(pixels))
    assert len(faked) == 1


@torch.inference_mode()
def test_each_shape_layout_and_precision_has_its_own_recording(faked, monkeypatch):
    replayed = Replayed(Network())
    pixels = torch.rand(2, 3, 8, 8)
    for _ in range(4):
        for given in (pixels, pixels[:1], pixels.contiguous(memory_format=torch.channels_last)):
            replayed(given)
        for half in (torch.bfloat16, torch.float16):
            with monkeypatch.context() as inside:
                inside.setattr(torch, "is_autocast_enabled", lambda device: device == "cuda")
                inside.setattr(torch, "get_autocast_dtype", lambda device, half=half: half)
                replayed(pixels)
    assert len(faked) == 5


@torch.inference_mode()
def test_what_is_too_large_runs_as_it_is(faked):
    network = Network()
    for _ in range(5):
        Replayed(network)(torch.rand(5, 3, 8, 8))
    assert not faked


@torch.inference_mode()
def test_recordings_are_bounded(faked):
    replayed = Replayed(Network())
    for side in range(4, 4 + 2 * replay.MOST_RECORDED):
        for _ in range(replay.SIGHTINGS):
            replayed(torch.rand(1, 3, side, 4))
    assert len(faked) == replay.MOST_RECORDED
    assert len(replayed._recordings) == replay.HELD


@torch.inference_mode()
def test_what_cannot_be_recorded_runs_as_it_is(faked, monkeypatch):
    tries = []

    def fails(*_):
        tries.append(1)
        raise RuntimeError("CUDA error: operation not permitted when stream is capturing")

    monkeypatch.setattr(replay, "_recorded", fails)
    network = Network()
    replayed = Replayed(network)
    for _ in range(6):
        pixels = torch.rand(1, 3, 8, 8)
        equal(replayed(pixels), network(pixels))
    assert len(tries) == 1


@torch.inference_mode()
def test_nothing_is_recorded_where_little_memory_is_left(faked, monkeypatch):
    monkeypatch.setattr(replay, "_much_is_free", lambda device: False)
    replayed = Replayed(Network())
    for _ in range(5):
        replayed(torch.rand(1, 3, 8, 8))
    assert not faked


@pytest.mark.parametrize(("free", "much"), [(8, True), (7, False)])
def test_half_of_the_memory_must_be_free(free, much, monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 16))
    assert replay._much_is_free(torch.device("cuda")) == much


@torch.inference_mode()
def test_recordings_give_way_to_a_batch_that_does_not_fit(faked):
    network = Network()
    replayed = Replayed(network)
    for _ in range(4):
        replayed(torch.rand(1, 3, 8, 8))
    assert len(replayed._recordings) == 1
    batches = []

    class Predictor:
        def predict(self, images):
            batches.append(len(images))
            if replayed._recordings:
                raise torch.OutOfMemoryError
            return [Instances.empty(str(i), 8, 8) for i in range(len(images))]

    assert len(predict_in_halves(Predictor(), [np.zeros((8, 8, 3), np.uint8)] * 4)) == 4
    assert batches == [4, 4]
    # What did not fit beside recordings would not fit beside new ones.
    for _ in range(5):
        replayed(torch.rand(1, 3, 8, 8))
    assert not replayed._recordings


@pytest.mark.parametrize(
    ("cuda", "shape", "inference", "capturing", "gains"),
    [
        (True, (1, 3, 640, 640), True, False, True),
        (True, (16, 3, 640, 640), True, False, False),
        (False, (1, 3, 640, 640), True, False, False),
        (True, (1, 3, 640, 640), False, False, False),
        (True, (1, 3, 640, 640), True, True, False),
    ],
)
def test_what_is_replayed(cuda, shape, inference, capturing, gains, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    with torch.inference_mode(inference):
        assert Replayed(Network())._gains([SimpleNamespace(is_cuda=cuda, shape=shape)]) == gains


def test_a_cpu_records_nothing():
    with torch.inference_mode():
        replayed = Replayed(Network())
        assert not replayed._gains([torch.rand(1, 3, 8, 8)])


def mixed_in_threads(device, side, rounds):
    """How often one of four threads is given what is not its image's; each has images of its own."""
    network = Network().to(device)
    replayed = Replayed(network)

    @torch.inference_mode()
    def work(seed):
        generator = torch.Generator().manual_seed(seed)
        images = (torch.rand(1, 3, side, side, generator=generator).to(device) for _ in range(rounds))
        return sum(not torch.allclose(replayed(p)["a"], network.layer(p).relu(), atol=1e-2) for p in images)

    with ThreadPoolExecutor(4) as pool:
        mixed = sum(pool.map(work, range(4)))
    assert len(replayed._recordings) == 1
    return mixed


def test_threads_do_not_mix_their_results(faked):
    assert not mixed_in_threads("cpu", 8, 50)


@pytest.mark.parametrize(("number", "size"), [(1, 1), (3, 4), (9, 16), (17, 32), (100, 112), (128, 128)])
def test_a_batch_of_crops_is_filled_up(number, size):
    crops = np.random.default_rng(0).random((number, 4, 4, 3)).astype(np.float32).transpose(0, 3, 1, 2)
    filled = unet.filled_up(crops)
    assert filled.shape == (size, 3, 4, 4)
    assert filled.strides[1:] == crops.strides[1:]
    assert (filled[:number] == crops).all()
    assert not filled[number:].any()


@pytest.mark.parametrize("number", [1, 5, 130])
def test_crops_are_segmented_the_same_whatever_the_batch_is_filled_up_to(number, faked, monkeypatch):
    torch.manual_seed(0)
    architecture = SegmenterArchitecture(network="unet", encoder="mobilenet_v2", crop_size=32, flips=True)
    network = unet.build_segmenter(architecture)
    crops = list(np.random.default_rng(0).integers(0, 256, (number, 40, 30, 3)).astype(np.uint8))
    plain = unet.TorchSegmenter(network, architecture, "cpu")
    filled = unet.TorchSegmenter(network, architecture, "cpu")
    monkeypatch.setattr(unet, "to_device", lambda tensor, _: tensor)
    filled.device, filled.batch = "cuda", unet.GPU_BATCH
    filled._probabilities = Replayed(filled._probabilities)
    for _ in range(4):
        for a, b in zip(plain.segment(crops), filled.segment(crops), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-5)


@needs_gpu
@pytest.mark.parametrize("kind", [None, torch.bfloat16, torch.float16])
def test_a_gpu_replays_what_the_network_gives(kind):
    network = Network().cuda().to(memory_format=torch.channels_last)
    replayed = Replayed(network)
    with torch.inference_mode(), torch.autocast("cuda", kind, enabled=kind is not None):
        for _ in range(6):
            pixels = torch.rand(2, 3, 64, 64, device="cuda")
            equal(replayed(pixels), network(pixels), tolerance=1e-3 if kind is None else 2e-2)
    assert len(replayed._recordings) == 1
    # Of six calls two ran the network, one recorded it; each was compared with a pass.
    assert network.passes == 2 + replay.WARM_UP + 1 + 6


@needs_gpu
def test_threads_on_a_gpu_do_not_mix_their_results():
    assert not mixed_in_threads("cuda", 64, 200)
