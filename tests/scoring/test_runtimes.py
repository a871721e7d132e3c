"""What runs a version: every reason for PyTorch, and what a job in the folder began with."""

from __future__ import annotations

import json
import os
from types import SimpleNamespace

import pytest
import torch
from mlflow import MlflowException

from models.errors import ModelError, RegistryError
from models.runtime import devices
from pipelines.registry.gpu_precisions import GpuPrecision
from pipelines.registry.model_versions import Resolved
from pipelines.registry.twins import Twin, delete_unnamed
from scoring import runtimes
from scoring.jobs.manifest import MANIFEST, Manifest
from scoring.runtimes import Chosen, Conditions, choose_runtime
from tests.gpu import fake_gpu

VERSION = Resolved("det/1", "det", "1")


def _twin(precision, speedup):
    named = {"model_id": f"m-{precision}", "digest": "0" * 64, "run_id": "a"}
    return Twin(precision=precision, speedup=speedup, **named)


def _registry(*twins):
    tags = {twin.tag: twin.model_dump_json() for twin in twins}
    return SimpleNamespace(version_of=lambda version: SimpleNamespace(name="det", version="1", tags=tags))


BOTH = _registry(_twin("f32", 2), _twin("bf16", 5))


@pytest.fixture(autouse=True)
def fetched(monkeypatch, tmp_path):
    """Every twin can be used, and lies in a folder of its precision's name."""
    monkeypatch.setattr(runtimes, "usable", lambda twin: None)
    monkeypatch.setattr(runtimes, "fetch_twin", lambda registry, version, parent, twin: tmp_path / twin.precision)
    monkeypatch.setattr(runtimes, "is_twin", lambda folder: folder.name == "twin")
    monkeypatch.setattr(runtimes, "precisions_of", lambda folder: ["bf16", "bf16"])


@pytest.fixture
def conditions(tmp_path):
    return {"device": "cpu", "precision": "32", "job": tmp_path / "job"}


def _holds(job, runtime, precision="32"):
    job.mkdir()
    rest = {"label": "det/1", "model": "0", "data": "d", "split": "test", "category_id": 1, "inputs": "0"}
    settings = {"precision": precision, **({} if runtime is None else {"runtime": runtime})}
    (job / MANIFEST).write_text(Manifest(**rest, settings=settings, images=1, shard_size=1).model_dump_json())


@pytest.mark.parametrize(
    ("registry", "change", "reason"),
    [
        (BOTH, {"precision": "bf16-mixed"}, "--precision bf16-mixed is PyTorch's"),
        (BOTH, {"elsewhere": True}, "of the cluster's CPUs nothing is known here"),
        (_registry(), {}, "no twin is approved; planes-registry accelerate det/1 makes them"),
    ],
)
def test_where_no_twin_can_run_pytorch_does_and_why_is_said(registry, change, reason, conditions, tmp_path, caplog):
    now = Conditions(**{**conditions, **change})
    with caplog.at_level("INFO", "scoring"):
        assert choose_runtime(registry, VERSION, tmp_path, runtime="auto", now=now) == Chosen(tmp_path, "torch")
    assert caplog.messages == [f"det/1: runs on PyTorch ({reason})"]
    with pytest.raises(RegistryError, match="--runtime openvino: ") as error:
        choose_runtime(registry, VERSION, tmp_path, runtime="openvino", now=now)
    assert reason in str(error.value)
    assert choose_runtime(registry, VERSION, tmp_path, runtime="torch", now=now) == Chosen(tmp_path, "torch")


def test_on_a_gpu_there_are_no_twins(conditions, tmp_path):
    now = Conditions(**{**conditions, "device": "cuda:0"})
    with pytest.raises(RegistryError, match="--runtime openvino: twins are for CPUs, the device is cuda:0"):
        choose_runtime(BOTH, VERSION, tmp_path, runtime="openvino", now=now)


HALVES = _registry(
    GpuPrecision(precision="bf16-mixed", gpu="G", speedup=1.5, run_id="a"),
    GpuPrecision(precision="16-mixed", gpu="G", speedup=2, run_id="a"),
)


def _on_gpu(registry, tmp_path, conditions, **change):
    now = Conditions(**{**conditions, "device": "cuda:0", **change})
    return choose_runtime(registry, VERSION, tmp_path, runtime="auto", now=now)


@pytest.mark.parametrize(
    ("capability", "precision", "reason"),
    [
        ((8, 0), "16-mixed", "runs in 16-mixed, 2.00 times as fast when measured (G, run a)"),
        ((7, 5), "16-mixed", "runs in 16-mixed"),
        ((6, 0), None, "runs in full precision (this GPU does not compute in 16-mixed; this GPU does not compute in bf16"),
    ],
)
def test_a_gpu_takes_the_fastest_approved_precision(
    capability, precision, reason, conditions, tmp_path, monkeypatch, caplog
):
    fake_gpu(monkeypatch, capability)
    with caplog.at_level("INFO", "scoring"):
        assert _on_gpu(HALVES, tmp_path, conditions) == Chosen(tmp_path, "torch", precision)
    assert reason in caplog.text
    now = Conditions(**{**conditions, "device": "cuda:0"})
    assert choose_runtime(HALVES, VERSION, tmp_path, runtime="torch", now=now) == Chosen(tmp_path, "torch")


def test_a_gpu_without_an_approved_precision_runs_in_full(conditions, tmp_path, caplog):
    with caplog.at_level("INFO", "scoring"):
        assert _on_gpu(_registry(), tmp_path, conditions) == Chosen(tmp_path)
    assert "no other is approved; planes-registry accelerate det/1 --device cuda measures them" in caplog.text


@pytest.mark.parametrize("change", [{"elsewhere": True}, {"precision": "bf16-mixed"}])
def test_what_was_requested_or_what_nobody_knows_stays(change, conditions, tmp_path, monkeypatch):
    fake_gpu(monkeypatch)
    assert _on_gpu(HALVES, tmp_path, conditions, **change) == Chosen(tmp_path)


@pytest.mark.parametrize(
    ("held", "fresh", "precision", "reason"),
    [
        ("32", False, None, "as the scoring in the folder began"),
        ("bf16-mixed", False, "bf16-mixed", "runs in bf16-mixed"),
        ("32", True, "16-mixed", "runs in 16-mixed"),
    ],
)
def test_a_job_keeps_the_precision_that_it_began_in(
    held, fresh, precision, reason, conditions, tmp_path, monkeypatch, caplog
):
    fake_gpu(monkeypatch)
    _holds(conditions["job"], "torch", held)
    with caplog.at_level("INFO", "scoring"):
        assert _on_gpu(HALVES, tmp_path, conditions, fresh=fresh).precision == precision
    assert reason in caplog.text


def test_a_job_in_a_precision_that_is_gone_says_so(conditions, tmp_path, monkeypatch, caplog):
    fake_gpu(monkeypatch)
    _holds(conditions["job"], "torch", "bf16-mixed")
    with caplog.at_level("INFO", "scoring"):
        assert _on_gpu(_registry(), tmp_path, conditions).precision is None
    # The manifest then refuses it.
    assert "began in bf16-mixed, which this version has no more" in caplog.text


@pytest.mark.parametrize(
    "text", ["{", GpuPrecision(precision="16-mixed", gpu="G", speedup=2, run_id="a").model_dump_json()]
)
def test_a_tag_that_names_no_precision_says_what_to_do(text, conditions, tmp_path):
    record = SimpleNamespace(name="det", version="1", tags={"gpu_bf16-mixed": text})
    with pytest.raises(RegistryError, match=r"det/1: its tag gpu_bf16-mixed names none; .*--device cuda"):
        _on_gpu(SimpleNamespace(version_of=lambda version: record), tmp_path, conditions)


@pytest.mark.parametrize("runtime", ["auto", "openvino"])
def test_the_fastest_that_can_be_used_is_taken(runtime, conditions, tmp_path, monkeypatch):
    now = Conditions(**conditions)
    assert choose_runtime(BOTH, VERSION, tmp_path, runtime=runtime, now=now) == Chosen(tmp_path / "bf16", "openvino bf16")
    monkeypatch.setattr(runtimes, "usable", lambda twin: "no AMX" if twin.precision == "bf16" else None)
    assert choose_runtime(BOTH, VERSION, tmp_path, runtime=runtime, now=now) == Chosen(tmp_path / "f32", "openvino f32")


@pytest.mark.parametrize(
    ("held", "name"),
    [(None, "torch"), ("torch", "torch"), ("openvino f32", "openvino f32"), ("openvino bf16", "openvino bf16")],
)
def test_a_job_keeps_what_it_began_with_but_a_fresh_one(held, name, conditions, tmp_path):
    _holds(conditions["job"], held)
    assert choose_runtime(BOTH, VERSION, tmp_path, runtime="auto", now=Conditions(**conditions)).name == name
    assert (
        choose_runtime(BOTH, VERSION, tmp_path, runtime="auto", now=Conditions(**conditions, fresh=True)).name
        == "openvino bf16"
    )


def test_a_job_of_a_twin_that_is_gone_is_not_said_to_be_without_reason(conditions, tmp_path, caplog):
    _holds(conditions["job"], "openvino bf16")
    with caplog.at_level("INFO", "scoring"):
        chosen = choose_runtime(_registry(_twin("f32", 2)), VERSION, tmp_path, runtime="auto", now=Conditions(**conditions))
    # The manifest then refuses it.
    assert chosen.name == "torch"
    assert "the scoring in the folder began as openvino bf16, which this version has no more" in caplog.text


def test_a_damaged_manifest_is_said_where_the_folder_is_claimed(conditions, tmp_path):
    conditions["job"].mkdir()
    (conditions["job"] / MANIFEST).write_text(json.dumps({"format": 9}))
    assert choose_runtime(BOTH, VERSION, tmp_path, runtime="auto", now=Conditions(**conditions)).name == "openvino bf16"


def test_the_saved_folder_of_a_twin_runs_as_it_is(conditions, tmp_path):
    folder = tmp_path / "twin"
    version = Resolved(str(folder), folder=folder)
    assert choose_runtime(BOTH, version, folder, runtime="auto", now=Conditions(**conditions)) == Chosen(
        folder, "openvino bf16"
    )
    for runtime, change in (("torch", {}), ("auto", {"precision": "16-mixed"}), ("auto", {"device": "cuda"})):
        with pytest.raises(RegistryError, match="a twin, which OpenVINO alone runs"):
            choose_runtime(BOTH, version, folder, runtime=runtime, now=Conditions(**{**conditions, **change}))
    with pytest.raises(RegistryError, match="a saved folder has no twins"):
        choose_runtime(BOTH, Resolved("m", folder=tmp_path), tmp_path, runtime="openvino", now=Conditions(**conditions))


def test_threads_are_those_of_torch_and_of_what_reads_the_environment(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    before = torch.get_num_threads()
    try:
        devices.set_threads(2)
        assert (os.environ["OMP_NUM_THREADS"], torch.get_num_threads()) == ("2", 2)
    finally:
        torch.set_num_threads(before)


def test_without_torch_there_is_the_cpu_alone(monkeypatch):
    monkeypatch.setattr(devices, "find_spec", lambda name: None)
    assert [devices.pick_device(d) for d in ("auto", "cpu")] == ["cpu", "cpu"]
    with pytest.raises(ModelError, match="PyTorch is not installed"):
        devices.pick_device("cuda")


@pytest.mark.parametrize("found", [MlflowException("denied"), RegistryError("the store is away")])
def test_a_twin_that_cannot_be_deleted_hinders_nothing(found, caplog):
    def refuses(*_):
        raise found

    client = SimpleNamespace(delete_logged_model=refuses)
    registry = SimpleNamespace(search_versions=lambda condition: [], client=client)
    delete_unnamed(registry, "twin_f32", _twin("f32", 2).model_dump_json())
    assert "twin_f32: m-f32, which no version names any more, is not deleted" in caplog.text
    # A text that names none deletes nothing.
    delete_unnamed(registry, "twin_f32", "{")
