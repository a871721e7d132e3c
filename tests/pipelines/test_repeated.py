"""Folds and seeds: what was held back is measured, what was done is not done again, spreads are those of the runs."""

from __future__ import annotations

import csv
import io
import json
from collections import Counter
from dataclasses import replace

import mlflow
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from mlflow.artifacts import load_text

from models.engines.torchvision.network import build_detector
from models.errors import ModelError, RecipeError, RegistryError
from models.instances import Instances, from_rows
from models.saved.spec import read_spec
from pipelines import ablation
from pipelines.data.readers.opening import open_dataset
from pipelines.data.scene_groups import scene_folds
from pipelines.evaluation.metrics import evaluate_instances
from pipelines.instance_table import write_instances
from pipelines.recipes.reading import load_recipe
from pipelines.registry.gates import parse_gates
from pipelines.registry.model_versions import GROUP
from pipelines.tracking import mlflow_runs
from pipelines.use_cases import ablate as use_case
from pipelines.use_cases import promote as promotion
from pipelines.use_cases.ablate import AblationRequest, ablate, plan_ablation
from pipelines.use_cases.out_of_fold import log_out_of_fold, read_scores
from pipelines.use_cases.requests import PromotionRequest, TrainingRequest
from pipelines.use_cases.training import train
from tests.stores import working_in

# One process makes what these tests share.
pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("repeated")]

TINY = ("training.steps=3", "training.batch_size=2", "window=128", "architecture.max_detections=20", "data.val_fraction=0")
TINY_UNET = ("training.steps=3", "training.batch_size=2", "data.val_fraction=0")


@pytest.fixture(scope="module")
def registry(tmp_path_factory):
    """A store in the working folder."""
    with working_in(tmp_path_factory.mktemp("repeated")) as registry:
        yield registry


def _request(airfield, **changes):
    settings = {"recipe": "demo_detector", "name": "planes-det", "overrides": TINY, "device": "cpu", "register": True}
    return AblationRequest(data=str(airfield), work_dir="work", **{**settings, **changes})


def _parent(registry, results):
    run = registry.client.get_run(results[0].run.info.run_id)
    return registry.client.get_run(run.data.tags["mlflow.parentRunId"])


def _rows(run, name):
    return list(csv.DictReader(io.StringIO(load_text(f"{run.info.artifact_uri}/{name}"))))


@pytest.fixture(scope="module")
def folded(registry, airfield):
    """A detector over three folds; the second training failed at first and was made up for."""
    request = _request(airfield, folds=3)
    real, calls = use_case.run_plan, []

    def fails_once(registry, plan, display, listeners):
        calls.append(plan.request.tags)
        if len(calls) == 2:
            raise ModelError("broken")
        return real(registry, plan, display, listeners)

    seen = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(use_case, "run_plan", fails_once)
        patch.setattr(use_case, "_say_what_next", lambda plan, results, parent: seen.append(results))
        with pytest.raises(
            ModelError, match=r"1 of 3 trainings failed .first: broken.; the same command does what is missing"
        ):
            ablate(registry, request)
        first = seen[0]
        assert [r.error for r in first] == ["", "broken", ""]
        assert not [k for k in _parent(registry, first).data.metrics if k.startswith("out_of_fold")]
        again = ablate(registry, request)
    # Only the one that failed is trained again.
    assert [c["fold"] for c in calls] == ["1/3", "2/3", "3/3", "2/3"]
    return again


def test_every_image_is_predicted_by_the_training_that_never_saw_it(registry, airfield, folded, tmp_path):
    parent = _parent(registry, folded)
    path = mlflow.artifacts.download_artifacts(
        run_id=parent.info.run_id, artifact_path="out_of_fold.parquet", dst_path=str(tmp_path)
    )
    rows = pq.read_table(path).to_pylist()
    everything = open_dataset(airfield, "train+test")
    folds = {}
    for result in folded:
        inputs = {
            i.dataset.name.split("/")[1]: i for i in registry.client.get_run(result.run.info.run_id).inputs.dataset_inputs
        }
        fold = plan_ablation(_request(airfield, folds=3)).trainings[result.member.fold - 1][2].data
        assert set(inputs) == {"train", f"fold-{result.member.fold}"}
        assert inputs["train"].dataset.digest == fold.train.digest()
        held_out, seen = ({s.image_id for s in part.samples} for part in (fold.test, fold.train))
        assert held_out | seen == {s.image_id for s in everything.samples}
        assert not held_out & seen
        folds |= dict.fromkeys(held_out, result.member.fold)
    assert set(folds) == {s.image_id for s in everything.samples}
    assert {r["image_id"]: r["fold"] for r in rows}.items() <= folds.items()
    # The metrics of all folds together are those of the table.
    expected = evaluate_instances(everything, from_rows(rows)).finite()
    assert {k: parent.data.metrics[f"out_of_fold/{k}"] for k in expected} == pytest.approx(expected, abs=1e-6)
    scenes = _rows(parent, "scenes.csv")
    assert Counter(r["scene"] for r in scenes) == Counter({s.scene for s in everything.samples})
    assert sum(int(r["planes"]) for r in scenes) == everything.planes
    assert [float(r["AP50"]) for r in scenes] == sorted(float(r["AP50"]) for r in scenes)
    figures = {f.path for f in registry.client.list_artifacts(parent.info.run_id, "figures")}
    assert figures == {"figures/scenes.png", "figures/spread.png"}


def test_folds_have_their_mean_and_deviation_and_no_version(registry, folded):
    parent = _parent(registry, folded)
    values = [r.run.data.metrics["test/AP"] for r in folded]
    assert parent.data.metrics["mean/test/AP"] == pytest.approx(np.mean(values))
    assert parent.data.metrics["sd/test/AP"] == pytest.approx(np.std(values, ddof=1))
    assert [(r["fold"], r["seed"]) for r in _rows(parent, "trainings.csv")] == [("1", "0"), ("2", "0"), ("3", "0")]
    assert not [m for m in registry.client.search_registered_models() if m.name == "planes-det"]
    assert parent.info.run_name == "train demo_detector: 3 folds"


@pytest.fixture(scope="module")
def seeded(registry, airfield):
    """A U-Net of two seeds: its request and results."""
    request = _request(airfield, recipe="demo_unet", name="planes-unet", overrides=(*TINY_UNET, "seed=4"), seeds=2)
    return request, ablate(registry, request)


def test_each_seed_becomes_a_version_and_all_of_them_a_spread(registry, seeded, monkeypatch, caplog):
    caplog.set_level("INFO")
    request, results = seeded
    assert [(r.member.seed, r.version) for r in results] == [(4, "1"), (5, "2")]
    assert [r.run.data.params["training.seed"] for r in results] == ["4", "5"]
    versions = [registry.client.get_model_version("planes-unet", v) for v in "12"]
    assert [v.tags["seed"] for v in versions] == ["4", "5"]
    parent = _parent(registry, results)
    values = [r.run.data.metrics["test/IoU"] for r in results]
    assert values[0] != values[1]
    assert parent.data.metrics["mean/test/IoU"] == pytest.approx(np.mean(values))
    assert parent.data.metrics["sd/test/IoU"] == pytest.approx(np.std(values, ddof=1))
    # The same again trains nothing and knows the versions.
    again = ablate(registry, request)
    assert [(r.run.info.run_id, r.version) for r in again] == [(r.run.info.run_id, r.version) for r in results]
    assert len(registry.search_versions("name = 'planes-unet'")) == 2
    assert "as a group: planes-unet/1..2" in caplog.text
    # Nor does it where MLflow's runner has opened a run for it, however often.
    monkeypatch.setattr(use_case, "run_plan", None)
    for _ in range(2):
        given = registry.client.create_run(parent.info.experiment_id)
        monkeypatch.setenv("MLFLOW_RUN_ID", given.info.run_id)
        assert [r.run.info.run_id for r in ablate(registry, request)] == [r.run.info.run_id for r in results]
        assert registry.client.get_run(given.info.run_id).data.tags["same_as"] == parent.info.run_id


def test_variants_are_held_against_their_noise(registry, airfield):
    request = _request(
        airfield,
        recipe="demo_unet",
        name="abl",
        overrides=TINY_UNET,
        seeds=2,
        variants=("lr=0.001; lr=0.002",),
        register=False,
    )
    results = ablate(registry, request)
    assert [(r.variant.label, r.member.label) for r in results] == [
        ("lr=0.001", "seed 0"), ("lr=0.001", "seed 1"), ("lr=0.002", "seed 0"), ("lr=0.002", "seed 1"),
    ]  # fmt: skip
    rows = _rows(_parent(registry, results), "ablation.csv")
    for row, pair in zip(rows, (results[:2], results[2:]), strict=True):
        values = [r.run.data.metrics["test/IoU"] for r in pair]
        assert float(row["test/IoU"]) == pytest.approx(np.mean(values))
        assert float(row["test/IoU_sd"]) == pytest.approx(np.std(values, ddof=1))
        assert row["trainings"] == "2"
    verdicts = [row["against the best"] for row in rows]
    assert "the best" in verdicts
    assert all(v == "the best" or v.endswith(("inside the noise", "beyond the noise")) for v in verdicts)


@pytest.mark.parametrize(
    ("changes", "said"), [({"folds": 1}, "--folds takes 2 or more"), ({"seeds": 0}, "--seeds 1 or more")]
)
def test_mistakes_are_said(airfield, changes, said):
    with pytest.raises(RecipeError, match=said):
        plan_ablation(_request(airfield, **changes))


def test_all_splits_with_truth_are_parted_and_the_recipe_s_own_seed_comes_first(airfield):
    plan = plan_ablation(_request(airfield, folds=2, seeds=2, overrides=(*TINY, "seed=7")))
    assert [m.label for _, m, _ in plan.trainings] == [
        "fold 1/2 seed 7", "fold 2/2 seed 7", "fold 1/2 seed 8", "fold 2/2 seed 8",
    ]  # fmt: skip
    assert len(plan.everything) == 7
    assert len({p.key for _, _, p in plan.trainings}) == 4
    assert ablation.members(3, 1, 0) == [ablation.Member(3)]


def test_a_group_is_named_by_its_first_and_last_version_and_promoted_by_its_median(registry, seeded):
    known = registry.client
    for name in ("grp",):
        known.create_registered_model(name)
    version = registry.search_versions("name = 'planes-unet'")[0]
    for value in (0.7, 0.9, 0.8):
        known.create_model_version(
            "grp", version.source, version.run_id, tags={"metrics": f'{{"IoU": {value}}}', GROUP: "k"}
        )
    assert registry.group("grp/1..3") == ["grp/1", "grp/2", "grp/3"]
    assert registry.group("models:/grp/2..9") == ["grp/2", "grp/3"]
    assert registry.group("grp/2") == ["grp/2"]
    assert registry.group("grp/3,1") == registry.group("grp/1,3..3") == ["grp/1", "grp/3"]
    with pytest.raises(RegistryError, match=r"no version of grp among 7\.\.9"):
        registry.group("grp/7..9")
    # A seed that was trained again counts once, by its newest version, or by the one that is asked about.
    assert [v.label for v in promotion._of_one_group(registry, registry.resolve("planes-unet/1"))] == [
        "planes-unet/1", "planes-unet/2",
    ]  # fmt: skip
    first = registry.version_of(registry.resolve("planes-unet/1"))
    again = known.create_model_version("planes-unet", first.source, first.run_id, tags=first.tags)
    for asked, expected in (("2", {"2", again.version}), ("1", {"1", "2"})):
        group = promotion._of_one_group(registry, registry.resolve(f"planes-unet/{asked}"))
        assert {v.version for v in group} == {str(n) for n in expected}
    known.delete_model_version("planes-unet", str(again.version))
    members = [registry.resolve(one) for one in registry.group("grp/1..3")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(promotion, "main_metric", lambda registry, version: "IoU")
        assert promotion._median(registry, members).label == "grp/3"
        assert promotion._median(registry, members[:2]).label == "grp/1"
    assert promotion._of_one_group(registry, members[0])[0].label == "grp/1"
    assert promotion._of_one_group(registry, registry.resolve("planes-unet/1"))[0].name == "planes-unet"


def test_a_group_passes_its_gates_by_its_seeds(registry, airfield, seeded, caplog):
    caplog.set_level("INFO")
    gates = parse_gates({"data": [], "gates": {"production": {"metrics": {"IoU": {"min_gain": 0}}}}}, "gates")
    request = PromotionRequest(model="planes-unet/1..2", data=(str(airfield),), device="cpu", dry_run=True)
    assert promotion.promote(registry, request, given=gates).passed
    registry.set_alias("planes-unet", "production", "1")
    verdict = promotion.promote(registry, replace(request, model="planes-unet/2..2"), given=gates)
    assert not [c for c in verdict.checks if c.gate == "IoU gain over seeds"]
    with pytest.raises(RegistryError, match="holds planes-unet/1, which is production; name those"):
        promotion.promote(registry, request, given=gates)
    # A copy of the first as baseline: the two of the group are held against it.
    first = registry.version_of(registry.resolve("planes-unet/1"))
    copy = registry.client.create_model_version("planes-unet", first.source, first.run_id, tags={"seed": "9"})
    registry.set_alias("planes-unet", "production", str(copy.version))
    verdict = promotion.promote(registry, request, given=gates)
    (check,) = [c for c in verdict.checks if c.gate == "IoU gain over seeds"]
    values = [json.loads(registry.version_of(registry.resolve(f"planes-unet/{n}")).tags["metrics"])["IoU"] for n in (1, 2)]
    assert check.candidate.startswith(f"{np.mean(values):.3f} ± {np.std(values, ddof=1):.3f} (2)")
    assert not check.passed
    # A seed that was trained again counts once.
    tags = registry.version_of(registry.resolve("planes-unet/2")).tags
    again = registry.client.create_model_version("planes-unet", first.source, first.run_id, tags=tags)
    members = [registry.resolve(f"planes-unet/{n}") for n in (1, 2, again.version)]
    assert [v.version for v in promotion._newest_of_each_seed(registry, members)] == ["1", str(again.version)]
    registry.client.delete_registered_model_alias("planes-unet", "production")
    for version in (copy, again):
        registry.client.delete_model_version("planes-unet", str(version.version))


def test_what_scores_mean_is_known_by_folds_and_goes_to_a_version(registry, airfield, monkeypatch, tmp_path):
    data = open_dataset(airfield, "train+test")
    rng = np.random.default_rng(0)

    def guess(sample):
        wrong = rng.uniform(0, 200, (12, 4)) + [0, 0, 210, 210]
        scores = [*rng.uniform(0.4, 1, len(sample.boxes)), *rng.uniform(0.05, 0.7, 12)]
        return Instances.make(sample.image_id, sample.height, sample.width, np.concatenate([sample.boxes, wrong]), scores)

    folds, results = scene_folds(data, 3), []
    with mlflow_runs.tracked_run(registry.client, "parent", {}) as parent:
        for number, fold in enumerate(folds, start=1):
            run = registry.client.create_run(parent.info.experiment_id)
            write_instances([guess(s) for s in fold.samples], tmp_path / "fold_predictions.parquet")
            registry.client.log_artifact(run.info.run_id, str(tmp_path / "fold_predictions.parquet"))
            registry.client.log_metric(run.info.run_id, "test/AP", 0.5)
            run = registry.client.get_run(run.info.run_id)
            results.append(ablation.Result(ablation.AS_THE_RECIPE, run, "", ablation.Member(0, number, 3)))
        by_seed = log_out_of_fold(results, data, "detector")
    logged = registry.client.get_run(parent.info.run_id).data.metrics
    names = ("calibration_error", "calibration_error_calibrated", "precision_at_0.5", "recall_at_suggested")
    assert all(logged[f"out_of_fold/{k}"] == pytest.approx(by_seed["0"][k]) for k in names)
    assert by_seed["0"]["calibration_error_calibrated"] < by_seed["0"]["calibration_error"]
    scores = read_scores(registry, parent.info.run_id)
    assert 0.3 < scores.threshold < 0.8
    assert parent.info.run_id in scores.fitted_on
    with pytest.raises(RegistryError, match=r"holds no scores\.json; give the parent run of a training with --folds"):
        read_scores(registry, results[0].run.info.run_id)
    # A version that is trained without validation gets them.
    request = TrainingRequest(
        task="detector", recipe="demo_detector", data=str(airfield), register_as="calibrated", device="cpu",
        overrides=TINY, work_dir="work", scores_from=parent.info.run_id,
    )  # fmt: skip
    trained = train(registry, request)
    version = registry.resolve(f"calibrated/{trained.version}")
    assert read_spec(registry.fetch(version)).scores == scores
    assert registry.version_of(version).tags["suggested_score_threshold"] == f"{scores.threshold:.4f}"
    metrics = registry.client.get_run(trained.run_id).data.metrics
    assert metrics["suggested_score_threshold"] == pytest.approx(scores.threshold)
    assert "test/calibration_error" in metrics or not metrics["test/AP"]
    assert registry.fetch(version)


SMALL_COURSE = {
    "course_det_final_torchvision": (
        "architecture.backbone=resnet18", "architecture.min_size=96", "architecture.max_size=160",
        "architecture.fpn_channels=8", "architecture.head_channels=8", "architecture.max_detections=10",
        "training.steps=2", "training.batch_size=2", "training.evaluate_every=2",
    ),
    "course_det_final": (
        "MODEL.RESNETS.DEPTH=18", "MODEL.RESNETS.NUM_GROUPS=1", "MODEL.RESNETS.WIDTH_PER_GROUP=64",
        "MODEL.RESNETS.RES2_OUT_CHANNELS=64", "MODEL.FPN.OUT_CHANNELS=8", "MODEL.ROI_BOX_HEAD.FC_DIM=8",
        "SOLVER.MAX_ITER=2",
        "SOLVER.IMS_PER_BATCH=2", "INPUT.MIN_SIZE_TRAIN=[96]", "INPUT.MIN_SIZE_TEST=96", "TEST.EVAL_PERIOD=2",
        "TEST.DETECTIONS_PER_IMAGE=10",
    ),
}  # fmt: skip


@pytest.mark.parametrize(
    "recipe", ["course_det_final_torchvision", pytest.param("course_det_final", marks=pytest.mark.soak)]
)
def test_course_recipes_with_weights_of_a_file_have_folds_and_seeds(registry, airfield, tmp_path, recipe):
    """The same recipes, tiny; the weights are those of a network of that form."""
    overrides = SMALL_COURSE[recipe]
    engine = load_recipe(recipe).engine
    if engine == "detectron2":
        pytest.importorskip("detectron2", reason="Detectron2 is not installed")
        from detectron2.modeling import build_model

        from pipelines.training.detectron2.trainer import training_config

        plain = load_recipe(recipe, (*overrides, "weights=none"))
        network = build_model(training_config(plain, tmp_path / "cfg", "cpu"))
    else:
        network = build_detector(load_recipe(recipe, overrides).architecture, 1)
    torch.save({"model": network.state_dict()}, tmp_path / "own.pth")
    request = _request(
        airfield, recipe=recipe, name="course", folds=2, seeds=2, overrides=(*overrides, f"weights={tmp_path / 'own.pth'}")
    )
    results = ablate(registry, request)
    assert [(r.member.label, r.error) for r in results] == [
        ("fold 1/2 seed 0", ""), ("fold 2/2 seed 0", ""), ("fold 1/2 seed 1", ""), ("fold 2/2 seed 1", ""),
    ]  # fmt: skip
    assert {r.run.data.params["weights"] for r in results} == {str(tmp_path / "own.pth")}
    assert {r.run.data.tags["engine"] for r in results} == {engine}
    metrics = _parent(registry, results).data.metrics
    assert {"mean/test/AP", "sd/test/AP", "out_of_fold/AP", "out_of_fold_sd/AP"} <= set(metrics)
