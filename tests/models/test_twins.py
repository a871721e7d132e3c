"""Networks converted to OpenVINO: the predictions of what they were converted from; what is broken is refused."""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cache
from itertools import pairwise
from queue import SimpleQueue
from types import SimpleNamespace
from xml.etree import ElementTree

import numpy as np
import pytest
from filelock import FileLock

pytest.importorskip("openvino", reason="OpenVINO is not installed")

from models.engines.openvino import network
from models.engines.openvino.compiled import LOCK, compiled_folder
from models.engines.openvino.inputs import prepared
from models.engines.openvino.predictor import load_twin
from models.engines.openvino.settings import ImageInput
from models.errors import EngineMissing, ModelError
from models.geometry.rle import rle_iou
from models.loading import load_model
from models.runtime.instructions import cpu_threads
from models.saved.spec import read_spec
from models.tiling.predictor import by_tiles
from models.tiling.settings import Tiling
from models.twins import check_twin, is_twin, make_twin
from tests.models.test_contract import MAKERS

# What its fixtures convert is converted once.
pytestmark = pytest.mark.xdist_group("twins")

# Types of the layers with the work.
DENSE = ("Convolution", "MatMul")


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("PLANES_CACHE", str(tmp_path_factory.getbasetemp() / "planes-cache"))


def _images():
    rng = np.random.default_rng(3)
    sizes = [(96, 128), (128, 96), (97, 61), (40, 300)]
    return [rng.integers(0, 256, (*size, 3), dtype=np.uint8) for size in sizes] + [np.zeros((64, 64, 3), np.uint8)]


def _partners(a, b):
    """For each detection the other's nearest one, each taken once: scores of random networks are next to equal."""
    distances = np.abs(a.boxes[:, None] - b.boxes[None]).max(axis=2)
    order = distances.argmin(axis=1) if len(a) else np.zeros(0, np.int64)
    assert len(set(order.tolist())) == len(order)
    return order


# They hold what the others have: both kinds of pasting, of resizing and of heads, and crops.
SUITE = ("composed", "mask rcnn resized", "detectron2 mask rcnn", "detector zoomed", "unet flips")


@pytest.mark.parametrize("maker", [m if m in SUITE else pytest.param(m, marks=pytest.mark.soak) for m in MAKERS])
def test_a_twin_in_full_precision_predicts_what_its_parent_does(maker, tmp_path):
    parent = MAKERS[maker](tmp_path / "parent")
    twin = make_twin(parent, tmp_path / "twin", "f32")
    assert is_twin(twin)
    assert not is_twin(parent)
    check_twin(parent, twin)
    ours, its = load_model(parent), load_model(twin)
    planes = 0
    for image in _images():
        (a,), (b,) = ours.predict([image]), its.predict([image])
        planes += len(a)
        assert len(a) == len(b)
        assert (a.masks is None) == (b.masks is None)
        order = _partners(a, b)
        np.testing.assert_allclose(a.boxes, b.boxes[order], atol=0.01)
        np.testing.assert_allclose(a.scores, b.scores[order], atol=1e-4)
        assert (a.labels == b.labels[order]).all()
        if a.masks is not None and len(a):
            pairs = [(m, b.masks[i]) for m, i in zip(a.masks, order, strict=True)]
            # Of two empty masks the IoU is 0.
            assert np.mean([1.0 if m == other else rle_iou([m], [other])[0, 0] for m, other in pairs]) > 0.995
    assert planes


@pytest.mark.parametrize("size", [(40, 40), (8, 70), (66, 33)])
def test_of_a_small_first_image_a_twin_predicts_what_its_parent_does(pair, size):
    image = np.random.default_rng(1).integers(0, 256, (*size, 3), dtype=np.uint8)
    ours, its = (load_model(folder).predict([image])[0] for folder in pair)
    assert len(ours) == len(its) > 0
    order = _partners(ours, its)
    np.testing.assert_allclose(ours.boxes, its.boxes[order], atol=0.01)
    np.testing.assert_allclose(ours.scores, its.scores[order], atol=1e-4)


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A detector and its twin in full precision; tests take copies."""
    folder = tmp_path_factory.mktemp("pair")
    parent = MAKERS["detector"](folder / "parent")
    return parent, make_twin(parent, folder / "twin", "f32")


@pytest.fixture(scope="module")
def half(pair, tmp_path_factory):
    """Its twin in bfloat16."""
    return make_twin(pair[0], tmp_path_factory.mktemp("half") / "half", "bf16", exact=pair[1])


@pytest.mark.parametrize("bgr", [False, True])
def test_bytes_are_looked_up_as_they_would_be_computed(bgr):
    image = np.arange(256 * 3, dtype=np.int64).reshape(16, 16, 3).astype(np.uint8)
    settings = ImageInput(zoom=1.0, bgr=bgr, mean=[0.1, 0.2, 0.3], std=[0.4, 0.5, 0.6], divisor=32)
    pixels, size = prepared(image, settings)
    assert size == (16, 16)
    assert pixels.shape == (1, 3, 32, 32)
    expected = (image[:, :, ::-1] if bgr else image).astype(np.float32) / np.float32(255)
    expected = (expected - np.array(settings.mean, np.float32)) / np.array(settings.std, np.float32)
    assert (pixels[0, :, :16, :16] == expected.transpose(2, 0, 1)).all()
    assert not pixels[0, :, 16:].any()
    assert not pixels[0, :, :, 16:].any()
    # A zoom that changes nothing is another way to the same numbers.
    zoomed, _ = prepared(np.repeat(np.repeat(image, 2, 0), 2, 1), settings.model_copy(update={"zoom": 0.5}))
    np.testing.assert_allclose(zoomed, pixels, atol=1e-5)


needs_int8 = pytest.mark.skipif(not network.supports("int8"), reason="this CPU does not compute in int8")


def _drawn(count=3, side=160):
    """Images with shapes in them, and the boxes of the shapes."""
    rng = np.random.default_rng(1)
    for _ in range(count):
        image = rng.integers(60, 120, (side, side, 3), dtype=np.uint8)
        boxes = rng.integers(4, side // 2, (3, 2)).repeat(2, axis=0).reshape(3, 4) + np.array([0, 0, 40, 32])
        for x1, y1, x2, y2 in boxes:
            image[y1:y2, x1:x2] += 100
        yield image, boxes.astype(np.float32)


def _quantised_types(folder):
    """The types of the layers that numbers of eight bits go into."""
    root = ElementTree.parse(folder / "network.xml").getroot()
    kinds = {layer.get("id"): layer.get("type") for layer in root.iterfind("layers/layer")}
    pairs = [(edge.get("from-layer"), edge.get("to-layer")) for edge in root.iterfind("edges/edge")]
    return {kinds[to] for start, to in pairs if kinds[start] == "FakeQuantize"}


@pytest.mark.soak
@needs_int8
def test_a_twin_in_eight_bits_keeps_the_geometry_of_boxes_exact(pair, tmp_path):
    pytest.importorskip("nncf", reason="NNCF is not installed")
    parent, exact = pair
    twin = make_twin(parent, tmp_path / "int8", "int8", calibration=_drawn, exact=exact)
    check_twin(parent, twin)
    assert read_spec(twin).architecture["precision"] == "int8"
    assert read_spec(exact).architecture["precision"] == "f32"
    kinds = _quantised_types(twin)
    assert "Convolution" in kinds
    assert not kinds & {"NonMaxSuppression", "ROIAlign", "Gather", "Concat", "Exp", "Subtract", "TopK"}
    for image, _ in _drawn():
        a, b = (load_model(folder).predict([image])[0] for folder in (exact, twin))
        assert len(b)
        # Of random weights all scores are near each other.
        assert abs(float(a.scores.max()) - float(b.scores.max())) < 0.05


@pytest.mark.soak
@needs_int8
def test_a_segmenter_in_eight_bits_gives_nearly_the_same_probabilities(tmp_path):
    pytest.importorskip("nncf", reason="NNCF is not installed")
    parent = MAKERS["unet flips"](tmp_path / "parent")
    twin = make_twin(parent, tmp_path / "int8", "int8", calibration=_drawn)
    assert "Convolution" in _quantised_types(twin)
    ours, its = load_model(parent), load_model(twin)
    for image, boxes in _drawn(2):
        crops = [image[int(y1) : int(y2), int(x1) : int(x2)] for x1, y1, x2, y2 in boxes]
        for a, b in zip(ours.segment(crops), its.segment(crops), strict=True):
            assert np.abs(a - b).mean() < 0.02
            assert a.std() > 1e-4


@needs_int8
def test_what_cannot_be_calibrated_says_so(pair, tmp_path, monkeypatch):
    parent, exact = pair
    with pytest.raises(ModelError, match="give data to calibrate on"):
        make_twin(parent, tmp_path / "a", "int8")
    with monkeypatch.context() as patched:
        patched.setitem(sys.modules, "nncf", None)
        with pytest.raises(EngineMissing, match="NNCF, which quantises networks, is not installed"):
            make_twin(parent, tmp_path / "b", "int8", calibration=_drawn)
    pytest.importorskip("nncf", reason="NNCF is not installed")
    with pytest.raises(ModelError, match="nothing to calibrate on"):
        make_twin(parent, tmp_path / "c", "int8", calibration=list, exact=exact)
    unet = MAKERS["unet"](tmp_path / "unet")
    with pytest.raises(ModelError, match="nothing to calibrate on"):
        make_twin(unet, tmp_path / "d", "int8", calibration=lambda: [(image, np.zeros((0, 4))) for image, _ in _drawn()])
    assert not {"a", "b", "c", "d"} & {p.name for p in tmp_path.iterdir()}


@pytest.mark.soak
@needs_int8
def test_a_crash_of_the_quantising_process_costs_a_try(pair, tmp_path, monkeypatch, caplog):
    pytest.importorskip("nncf", reason="NNCF is not installed")
    from models.engines.openvino import quantization

    run, crashed = subprocess.run, []

    def crash(times):
        def call(program, **options):
            if len(crashed) < times:
                crashed.append(program)
                program = [sys.executable, "-c", "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)"]
            return run(program, **options)

        crashed.clear()
        monkeypatch.setattr(quantization.subprocess, "run", call)

    crash(2)
    assert is_twin(make_twin(pair[0], tmp_path / "a", "int8", calibration=lambda: list(_drawn(1))))
    assert "ended by signal 11, attempt 2 of 4" in caplog.text
    crash(9)
    with pytest.raises(ModelError, match="its process crashed 4 times"):
        make_twin(pair[0], tmp_path / "b", "int8", calibration=lambda: list(_drawn(1)))
    assert len(crashed) == 4
    monkeypatch.setattr(quantization, "PROCESS", "models.engines.openvino.no_such_module")
    crash(0)
    with pytest.raises(ModelError, match=r"NNCF cannot quantise it .*no_such_module"):
        make_twin(pair[0], tmp_path / "c", "int8", calibration=lambda: list(_drawn(1)))
    assert not {"b", "c"} & {p.name for p in tmp_path.iterdir()}


@pytest.mark.parametrize("threads", [1, 2])
def test_calibration_is_spread_over_the_images(pair, monkeypatch, threads):
    from models.engines.openvino import quantization

    monkeypatch.setattr(network, "cpu_threads", lambda: threads)
    real, working = network.Network.__call__, []

    def alone(self, *inputs, **how):
        working.append(1)
        time.sleep(0.002)
        assert len(working) == 1, "two calls at a time: the sample is another each time"
        result = real(self, *inputs, **how)
        working.clear()
        return result

    monkeypatch.setattr(network.Network, "__call__", alone)

    def tiles(count):
        return [int(pixels.sum() * 1000) for pixels, _ in quantization.recorded_inputs(predictor, _drawn(count))]

    predictor = load_model(pair[1], "cpu", {"size": 64, "overlap": 0.0})
    of_one = [set(tiles(n)) for n in range(1, 5)]
    # Nine tiles, of which eight are drawn; the drawing is the same each time.
    assert [len(chosen) for chosen in of_one] == [8, 16, 24, 32]
    assert all(before < after for before, after in pairwise(of_one))
    monkeypatch.setattr(quantization, "MOST_INPUTS", 8)
    spread = tiles(4)
    own = [chosen - before for before, chosen in pairwise([set(), *of_one])]
    assert [len(tiles_of_one & set(spread)) for tiles_of_one in own] == [2] * 4
    assert not hasattr(predictor.predictor.network, "inputs")
    # More images than inputs: of some none.
    assert len(tiles(9)) == 8


@pytest.fixture
def copies(pair, tmp_path):
    return tuple(shutil.copytree(folder, tmp_path / folder.name) for folder in pair)


def _cut(path, share):
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])


def _of_a_segmenter(twin):
    other = make_twin(MAKERS["unet"](twin.parent / "unet"), twin.parent / "other", "f32")
    for name in ("network.xml", "network.bin"):
        shutil.copy(other / name, twin / name)


def _changed(twin, **fields):
    content = json.loads((twin / "model.json").read_text())
    content["architecture"] |= fields.pop("architecture", {})
    (twin / "model.json").write_text(json.dumps({**content, **fields}))


BROKEN = {
    "no network": (lambda t: (t / "network.xml").unlink(), r"no network\.xml"),
    "no weights": (lambda t: (t / "network.bin").unlink(), r"no network\.bin"),
    "cut network": (lambda t: _cut(t / "network.xml", 0.5), "damaged network"),
    "cut weights": (lambda t: _cut(t / "network.bin", 0.5), "damaged network|cannot compile"),
    "empty weights": (lambda t: (t / "network.bin").write_bytes(b""), "damaged network|cannot compile"),
    "no XML": (lambda t: (t / "network.xml").write_bytes(b"\x00" * 100), "damaged network"),
    "a segmenter's network": (_of_a_segmenter, "no network of this kind does"),
    "a pickle beside it": (lambda t: (t / "weights.pkl").write_bytes(b""), "no saved model has"),
    "masks that it does not give": (lambda t: _changed(t, kind="instance_segmenter"), "no network of this kind does"),
    "a segmenter without crops": (lambda t: _changed(t, kind="segmenter"), r"architecture\.crop"),
    "unknown precision": (lambda t: _changed(t, architecture={"precision": "f8"}), r"architecture\.precision"),
    "no digest": (lambda t: _changed(t, architecture={"parent_digest": "x"}), r"architecture\.parent_digest"),
    "no input": (lambda t: _changed(t, architecture={"image": None}), "either image or crop"),
    "a deviation of zero": (lambda t: _changed(t, architecture={"image": {"mean": [0] * 3, "std": [0] * 3}}), "std"),
}


@pytest.mark.parametrize("how", BROKEN)
def test_a_broken_twin_is_refused_when_it_is_loaded(how, copies):
    _, twin = copies
    spoil, message = BROKEN[how]
    spoil(twin)
    with pytest.raises(ModelError, match=message) as error:
        load_model(twin)
    assert "\n" not in str(error.value)


FOREIGN = {
    "another model's": (lambda p, t: _changed(t, architecture={"parent_digest": "0" * 64}), "twin of another model"),
    "a changed parent's": (lambda p, t: _changed(p, versions={"torch": "1"}), "twin of another model"),
    "another engine's": (lambda p, t: _changed(t, architecture={"parent_engine": "detectron2"}), "twin of another model"),
    "other classes": (lambda p, t: _changed(t, classes=["helicopter"]), "classes is not that of its parent"),
    "other tiles": (lambda p, t: _changed(t, tiling={"size": 512}), "tiling is not that of its parent"),
    "other images": (lambda p, t: _changed(t, rendering={"range": "percentile"}), "rendering is not that of its parent"),
}


@pytest.mark.parametrize("how", FOREIGN)
def test_another_models_twin_is_refused(how, copies):
    parent, twin = copies
    spoil, message = FOREIGN[how]
    check_twin(parent, twin)
    spoil(parent, twin)
    with pytest.raises(ModelError, match=message):
        check_twin(parent, twin)


def test_a_model_is_not_its_own_twin(copies, tmp_path):
    parent, twin = copies
    with pytest.raises(ModelError, match="is no twin but a torchvision model"):
        check_twin(parent, parent)
    with pytest.raises(ModelError, match="is a twin itself"):
        make_twin(twin, tmp_path / "again", "f32")
    composition = MAKERS["composed"](tmp_path / "composed" / "model")
    with pytest.raises(ModelError, match="is no twin of"):
        check_twin(composition, twin)


def test_numbers_that_are_not_finite_are_no_detections(copies):
    _, twin = copies
    weights = np.fromfile(twin / "network.bin", np.uint8)
    floats = weights[: len(weights) // 4 * 4].view(np.float32)
    floats[(np.abs(floats) > 1e-6) & (np.abs(floats) < 1)] = np.nan
    weights.tofile(twin / "network.bin")
    results = []
    with suppress(ModelError):
        results = load_model(twin).predict(_images()[:1])
    assert not sum(map(len, results))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_an_output_that_is_not_finite_is_an_error(value, copies, monkeypatch):
    detector = load_model(copies[1])
    spoilt, infer = SimpleQueue(), detector.network._idle(None).get().infer

    class Spoilt:
        @staticmethod
        def infer(inputs, **more):
            results = {i: np.array(array) for i, array in enumerate(infer(inputs, **more).values())}
            results[0][0, 0] = value
            return results

    spoilt.put(Spoilt)
    monkeypatch.setattr(detector.network, "_idle", lambda *_: spoilt)
    with pytest.raises(ModelError, match="not finite; use --runtime torch"):
        detector.predict(_images()[:1])


def test_compiled_networks_are_checked_and_those_that_nobody_uses_removed(copies, tmp_path, monkeypatch):
    monkeypatch.setenv("PLANES_CACHE", str(tmp_path / "cache"))
    load_model(copies[1])
    (used,) = compiled_folder().iterdir()
    assert any(used.iterdir())
    old, recent = (compiled_folder() / name for name in ("old", "recent"))
    for folder, days in ((old, 31), (recent, 29), (used, 31)):
        folder.mkdir(exist_ok=True)
        (folder / "network.blob").write_bytes(b"")
        os.utime(folder, (time.time() - days * 86_400,) * 2)
    load_model(copies[1])
    assert set(compiled_folder().iterdir()) == {used, recent}
    # A form that lost its middle is compiled anew; OpenVINO would compute something else with it.
    (blob,) = used.glob("*.blob")
    content = blob.read_bytes()
    for damaged in (content[:10_000] + bytes(4000) + content[14_000:], content[:500], b""):
        # Another file: a network that is loaded still reads the old one.
        blob.unlink()
        blob.write_bytes(damaged)
        load_model(copies[1])
        (blob,) = used.glob("*.blob")
        assert blob.stat().st_size == pytest.approx(len(content), abs=5000)
        assert hashlib.sha256(blob.read_bytes()).hexdigest() == blob.with_suffix(".sha256").read_text()
    kept = blob.stat().st_mtime_ns
    load_model(copies[1])
    assert [b.stat().st_mtime_ns for b in used.glob("*.blob")] == [kept]
    # A cache that cannot be written is no reason to fail.
    monkeypatch.setenv("PLANES_CACHE", str(copies[1] / "model.json"))
    assert load_model(copies[1]).predict(_images()[:1])


def test_a_compiled_network_that_cannot_be_kept_is_compiled_without(copies, tmp_path, monkeypatch):
    """As on a full disk."""
    monkeypatch.setenv("PLANES_CACHE", str(tmp_path / "cache"))
    core, asked = network.shared_core(), []

    class Full:
        read_model = core.read_model

        @staticmethod
        def compile_model(model, device, settings):
            asked.append("CACHE_DIR" in settings)
            if asked[-1]:
                raise RuntimeError("No space left on device")
            return core.compile_model(model, device, settings)

    monkeypatch.setattr(network, "shared_core", lambda: Full)
    assert load_model(copies[1]).predict(_images()[:1])
    assert asked == [True, False]


def _in_a_new_process(script, *arguments):
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_a_network_is_compiled_by_one_process_at_a_time(copies, tmp_path, monkeypatch):
    """OpenVINO writes into the very file that another process may have mapped."""
    _, twin = copies
    monkeypatch.setenv("PLANES_CACHE", str(tmp_path))
    load_model(twin)
    (folder,) = compiled_folder().iterdir()
    with ThreadPoolExecutor(1) as pool:
        with FileLock(folder / LOCK):
            loading = pool.submit(load_model, twin)
            with pytest.raises(TimeoutError):
                loading.result(1.5)
        assert loading.result(60)


def test_a_full_disk_is_said_when_a_twin_is_written(pair, tmp_path, monkeypatch):
    import openvino

    def full(*_, **__):
        raise RuntimeError("basic_ios::clear: iostream error")

    monkeypatch.setattr(openvino, "save_model", full)
    with pytest.raises(ModelError, match=r"cannot be written .*is the disk full"):
        make_twin(pair[0], tmp_path / "twin", "f32")


def test_openvino_tells_nobody_of_its_use():
    script = (
        "import sys\n"
        "from models.engines.openvino.network import require_openvino\n"
        "require_openvino()\n"
        "from openvino.tools.ovc import telemetry_utils\n"
        "print(sys.modules['openvino_telemetry'], telemetry_utils.tm.__name__)\n"
    )
    assert _in_a_new_process(script) == ["None", "openvino.tools.ovc.telemetry_stub"]


@pytest.mark.soak
def test_nncf_tells_nobody_of_its_use():
    pytest.importorskip("nncf", reason="NNCF is not installed")
    script = (
        "import contextlib\n"
        "from models.engines.openvino.quantize_process import quantise\n"
        "with contextlib.suppress(RuntimeError):\n"
        "    quantise('detector', 'no such network', '.', 'nowhere')\n"
        "from nncf.telemetry import wrapper\n"
        "print(type(wrapper.telemetry).__name__)\n"
    )
    assert _in_a_new_process(script)[-1] == "MagicMock"


def test_what_there_is_in_full_precision_is_not_converted_again(pair, tmp_path, monkeypatch):
    from models.engines.openvino import conversion

    monkeypatch.setattr(conversion, "save_twin", None)
    made = make_twin(pair[0], tmp_path / "half", "bf16", exact=pair[1])
    check_twin(pair[0], made)
    assert read_spec(made).architecture["precision"] == "bf16"


def test_what_a_cpu_lacks_is_said(half, monkeypatch):
    twin = half
    assert read_spec(twin).architecture["precision"] == "bf16"
    monkeypatch.setattr(network, "cpu_flags", lambda: {"avx2"})
    with pytest.raises(ModelError, match="needs a CPU with amx_bf16 or avx512_bf16; use --runtime torch"):
        load_model(twin)
    with pytest.raises(ModelError, match="a twin for CPUs; use --device cpu"):
        load_model(twin, "cuda")


def test_without_openvino_one_line_says_how_to_get_it(copies, monkeypatch):
    _, twin = copies
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(EngineMissing, match="pip install openvino"):
        load_model(twin)


def test_a_twin_needs_no_torch(copies, tmp_path):
    _, twin = copies
    image = tmp_path / "image.npy"
    np.save(image, _images()[0])
    script = (
        "import sys\n"
        "for name in ('torch', 'torchvision', 'timm', 'segmentation_models_pytorch', 'detectron2'):\n"
        "    sys.modules[name] = None\n"
        "import numpy as np\n"
        "from models.loading import load_model\n"
        f"print(len(load_model({str(twin)!r}, 'auto').predict([np.load({str(image)!r})])[0]))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) == len(load_model(twin).predict(_images()[:1])[0]) > 0


def test_it_takes_the_threads_that_it_is_given(copies, monkeypatch):
    _, twin = copies
    for given, threads in (("1", 1), ("2,1", 2)):
        monkeypatch.setenv("OMP_NUM_THREADS", given)
        assert cpu_threads() == threads
        compiled = load_model(twin).network._idle(None).get().get_compiled_model()
        assert compiled.get_property("INFERENCE_NUM_THREADS") == threads
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert cpu_threads() == len(os.sched_getaffinity(0))


def test_the_geometry_of_boxes_stays_in_full_precision(pair, half):
    """In bfloat16 what is pooled from a box is of another place: kept back, as are the last of the layers with the work."""
    _, full = pair
    kept, exact = {}, set()
    for folder in (full, half):
        layers = list(ElementTree.parse(folder / "network.xml").iterfind("layers/layer"))
        marked = [layer.find("rt_info/attribute[@name='precise']") is not None for layer in layers]
        kept[folder] = {(layer.get("type"), mark) for layer, mark in zip(layers, marked, strict=True)}
        work = [(layer.get("name"), mark) for layer, mark in zip(layers, marked, strict=True) if layer.get("type") in DENSE]
        exact = {re.search(r"network\.(.*?)/", name)[1] for name, mark in work if mark}
        assert len([mark for _, mark in work if not mark]) > 20
    assert exact == {
        "rpn.head.cls_logits",
        "rpn.head.bbox_pred",
        "roi_heads.box_predictor.cls_score",
        "roi_heads.box_predictor.bbox_pred",
    }
    # Left to itself OpenVINO saves weights as float16.
    assert 'element_type="f16"' not in (full / "network.xml").read_text() + (half / "network.xml").read_text()
    assert not any(marked for _, marked in kept[full])
    assert {marked for kind, marked in kept[half] if kind in ("Gather", "Concat", "NonMaxSuppression")} == {True}
    assert {marked for kind, marked in kept[half] if kind == "ROIAlign"} == {False}
    assert not any(marked for kind, marked in kept[half] if kind == "Relu")


@pytest.mark.parametrize("name", ["detectron2 detector", "detectron2 retinanet"])
def test_the_last_layers_of_detectron2_stay_in_full_precision(name, tmp_path):
    pytest.importorskip("detectron2", reason="Detectron2 is not installed")
    twin = make_twin(MAKERS[name](tmp_path / "parent"), tmp_path / "half", "bf16")
    exact, other = set(), 0
    for layer in ElementTree.parse(twin / "network.xml").iterfind("layers/layer"):
        if layer.get("type") in DENSE and layer.find("rt_info/attribute[@name='precise']") is not None:
            exact.add(re.search(r"network\.(.*?)/", layer.get("name"))[1])
        other += layer.get("type") in DENSE
    two_stages = {"proposal_generator.rpn_head." + last for last in ("objectness_logits", "anchor_deltas")}
    two_stages |= {"roi_heads.box_predictor." + last for last in ("cls_score", "bbox_pred")}
    assert exact == ({"head.cls_score", "head.bbox_pred"} if "retinanet" in name else two_stages)
    assert other > 40


@pytest.mark.parametrize(("threads", "streams"), [(1, 1), (3, 3), (9, 4)])
def test_tiles_predicted_at_a_time_are_what_each_gives_alone(pair, monkeypatch, threads, streams):
    monkeypatch.setattr(network, "cpu_threads", lambda: threads)
    twin = load_twin(read_spec(pair[1]), pair[1], 96)
    assert twin.concurrent == streams
    rng = np.random.default_rng(5)
    # One of another size is among them.
    tiles = [rng.integers(0, 256, (64 if i == 4 else 96, 96, 3), dtype=np.uint8) for i in range(11)]
    together = twin.predict(tiles)
    assert sum(map(len, together)) > 11
    assert together == [twin.predict([tile])[0].named(str(i)) for i, tile in enumerate(tiles)]


def test_fewer_tiles_than_threads_take_all_threads_one_after_the_other(pair, monkeypatch):
    monkeypatch.setattr(network, "cpu_threads", lambda: 2)
    twin = load_twin(read_spec(pair[1]), pair[1], 96)
    tiles, used = [np.zeros((96, 96, 3), np.uint8)] * 2, []
    real = network.Network._idle
    monkeypatch.setattr(network.Network, "_idle", lambda self, *key: used.append(key) or real(self, *key))
    for count, streams in ((1, 1), (2, 2)):
        used.clear()
        twin.predict(tiles[:count])
        assert used == [((1, 3, 96, 96), streams)] * count
        compiled = real(twin.network, *used[0]).get().get_compiled_model()
        assert compiled.get_property("NUM_STREAMS") == streams
        # OpenVINO takes no more than there are.
        assert compiled.get_property("INFERENCE_NUM_THREADS") == min(2, os.cpu_count())


def test_one_core_is_made_whatever_threads_ask_for_it(monkeypatch):
    made = []

    def slow():
        time.sleep(0.1)
        made.append(object())
        return made[-1]

    monkeypatch.setattr(network, "require_openvino", lambda: SimpleNamespace(Core=slow))
    monkeypatch.setattr(network, "_core", cache(network._core.__wrapped__))
    with ThreadPoolExecutor(max_workers=4) as pool:
        cores = list(pool.map(lambda _: network.shared_core(), range(4)))
    assert len(made) == 1
    assert all(core is made[0] for core in cores)


def test_tiles_come_in_batches_for_all_threads(pair, monkeypatch):
    monkeypatch.setattr(network, "cpu_threads", lambda: 2)
    twin, seen = load_twin(read_spec(pair[1]), pair[1], 96), []
    real = twin.predict
    monkeypatch.setattr(twin, "predict", lambda tiles: seen.append(len(tiles)) or real(tiles))
    image = np.random.default_rng(6).integers(0, 256, (480, 384, 3), dtype=np.uint8)
    by_tiles(twin, Tiling(size=96, overlap=0), "cpu").predict([image])
    assert seen == [16, 4]
    seen.clear()
    by_tiles(twin, Tiling(size=96, overlap=0, batch=7), "cpu").predict([image])
    assert seen == [7, 7, 6]


def test_what_fails_in_one_of_the_threads_is_an_error(pair, monkeypatch):
    monkeypatch.setattr(network, "cpu_threads", lambda: 2)
    twin = load_twin(read_spec(pair[1]), pair[1], 96)
    real, calls = twin.network, []

    def broken(*inputs, **more):
        calls.append(1)
        if len(calls) == 3:
            raise ModelError("OpenVINO: no")
        return real(*inputs, **more)

    twin.network = broken
    with pytest.raises(ModelError, match="OpenVINO: no"):
        twin.predict([np.zeros((96, 96, 3), np.uint8)] * 6)


def test_a_process_that_loaded_twins_and_dropped_them_lives_through_a_signal(pair, half):
    script = (
        "import faulthandler, gc, signal, sys\n"
        "import numpy as np\n"
        "from models.loading import load_model\n"
        "faulthandler.enable()\n"
        "signal.signal(signal.SIGCHLD, lambda *_: print('lived'))\n"
        "for folder in sys.argv[1:]:\n"
        "    model = load_model(folder)\n"
        "    model.predict([np.zeros((96, 96, 3), np.uint8)])\n"
        "    signal.raise_signal(signal.SIGCHLD)\n"
        "del model\n"
        "gc.collect()\n"
        "signal.raise_signal(signal.SIGCHLD)\n"
    )
    second = half if network.supports("bf16") else pair[1]
    assert _in_a_new_process(script, str(pair[1]), str(second)) == ["lived"] * 3


def test_what_is_pooled_in_half_precision_is_of_the_same_place():
    """A border of 1001.4 would be 1000 in bfloat16; the features are rounded, where they are taken from is not."""
    if not network.supports("bf16"):
        pytest.skip("this CPU does not compute in bfloat16")
    import openvino as ov
    from openvino import opset13 as ops

    features = np.zeros((1, 16, 8, 1200), np.float32)
    features[...] = np.arange(1200) % 8
    boxes = np.array([[1001.4, 1, 1003.4, 5], [1009.7, 1, 1011.7, 5]], np.float32)
    maps, rois = ops.parameter([1, 16, 8, -1], np.float32), ops.parameter([-1, 4], np.float32)
    # A convolution before and after, as in a network: between them OpenVINO computes in bfloat16.
    one = ops.constant(np.eye(16, dtype=np.float32)[:, :, None, None])
    before = ops.convolution(maps, one, [1, 1], [0, 0], [0, 0], [1, 1])
    pooled = ops.roi_align(before, rois, ops.constant(np.zeros(2, np.int64)), 2, 2, 2, 1.0, "avg", "half_pixel_for_nn")
    after = ops.convolution(pooled, one, [1, 1], [0, 0], [0, 0], [1, 1])
    model = ov.Model([after], [maps, rois])
    results = []
    for hint in ("f32", "bf16"):
        compiled = network.shared_core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": hint})
        results.append(np.array(compiled([features, boxes])[0]))
        kinds = {
            o.get_rt_info()["runtimePrecision"].astype(str)
            for o in compiled.get_runtime_model().get_ops()
            if o.get_rt_info()["layerType"].astype(str) == "ROIAlign"
        }
        assert kinds == {hint}
    np.testing.assert_allclose(results[0], results[1], atol=0.05)


def test_marks_that_openvino_reads_no_more_are_an_error(copies, tmp_path, monkeypatch):
    from models.engines.openvino import conversion

    monkeypatch.setattr(conversion, "MARK", "AnotherName")
    with pytest.raises(ModelError, match="keeps no layer in full precision; make the twin in f32"):
        make_twin(copies[0], tmp_path / "half", "bf16", exact=copies[1])
    assert not list(tmp_path.glob("*half*"))


def test_a_twin_in_half_precision_computes_in_half_precision(pair, half):
    _, twin = pair
    if not network.supports("bf16"):
        pytest.skip("this CPU does not compute in bfloat16")
    for tiling in ({"size": 0}, {"size": 96}):
        requests = [load_model(f, "cpu", tiling) for f in (twin, half)]
        networks = [getattr(r, "predictor", r).network for r in requests]
        compiled = [next(iter(n._requests.values())).get().get_compiled_model() for n in networks]
        assert [c.get_property("INFERENCE_PRECISION_HINT").get_type_name() for c in compiled] == ["f32", "bf16"]


def test_tiles_have_a_network_of_their_shape(pair):
    """Its detections are those of the network for any shape, which other images take."""
    _, twin = pair
    tiled, whole = load_model(twin, "cpu", {"size": 96, "overlap": 0.0}), load_model(twin)
    requests = tiled.predictor.network._requests
    assert {shape for shape, _ in requests} == {(1, 3, 96, 96)}
    (idle,) = requests.values()
    request = idle.get()
    assert request.get_compiled_model().inputs[0].get_partial_shape().is_static
    idle.put(request)
    tile = _images()[0][:96, :96]
    (a,), (b,) = tiled.predict([tile]), whole.predict([tile])
    assert len(a) == len(b) > 0
    order = _partners(a, b)
    np.testing.assert_allclose(a.boxes, b.boxes[order], atol=0.01)
    np.testing.assert_allclose(a.scores, b.scores[order], atol=1e-4)
    assert {shape for shape, _ in requests} == {(1, 3, 96, 96)}
    (other,) = tiled.predictor.predict([_images()[2]])
    (same,) = whole.predict([_images()[2]])
    assert {shape for shape, _ in requests} == {(1, 3, 96, 96), None}
    assert other.boxes.tobytes() == same.boxes.tobytes()
