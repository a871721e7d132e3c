"""Twins through the commands: approved by `planes-registry accelerate`, used by `score`, carried with their version."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import yaml

pytest.importorskip("openvino", reason="OpenVINO is not installed")

from mlflow import MlflowException

from models.engines.openvino import network
from pipelines.registry import lineage
from pipelines.registry import twins as twins_module
from pipelines.registry.gpu_precisions import gpu_precisions_of
from pipelines.registry.model_versions import Registry
from pipelines.registry.twins import forget_twin, name_twin, twins_of
from tests.gpu import fake_gpu
from tests.journeys.conftest import error_line

pytestmark = pytest.mark.xdist_group("versions")


def _saved(project):
    return next((project.folder / ".planes" / "training").glob("planes-det-*/model"))


def _version(project, number="1", name="fast"):
    return project.client.get_model_version(name, number)


@pytest.fixture(scope="module")
def twins(project, tmp_path_factory):
    """fast/1 with its twins, its table scored before them, and what the command said."""
    before = tmp_path_factory.mktemp("before")
    project.register(_saved(project), "fast")
    arguments = ("--model", "fast/1", "--data", str(project.data), "--overlays", "0", "--out")
    scored = project.score(*arguments, str(before))
    assert "fast/1: runs on PyTorch (no twin is approved; planes-registry accelerate fast/1 makes them)" in scored.stdout
    gates = project.folder / "fast.yaml"
    # How fast two images go on a machine that does other work too decides no test.
    any_speed = {precision: {"min_speedup": 1e-6} for precision in ("f32", "bf16")}
    content = {"data": [{"path": str(project.data)}], "gates": {}, "accelerate": any_speed}
    gates.write_text(yaml.safe_dump(content))
    known = _version(project).tags
    done = project.registry("accelerate", "fast", "1", "--gates", str(gates), code=None)
    return project, arguments, before / "fast-1", known, done


def _table(folder):
    return (folder / "instances.parquet").read_bytes()


def test_what_passes_is_named_by_tags_and_changes_nothing_else(twins):
    project, _, _, known, done = twins
    assert done.returncode == 0, done.stdout + done.stderr
    record = _version(project)
    made = {twin.precision: twin for twin in twins_of(record)}
    assert "int8: left out, --calibration names no data set" in done.stdout
    assert set(made) == ({"f32", "bf16"} if network.supports("bf16") else {"f32"})
    assert {k: v for k, v in record.tags.items() if not k.startswith("twin_")} == known
    for precision, twin in made.items():
        assert f"twin {precision}: approved" in done.stdout
        assert project.client.get_run(twin.run_id).data.tags["approved"]
    run = project.client.get_run(made["f32"].run_id)
    assert run.data.metrics["f32/airfield/AP"] == pytest.approx(run.data.metrics["parent/airfield/AP"], abs=5e-4)
    assert re.search(r"pass +detections +airfield/test +within 0.01 pixels", done.stdout)
    assert "twins" in project.registry("show", "fast/1").stdout
    assert re.search(r"fast/1 .* (bf16 f32|f32 bf16|f32)\s", project.registry("list", "fast").stdout)
    verified = project.registry("verify", "fast/1").stdout
    assert all(re.search(rf"ok +twin {precision}", verified) for precision in made)


def test_score_takes_the_fastest_and_a_job_keeps_what_it_began_with(twins, tmp_path):
    project, arguments, before, _, _ = twins
    fastest = twins_of(_version(project))[0]
    done = project.score(*arguments, str(tmp_path / "auto"))
    assert f"fast/1: runs as its twin, openvino {fastest.precision}, " in done.stdout
    manifest = json.loads((tmp_path / "auto" / "fast-1" / "manifest.json").read_text())
    assert manifest["settings"]["runtime"] == f"openvino {fastest.precision}"
    assert manifest["model"] == fastest.digest[:16]
    again = project.score(*arguments, str(tmp_path / "auto"))
    assert "2 of them scored before" in again.stdout
    refused = error_line(project.score(*arguments, str(tmp_path / "auto"), "--runtime", "torch", code=1))
    assert f"holds a scoring with runtime openvino {fastest.precision}, not torch" in refused
    # The version itself predicts what it did before it had twins; a job of that time is gone on with.
    project.score(*arguments, str(tmp_path / "torch"), "--runtime", "torch")
    assert _table(tmp_path / "torch" / "fast-1") == _table(before)
    old = project.score(*arguments, str(before.parent))
    assert "runs on PyTorch (as the scoring in the folder began)" in old.stdout
    assert "2 of them scored before" in old.stdout
    # The first one is that which measured the twin.
    run = re.findall(r"run ([0-9a-f]{32})", done.stdout)[-1]
    assert project.client.get_run(run).data.params["runtime"] == f"openvino {fastest.precision}"
    half = error_line(
        project.score(*arguments, str(tmp_path / "no"), "--runtime", "openvino", "--precision", "bf16-mixed", code=1)
    )
    assert "--precision bf16-mixed is PyTorch's" in half
    tiles = project.score(*arguments, str(tmp_path / "tiles"), "--tile", "256", "--batch", "3")
    assert "runs as its twin" in tiles.stdout


def test_a_cpu_without_bfloat16_takes_the_twin_in_full_precision(twins, tmp_path, monkeypatch):
    project, arguments, *_ = twins
    monkeypatch.setattr(network, "cpu_flags", lambda: frozenset({"avx2"}))
    assert "runs as its twin, openvino f32" in project.score(*arguments, str(tmp_path / "a")).stdout
    monkeypatch.setattr("pipelines.registry.twins.find_spec", lambda name: None)
    done = project.score(*arguments, str(tmp_path / "b"))
    assert "runs on PyTorch (" in done.stdout
    assert "OpenVINO is not installed" in done.stdout
    refused = project.score(*arguments, str(tmp_path / "c"), "--runtime", "openvino", code=1)
    assert "OpenVINO is not installed" in error_line(refused)


# What an environment of requirements-scorer.txt lacks.
ABSENT = ("torch", "torchvision", "timm", "segmentation_models_pytorch", "detectron2", "lightning_fabric", "safetensors")
WITHOUT = f"""
import sys
from importlib.machinery import PathFinder

class Lacking(PathFinder):
    @classmethod
    def find_spec(cls, name, *more):
        return None if name.partition(".")[0] in {(*ABSENT, "matplotlib")} else super().find_spec(name, *more)

sys.meta_path = [Lacking if finder is PathFinder else finder for finder in sys.meta_path]
from scoring.cli import main
main()
"""


def _without(project, *arguments):
    """`score` in a Python in which those packages cannot be imported."""
    program = [sys.executable, "-c", WITHOUT, *arguments]
    return subprocess.run(
        program, cwd=project.folder, env=project.env(), capture_output=True, text=True, timeout=200, check=False
    )


def test_a_twin_is_scored_without_torch(twins, tmp_path):
    project, arguments, *_ = twins
    project.score(*arguments, str(tmp_path / "with"))
    done = _without(project, *arguments, str(tmp_path / "without"))
    assert done.returncode == 0, done.stderr
    assert "runs as its twin" in done.stdout
    for name in ("instances.parquet", "manifest.json", "coco_results.json"):
        files = [tmp_path / out / "fast-1" / name for out in ("with", "without")]
        assert files[0].read_bytes() == files[1].read_bytes(), name
    run = re.findall(r"run ([0-9a-f]{32})", done.stdout)[-1]
    metrics = project.client.get_run(run).data.metrics
    assert {"test/AP", "images_per_second"} <= set(metrics)


def test_what_needs_torch_says_so_where_there_is_none(twins, tmp_path):
    project, arguments, *_ = twins
    project.register(_saved(project), "plain")
    out = (*arguments[2:], str(tmp_path / "out"))
    said = error_line(_without(project, "--model", "plain/1", *out))
    assert "plain/1: PyTorch is not installed here, and a twin cannot stand in: no twin is approved" in said
    said = error_line(_without(project, *arguments, str(tmp_path / "out"), "--runtime", "torch"))
    assert "a torchvision model needs torch, which is not installed: install requirements.txt" in said


def test_a_job_of_a_twin_that_is_killed_ends_the_same(twins, tmp_path):
    project, arguments, *_ = twins
    shards = ("--shard", "1", "--data", str(project.data), "--split", "train+test")
    project.score(*arguments, str(tmp_path / "whole"), *shards)
    running = project.start("score", *arguments, str(tmp_path / "killed"), *shards)
    folder = tmp_path / "killed" / "fast-1"
    deadline = time.monotonic() + 120
    while len(list(folder.glob("shards/[0-9]*"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.005)
    running.kill()
    assert running.wait().returncode == -signal.SIGKILL
    project.score(*arguments, str(tmp_path / "killed"), *shards)
    for name in ("instances.parquet", "manifest.json", "coco_results.json"):
        assert (folder / name).read_bytes() == (tmp_path / "whole" / "fast-1" / name).read_bytes(), name


def test_what_fails_its_gates_is_not_used(twins, tmp_path):
    project, arguments, *_ = twins
    project.register(_saved(project), "slow")
    gates = tmp_path / "slow.yaml"
    content = {"data": [{"path": str(project.data)}], "gates": {}, "accelerate": {"f32": {"min_speedup": 1000}}}
    gates.write_text(yaml.safe_dump(content))
    project.client.set_model_version_tag("slow", "1", "twin_f32", _version(project).tags["twin_f32"])
    done = project.registry("accelerate", "slow/1", "--gates", str(gates), "--precision", "f32", code=2)
    assert re.search(r"FAIL +speed +airfield/test +>= 1000 times", done.stdout)
    assert "twin f32: not approved" in done.stdout
    assert "twin_f32" not in _version(project, name="slow").tags
    again = project.score("--model", "slow/1", *arguments[2:], str(tmp_path / "out"))
    assert "runs on PyTorch" in again.stdout
    gates.write_text(yaml.safe_dump({**content, "accelerate": {"int4": {}}}))
    wrong = project.registry("accelerate", "slow/1", "--gates", str(gates), code=1)
    assert "accelerate" in error_line(wrong)


def _image(**fields):
    """Spoil what the twin does to an image before its network."""

    def change(folder):
        content = json.loads((folder / "model.json").read_text())
        content["architecture"]["image"] |= fields
        (folder / "model.json").write_text(json.dumps(content))

    return change


def _weights(change):
    """Spoil the network's weights."""

    def spoil(folder):
        raw = np.fromfile(folder / "network.bin", np.uint8)
        floats = raw[: len(raw) // 4 * 4].view(np.float32)
        # Neither indices nor sizes, which are stored among them.
        used = (np.abs(floats) > 1e-3) & (np.abs(floats) < 1)
        floats[used] = change(floats[used])
        raw.tofile(folder / "network.bin")

    return spoil


SPOILT = {
    "no mean": _image(mean=[0.0, 0.0, 0.0]),
    "another deviation": _image(std=[0.25, 0.25, 0.25]),
    "channels swapped": _image(bgr=True),
    "another range": _image(scale=256.0),
    "another zoom": _image(zoom=0.5),
    "another filter": _image(resampling="linear"),
    "weights of another day": _weights(lambda w: w * np.float32(1.001)),
    "weights in half precision": _weights(lambda w: w.astype(np.float16).astype(np.float32)),
    "no numbers": _weights(lambda w: w * np.float32(np.nan)),
    "no weights": lambda folder: (folder / "network.bin").write_bytes(b""),
}
FEW_SPOILT = ("channels swapped", "weights in half precision", "no numbers")


@pytest.mark.parametrize("how", [h if h in FEW_SPOILT else pytest.param(h, marks=pytest.mark.soak) for h in SPOILT])
def test_a_spoilt_twin_is_not_approved(twins, how, tmp_path, monkeypatch):
    project, *_ = twins
    good = {twin.precision: twin for twin in twins_of(_version(project))}["f32"]
    where = Path(project.client.get_logged_model(good.model_id).artifact_location.removeprefix("file://"))
    saved = next(where.rglob("network.bin")).parent

    def spoilt(parent, into, *_, **__):
        shutil.copytree(saved, into)
        SPOILT[how](into)
        return into

    monkeypatch.setattr("pipelines.use_cases.accelerate.make_twin", spoilt)
    name = f"spoilt-{list(SPOILT).index(how)}"
    project.register(_saved(project), name)
    gates = project.folder / "fast.yaml"
    done = project.registry("accelerate", f"{name}/1", "--gates", str(gates), "--precision", "f32", code=None)
    assert done.returncode in (1, 2)
    if done.returncode == 1:
        assert "network" in error_line(done)
    else:
        assert re.search(r"FAIL +(detections|images that failed|AP)", done.stdout), done.stdout
        assert "twin f32: not approved" in done.stdout
    assert not twins_of(_version(project, name=name))


@pytest.fixture
def eight(twins, tmp_path):
    """A version, and the command that makes its twin in eight bits, without data to calibrate on."""
    if not network.supports("int8"):
        pytest.skip("this CPU does not compute in int8")
    pytest.importorskip("nncf", reason="NNCF is not installed")
    project, *_ = twins
    project.register(_saved(project), "eight")
    versions = project.client.search_model_versions("name = 'eight'")
    version = f"eight/{len(versions)}"
    gates = tmp_path / "eight.yaml"
    # What has hardly learnt anything gains and loses by chance.
    loose = {"min_speedup": 1e-6, "max_loss": 0.5}
    content = {"data": [{"path": str(project.data)}], "gates": {}, "accelerate": {"int8": loose}}
    gates.write_text(yaml.safe_dump(content))
    return version, ("accelerate", version, "--gates", str(gates), "--precision", "int8")


def test_data_that_cannot_calibrate_are_refused(twins, eight, tmp_path):
    project, *_ = twins
    _, command = eight
    assert "--calibration names no data set" in error_line(project.registry(*command, code=1))
    on_itself = project.registry(*command, "--calibration", str(project.data), "--split", "train", code=1)
    assert "of its images are measured on too (first: A0" in error_line(on_itself)
    nowhere = project.registry(*command, "--calibration", str(tmp_path / "none"), code=1)
    assert str(tmp_path / "none") in error_line(nowhere)


@pytest.mark.soak
def test_a_twin_in_eight_bits_is_made_and_used(twins, eight, tmp_path):
    project, arguments, *_ = twins
    version, command = eight
    done = project.registry(*command, "--calibration", str(project.data))
    assert "twin int8: approved" in done.stdout
    (twin,) = twins_of(_version(project, version.partition("/")[2], "eight"))
    logged = {i.dataset.name for i in project.client.get_run(twin.run_id).inputs.dataset_inputs}
    assert "airfield/train" in logged
    scored = project.score("--model", version, *arguments[2:], str(tmp_path / "out"))
    assert f"{version}: runs as its twin, openvino int8" in scored.stdout
    manifest = json.loads((tmp_path / "out" / version.replace("/", "-") / "manifest.json").read_text())
    assert manifest["settings"]["runtime"] == "openvino int8"


def test_another_versions_twin_and_a_tag_that_names_none_are_refused(twins, tmp_path):
    project, arguments, *_ = twins
    unet = next((project.folder / ".planes" / "training").glob("planes-unet-*/model"))
    project.register(unet, "odd")
    out = ("--model", "odd/1", *arguments[2:], str(tmp_path / "out"))
    for tag, message in (
        (_version(project).tags["twin_f32"], "is the twin of another model"),
        ("{}", "its tag twin_f32 names none; planes-registry accelerate odd/1 makes it again"),
        ("openvino", "names none"),
        (_version(project).tags["twin_f32"].replace("m-", "m-0"), "accelerate odd/1 makes it anew, --runtime torch does"),
    ):
        project.client.set_model_version_tag("odd", "1", "twin_f32", tag)
        assert message in error_line(project.score(*out, code=1))
        assert "odd/1" in project.registry("list", "odd").stdout
        assert "twins" in project.registry("show", "odd/1").stdout
        assert "FAIL" in project.registry("verify", "odd/1", code=1).stdout
    project.score(*out, "--runtime", "torch")


def test_what_a_killed_accelerate_left_is_swept(twins, monkeypatch):
    project, *_ = twins
    project.register(_saved(project), "left")
    gates = ("--gates", str(project.folder / "fast.yaml"), "--precision", "f32")
    project.registry("accelerate", "left", "1", *gates, code=None)
    twin = twins_of(_version(project, name="left"))[0]
    # Logged as a twin is, by no accelerate.
    project.register(_saved(project), "left-f32")
    assert twin.model_id not in project.registry("gc", "left", "--dry-run").stdout
    project.client.delete_model_version_tag("left", "1", "twin_f32")
    assert twin.model_id not in project.registry("gc", "left", "--dry-run").stdout, "it may be one that is being made"
    monkeypatch.setattr(twins_module, "LEFT_BEHIND", 0)
    listed = project.registry("gc", "left", "--dry-run").stdout
    assert re.search(rf"left-f32 {twin.model_id} +delete +a twin that no version names", listed)
    assert len(re.findall(r"m-\w+", listed)) == 1
    # A copy names it too.
    project.client.set_model_version_tag("left-f32", "1", "twin_f32", twin.model_dump_json())
    assert twin.model_id not in project.registry("gc", "left", "--dry-run").stdout
    project.client.delete_model_version_tag("left-f32", "1", "twin_f32")
    assert f"left-f32 {twin.model_id} deleted" in project.registry("gc", "left", "--yes").stdout
    assert twin.model_id not in project.registry("gc", "left", "--dry-run").stdout
    assert not re.search(r"m-\w+", project.registry("gc", "fast", "--dry-run").stdout)
    assert project.registry("verify", "fast/1").returncode == 0


def test_a_twin_goes_where_its_version_is_copied(twins, tmp_path, monkeypatch):
    project, *_ = twins
    here = project.registry("copy", "fast/1", "faster").stdout
    assert "fast/1 is faster/1" in here
    assert _version(project, name="faster").tags["twin_f32"] == _version(project).tags["twin_f32"]
    other = f"sqlite:///{tmp_path / 'other.db'}"
    project.registry("copy", "fast/1", "fast", "--to-server", other)
    registry = Registry.connect(other)
    copied, ours = (r.client.get_model_version("fast", "1") for r in (registry, Registry(project.client)))
    assert [t.digest for t in twins_of(copied)] == [t.digest for t in twins_of(ours)]
    assert not {t.model_id for t in twins_of(copied)} & {t.model_id for t in twins_of(ours)}
    verified = project.registry("verify", "fast/1", MLFLOW_TRACKING_URI=other).stdout
    assert re.search(r"ok +twin f32", verified)
    # A machine that cannot load one copies the version without it, and says so.
    with monkeypatch.context() as patch:
        patch.setattr(network, "cpu_flags", lambda: frozenset({"avx2"}))
        third = f"sqlite:///{tmp_path / 'third.db'}"
        said = project.registry("copy", "fast/1", "fast", "--to-server", third).stderr
    kept = twins_of(Registry.connect(third).client.get_model_version("fast", "1"))
    assert [t.precision for t in kept] == ["f32"]
    assert ("its twin bf16 is not copied (this CPU does not compute in bf16)" in said) == (len(twins_of(ours)) == 2)
    # Swept with the last version that names it.
    project.register(_saved(project), "fast", MLFLOW_TRACKING_URI=other)
    lineage.delete(registry, "fast", "1", 1)
    for twin in twins_of(copied):
        with pytest.raises(MlflowException):
            registry.client.get_logged_model(twin.model_id)


def test_a_twin_stays_while_another_version_names_it(twins):
    project, *_ = twins
    project.registry("copy", "fast/1", "swept")
    project.register(_saved(project), "swept")
    lineage.delete(Registry(project.client), "swept", "1", 1)
    for twin in twins_of(_version(project)):
        assert project.client.get_logged_model(twin.model_id)


def test_half_precision_is_approved_on_a_gpu_and_taken_there(twins, tmp_path, monkeypatch):
    """On a GPU that is faked: bfloat16 of this CPU, what moves there stays."""
    project, arguments, *_ = twins
    project.register(_saved(project), "halved")
    arguments = ("--model", "halved/1", *arguments[2:])
    fake_gpu(monkeypatch)
    gates = tmp_path / "halved.yaml"
    content = {"data": [{"path": str(project.data)}], "gates": {}}
    halve = ("accelerate", "halved", "1", "--gates", str(gates), "--device", "cuda", "--precision", "bf16-mixed")
    gates.write_text(yaml.safe_dump(content | {"accelerate": {"bf16-mixed": {"min_speedup": 1000}}}))
    done = project.registry(*halve, code=2)
    assert re.search(r"FAIL +speed", done.stdout)
    assert "bf16-mixed on a GPU that is not there: not approved" in done.stdout
    assert "gpu_bf16-mixed" not in _version(project, name="halved").tags

    gates.write_text(yaml.safe_dump(content | {"accelerate": {"bf16-mixed": {"min_speedup": 1e-6, "max_loss": 1}}}))
    done = project.registry(*halve)
    assert "bf16-mixed on a GPU that is not there: approved" in done.stdout
    (approved,) = gpu_precisions_of(_version(project, name="halved"))
    run = project.client.get_run(approved.run_id)
    assert (run.data.tags["task"], run.data.tags["approved"]) == ("accelerate", "bf16-mixed")
    assert run.data.params["device"] == "cuda (a GPU that is not there)"
    assert {"parent/airfield/AP", "bf16-mixed/airfield/AP"} <= set(run.data.metrics)
    assert "bf16-mixed, " in project.registry("show", "halved/1").stdout

    out = tmp_path / "out"
    done = project.score(*arguments, str(out), "--device", "cuda")
    assert "halved/1: runs in bf16-mixed, " in done.stdout
    settings = json.loads((out / "halved-1" / "manifest.json").read_text())["settings"]
    assert (settings["precision"], settings["runtime"], settings["device"]) == ("bf16-mixed", "torch", "cuda")
    same = project.score(*arguments, str(tmp_path / "named"), "--device", "cuda", "--precision", "bf16-mixed")
    assert "runs in" not in same.stdout
    assert _table(out / "halved-1") == _table(tmp_path / "named" / "halved-1")
    # A job keeps what it began in; another is refused.
    assert "runs in bf16-mixed" in project.score(*arguments, str(out), "--device", "cuda").stdout
    refused = project.score(*arguments, str(out), "--device", "cuda", "--runtime", "torch", code=1)
    assert "precision bf16-mixed, not 32" in error_line(refused)

    # What fails later is taken no more.
    gates.write_text(yaml.safe_dump(content | {"accelerate": {"bf16-mixed": {"min_speedup": 1000}}}))
    project.registry(*halve, code=2)
    assert not gpu_precisions_of(_version(project, name="halved"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--device", "cuda", "--precision", "int8"), "int8: is a twin's, which is for CPUs"),
        (("--device", "cuda", "--calibration", "x"), "--calibration is for int8 twins"),
        (("--device", "cuda", "--precision", "bf16-mixed"), "this GPU computes in none of bf16-mixed"),
        (("--precision", "16-mixed"), "16-mixed: is for GPUs (--device cuda)"),
    ],
)
def test_precisions_that_a_device_has_not_are_refused(twins, options, message, monkeypatch):
    project, *_ = twins
    fake_gpu(monkeypatch, (7, 5))
    assert message in error_line(project.registry("accelerate", "fast", "1", *options, code=1))


def test_without_a_gpu_the_device_is_refused(twins):
    project, *_ = twins
    done = project.registry("accelerate", "fast", "1", "--device", "cuda", code=1)
    assert "no CUDA device here" in error_line(done)


def test_a_twin_that_gives_way_is_deleted_unless_a_copy_names_it(twins):
    """A second one is named in its place, then forgotten: no run of `accelerate` leaves anything that nobody names."""
    project, *_ = twins
    registry = Registry(project.client)
    project.register(_saved(project), "again")
    first, copied = registry.resolve("again/1"), twins_of(_version(project))[0]
    client = project.client
    made = [client.create_logged_model(client.get_run(copied.run_id).info.experiment_id, f"t{i}") for i in range(3)]
    named = [copied.model_copy(update={"model_id": one.model_id}) for one in made]
    for twin in named[:2]:
        name_twin(registry, first, twin)
        # Named again, it stays.
        name_twin(registry, first, twin)
    with pytest.raises(MlflowException):
        client.get_logged_model(named[0].model_id)
    assert client.get_logged_model(named[1].model_id)
    project.registry("copy", "again/1", "kept")
    name_twin(registry, first, named[2])
    assert client.get_logged_model(named[1].model_id)
    forget_twin(registry, registry.resolve("kept/1"), copied.precision)
    with pytest.raises(MlflowException):
        client.get_logged_model(named[1].model_id)
    forget_twin(registry, first, copied.precision)
    with pytest.raises(MlflowException):
        client.get_logged_model(named[2].model_id)
    assert not twins_of(_version(project, "1", "again"))


def test_a_changed_twin_is_refused(twins, tmp_path):
    project, arguments, *_ = twins
    fastest = twins_of(_version(project))[0]
    where = Path(project.client.get_logged_model(fastest.model_id).artifact_location.removeprefix("file://"))
    weights = next(where.rglob("network.bin"))
    content = weights.read_bytes()
    middle = len(content) // 2
    weights.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
    try:
        done = project.score(*arguments, str(tmp_path / "out"), code=1)
        assert "its files are not those that were registered" in error_line(done)
        assert re.search(rf"FAIL +twin {fastest.precision}", project.registry("verify", "fast/1", code=1).stdout)
        project.score(*arguments, str(tmp_path / "out"), "--runtime", "torch")
    finally:
        weights.write_bytes(content)
