"""Trainings that start from a registered version or a file: what is loaded, logged, told, and told apart."""

from __future__ import annotations

import hashlib
from dataclasses import replace

import pytest
import torch

from models.engines.torchvision.network import build_detector
from models.errors import ModelError, RegistryError
from models.saved.checkpoints import load_matching
from models.saved.folder import read_weights
from pipelines.data.readers.opening import open_dataset
from pipelines.recipes.reading import load_recipe
from pipelines.registry.lineage import lineage, read_training_images
from pipelines.registry.model_versions import Registry
from pipelines.registry.training_images import images_of
from pipelines.use_cases.ablate import ablate
from pipelines.use_cases.requests import AblationRequest, TrainingRequest
from pipelines.use_cases.search import search
from pipelines.use_cases.starting_weights import starting_weights
from pipelines.use_cases.training import TrainingData, plan_training, train
from tests.pipelines.test_repeated import SMALL_COURSE
from tests.stores import working_in

# One store for all of them.
pytestmark = pytest.mark.xdist_group("starts")

UNET = ("training.steps=2", "training.batch_size=2", "architecture.crop_size=32", "training.epochs=null")
# So small that nothing changes: what a version holds is what it started from.
STILL = (*UNET, "optimizer.lr=1e-12", "optimizer.weight_decay=0", "training.steps=1", "training.ema=0")


@pytest.fixture(scope="module")
def registry(tmp_path_factory):
    """A store in the working folder, in which planes-unet/1 is."""
    with working_in(tmp_path_factory.mktemp("starts")) as registry:
        yield registry


def _request(airfield, **changes):
    settings = {
        "task": "unet",
        "recipe": "demo_unet",
        "register_as": "planes-unet",
        "overrides": UNET,
        "device": "cpu",
        "reuse": True,
    }
    return TrainingRequest(data=str(airfield), work_dir="work", **{**settings, **changes})


@pytest.fixture(scope="module")
def base(registry, airfield):
    trained = train(registry, _request(airfield))
    registry.set_alias("planes-unet", "production", trained.version)
    return trained


def _weights(registry, name):
    return read_weights(registry.fetch(registry.resolve(name)))


def _start(request, weights):
    return replace(request, overrides=(*request.overrides, f"weights={weights}"))


def test_a_training_goes_on_from_a_registered_version(registry, airfield, base):
    request = _start(_request(airfield, overrides=STILL), "models:/planes-unet@production")
    trained = train(registry, request)
    assert trained.version == "2"
    first, second = _weights(registry, "planes-unet/1"), _weights(registry, "planes-unet/2")
    learnt = [k for k in first if "running" not in k and "num_batches" not in k]
    assert all(torch.allclose(first[k], second[k], atol=1e-6) for k in learnt)
    run = registry.client.get_run(trained.run_id)
    assert run.data.params["weights"] == "models:/planes-unet/1"
    assert run.data.tags["starts_from"] == "planes-unet/1"
    (model_input,) = run.inputs.model_inputs
    assert model_input.model_id == registry.resolve("planes-unet/1").model_id
    version = registry.client.get_model_version("planes-unet", "2")
    assert version.tags["starts_from"] == "planes-unet/1"
    assert "**Starts from**: planes-unet/1" in version.description
    assert lineage(registry, registry.resolve("planes-unet/2"))["starts from"] == "planes-unet/1"
    # Under its number or under an alias it is the same start, and the same training.
    again = train(registry, _start(_request(airfield, overrides=STILL), "models:/planes-unet/1"))
    assert (again.version, again.reused) == ("2", True)


def test_the_images_of_the_start_are_known_and_told_where_they_are_measured_on(registry, airfield, base, caplog):
    everything = open_dataset(str(airfield), "train+test")
    half = everything.subset([s.image_id for s in everything.samples[::2]], "train")
    held = everything.subset([s.image_id for s in everything.samples[1:4:2]], "test")
    plan = plan_training(
        _start(_request(airfield), "models:/planes-unet/1"),
        lambda recipe: TrainingData(half, None, held),
        registry=registry,
    )
    known = read_training_images(registry, registry.resolve("planes-unet/1"))
    shared = known.shared_with(held)
    assert len(shared) == 2
    (record,) = [r for r in caplog.records if r.levelname == "WARNING"]
    assert record.message == (
        f"weights models:/planes-unet/1: were trained or validated on 2 of the 2 test images (such as {shared[0]}), "
        "so that test metrics are too good"
    )
    caplog.clear()
    other = train(registry, _start(_request(airfield, overrides=STILL), "models:/planes-unet/1"))
    assert not [r for r in caplog.records if r.levelname == "WARNING"]
    of_both = read_training_images(registry, registry.resolve(f"planes-unet/{other.version}"))
    assert of_both.images.items() >= known.images.items()
    assert not of_both.unknown
    assert plan.start.images.images == known.images
    assert set(images_of(half).images) - set(known.images), "half has images that the version does not know"


def test_another_file_under_the_same_name_is_another_training(registry, airfield, base, tmp_path):
    path = tmp_path / "mine.pth"
    weights = _weights(registry, "planes-unet/1")
    torch.save(weights, path)
    request = _start(_request(airfield, overrides=STILL, register_as="of-file"), path)
    first = train(registry, request)
    assert train(registry, request).reused
    assert read_training_images(registry, registry.resolve("of-file/1")).unknown == [f"weights {path}"]
    torch.save({k: v + 1 if v.is_floating_point() else v for k, v in weights.items()}, path)
    other = train(registry, request)
    assert (first.version, other.version, other.reused) == ("1", "2", False)
    name = next(k for k, v in weights.items() if v.dim() == 4)
    torch.testing.assert_close(_weights(registry, "of-file/2")[name], weights[name] + 1, atol=1e-5, rtol=0)


def test_a_saved_folder_is_a_start(registry, airfield, base):
    folder = registry.fetch(registry.resolve("planes-unet/1"))
    start = plan_training(_start(_request(airfield), folder)).start
    content = (folder / "weights.safetensors").read_bytes()
    assert (start.local, start.digest) == (str(folder), hashlib.sha256(content).hexdigest())


def test_names_of_libraries_and_addresses_are_no_files():
    """What they stand for is known when they are loaded; of an address nobody knows what it was trained on."""
    kept = []
    for recipe, name in (
        ("detector", "coco"),
        ("detector", "imagenet"),
        ("unet", "noisy-student"),
        ("demo_unet", "none"),
        ("course_det_final", "zoo"),
        ("course_det_final", "https://example.org/model.pkl"),
    ):
        start = starting_weights(load_recipe(recipe, [f"weights={name}"]))
        kept.append((start.local, start.digest, start.images.unknown))
    assert kept[:-1] == [(name, "", []) for name in ("coco", "imagenet", "noisy-student", "none", "zoo")]
    assert kept[-1] == ("https://example.org/model.pkl", "", ["weights https://example.org/model.pkl"])


def test_a_start_whose_images_cannot_be_read_is_one_of_which_nothing_is_known(
    registry, airfield, base, monkeypatch, caplog
):
    def refused(*given):
        raise RegistryError("trained_on.json: no such list")

    monkeypatch.setattr("pipelines.use_cases.starting_weights.read_training_images", refused)
    plan = plan_training(_start(_request(airfield), "models:/planes-unet/1"), registry=registry)
    assert plan.start.images.unknown == ["weights models:/planes-unet/1"]
    assert "what they were trained on cannot be read (trained_on.json: no such list)" in caplog.text


@pytest.mark.parametrize(
    ("weights", "error", "message"),
    [
        (
            "missing.pth",
            ModelError,
            r"^weights missing\.pth: no such file; give a local path, models:/NAME/VERSION, none, or",
        ),
        ("models:/planes-unet/7", RegistryError, r"has no version, alias or stage '7'"),
        ("models:/planes-none/1", RegistryError, r"planes-none"),
    ],
)
def test_a_start_that_is_none_is_said_before_anything_is_written(weights, error, message, registry, airfield, base):
    runs = len(registry.client.search_runs(["0"]))
    with pytest.raises(error, match=message):
        train(registry, _start(_request(airfield, register_as="nothing"), weights))
    assert len(registry.client.search_runs(["0"])) == runs


def test_a_version_of_another_engine_is_refused(registry, airfield, base):
    for recipe, task in (("demo_detector", "detector"), ("demo_maskrcnn", "maskrcnn")):
        request = TrainingRequest(task=task, recipe=recipe, data=str(airfield), register_as="x", device="cpu")
        said = rf"^weights models:/planes-unet/1: a model of smp; recipe {recipe} trains one of torchvision$"
        with pytest.raises(ModelError, match=said):
            plan_training(_start(request, "models:/planes-unet/1"), registry=registry)


def test_detectron2_starts_from_a_version_too(registry, airfield):
    pytest.importorskip("detectron2", reason="Detectron2 is not installed")
    request = TrainingRequest(
        task="detector",
        recipe="course_det_final",
        data=str(airfield),
        register_as="d2",
        device="cpu",
        work_dir="work",
        overrides=(*SMALL_COURSE["course_det_final"], "weights=none", "SOLVER.BASE_LR=1e-12", "SOLVER.WEIGHT_DECAY=0"),
    )
    train(registry, request)
    train(registry, _start(request, "models:/d2/1"))
    first, second = _weights(registry, "d2/1"), _weights(registry, "d2/2")
    assert all(torch.allclose(first[k], second[k], atol=1e-5) for k in first if "running" not in k)


def test_versions_are_those_of_the_registry_that_is_given(registry, airfield, base, monkeypatch):
    """Not of the one that the environment names."""
    monkeypatch.setattr(Registry, "connect", None)
    name = "weights=models:/planes-unet/1"
    assert train(registry, _request(airfield, register_as="one", overrides=(*STILL, name))).version == "1"
    settings = {"recipe": "demo_unet", "data": str(airfield), "device": "cpu", "task": "unet", "work_dir": "work"}
    settings |= {"overrides": (*STILL, name)}
    first, second = ablate(registry, AblationRequest(name="seeds", grid=("lr=1e-9,2e-9",), **settings))
    settings["overrides"] = (*STILL, name, "data.val_fraction=0.3")
    (trial,) = search(registry, AblationRequest(name="tuned", grid=("lr=1e-9..1e-8",), search=1, **settings))
    assert [r.run.data.tags["starts_from"] for r in (first, second, trial)] == ["planes-unet/1"] * 3


def test_weights_that_fit_in_part_say_so(caplog):
    small = load_recipe("demo_detector", ["architecture.fpn_channels=32", "architecture.head_channels=64"]).architecture
    network, other = build_detector(small, 1), build_detector(small, 3)
    caplog.set_level("INFO")
    left = load_matching(network, other.state_dict(), "three.pth")
    assert left == 4
    count = len(network.state_dict())
    first = "roi_heads.box_predictor.cls_score.weight, roi_heads.box_predictor.cls_score.bias"
    assert [(r.levelname, r.message) for r in caplog.records] == [
        (
            "INFO",
            f"weights three.pth: {count - 4} of {count} tensors fit; drawn anew: {first}, "
            "roi_heads.box_predictor.bbox_pred.weight ...",
        )
    ]
    caplog.clear()
    assert load_matching(network, network.state_dict(), "same.pth") == 0
    assert not caplog.records
    one = {"backbone.body.conv1.weight": network.state_dict()["backbone.body.conv1.weight"]}
    load_matching(network, one, "one.pth")
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert f"weights one.pth: only 1 of {count} tensors fit" in record.message
