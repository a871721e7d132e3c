"""Detectron2's trainer over our data: every course recipe, resume to the bit, two processes, equal AP."""

import json
import math
import signal

import numpy as np
import pytest
import torch

pytest.importorskip("detectron2", reason="Detectron2 is not installed")

from models.errors import ModelError, RecipeError
from models.geometry.rle import rle_decode
from models.instances import Instances
from models.loading import load_model
from models.saved.folder import read_weights
from pipelines.data.readers.opening import open_dataset
from pipelines.evaluation.metrics import coco_results, coco_tables, evaluate_instances
from pipelines.recipes.reading import load_recipe
from pipelines.training.detectron2.trainer import train_detectron2, training_config
from tests.pipelines.test_evaluation import _case

TINY = ["weights=none", "SOLVER.MAX_ITER=2", "INPUT.MIN_SIZE_TRAIN=[96]", "INPUT.MIN_SIZE_TEST=96"]
SMALL = ["SOLVER.MAX_ITER=6", "SOLVER.IMS_PER_BATCH=2", "SOLVER.CHECKPOINT_PERIOD=2", "TEST.EVAL_PERIOD=3", "window=128"]


class Recording:
    """A listener that keeps its notifications, and may stop the training."""

    def __init__(self, stop_at=None):
        self.steps, self.safe, self.begun, self.stop_at = [], 0, None, stop_at
        self.shown = []

    def on_start(self, history, total):
        self.begun = (len(history), total)

    def on_step(self, record):
        self.steps.append(record)
        if record["step"] == self.stop_at:
            signal.raise_signal(signal.SIGINT)

    def on_checkpoint(self, history):
        self.safe = len(history)

    def on_pictures(self, step, pictures):
        self.shown.append((step, *pictures))


@pytest.fixture(scope="module")
def data(airfield):
    return open_dataset(str(airfield), "train"), open_dataset(str(airfield), "test")


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [*(pytest.param(n, marks=pytest.mark.soak) for n in ("course_det_default", "course_det_final")), "course_mask"]
)
def test_every_course_recipe_trains(name, data, tmp_path):
    train, val = data
    recipe = load_recipe(name, TINY)
    listener = Recording()
    saved, outcome = train_detectron2(recipe, train, val, folder=tmp_path / "run", device="cpu", listeners=[listener])
    assert [r["step"] for r in outcome.history] == [1, 2] == [r["step"] for r in listener.steps]
    losses = {k for k in outcome.history[0] if k.startswith("train/loss_")}
    expected = {"train/loss_cls", "train/loss_box_reg", "train/loss_rpn_cls", "train/loss_rpn_loc"}
    assert losses == expected | ({"train/loss_mask"} if name == "course_mask" else set())
    last = outcome.history[-1]
    total = sum(last[k] for k in losses)
    assert last["train/loss"] == pytest.approx(total, rel=1e-4)
    assert {"lr", "seconds/data", "val/AP"} <= set(last)
    assert ("val/mask_AP" in last) == (name == "course_mask")
    instances = load_model(saved).predict([val.samples[0].read()])[0]
    assert (instances.masks is not None) == (name == "course_mask")
    assert json.loads((saved / "model.json").read_text())["engine"] == "detectron2"


@pytest.fixture
def ctrl_c():
    """Ctrl-C as a terminal gives it: a suite started in the background inherits it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("ctrl_c")
def test_a_stopped_training_goes_on_to_the_same_weights(data, tmp_path):
    train, val = data
    recipe = load_recipe("demo_maskrcnn_detectron2", [*SMALL, "augmentation.rotation=30"])
    whole, first = train_detectron2(recipe, train, val, folder=tmp_path / "whole", device="cpu")
    with pytest.raises(KeyboardInterrupt):
        train_detectron2(recipe, train, val, folder=tmp_path / "parts", device="cpu", listeners=[Recording(stop_at=3)])
    assert not (tmp_path / "parts" / "model").exists()
    listener = Recording()
    resumed, second = train_detectron2(recipe, train, val, folder=tmp_path / "parts", device="cpu", listeners=[listener])
    assert listener.begun == (3, 6)
    assert listener.safe == 6
    assert listener.shown == [(6, "validation_sample_1", "validation_sample_2")]
    timeless = [[{k: v for k, v in r.items() if not k.startswith("seconds")} for r in o.history] for o in (first, second)]
    assert timeless[0] == timeless[1]
    a, b = read_weights(whole), read_weights(resumed)
    assert all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.usefixtures("ctrl_c")
def test_a_second_ctrl_c_stops_at_once_and_the_end_is_the_same(data, tmp_path):
    train, _ = data
    recipe = load_recipe("demo_detector_detectron2", [*SMALL, "SOLVER.MAX_ITER=5"])

    class Twice(Recording):
        def on_step(self, record):
            super().on_step(record)
            if record["step"] == self.stop_at:
                signal.raise_signal(signal.SIGINT)

    whole, _ = train_detectron2(recipe, train, None, folder=tmp_path / "whole", device="cpu")
    with pytest.raises(KeyboardInterrupt):
        train_detectron2(recipe, train, None, folder=tmp_path / "parts", device="cpu", listeners=[Twice(stop_at=3)])
    assert sorted(p.name for p in (tmp_path / "parts").glob("model_*")) == ["model_0000001.pth"]
    listener = Recording()
    resumed, _ = train_detectron2(recipe, train, None, folder=tmp_path / "parts", device="cpu", listeners=[listener])
    assert listener.begun == (2, 5)
    a, b = read_weights(whole), read_weights(resumed)
    assert all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.slow
def test_two_processes_share_the_batch(data, tmp_path):
    train, val = data
    recipe = load_recipe("demo_detector_detectron2", [*SMALL, "SOLVER.MAX_ITER=2"])
    listener = Recording()
    saved, outcome = train_detectron2(
        recipe, train, val, folder=tmp_path / "two", device="cpu", listeners=[listener], num_gpus=2
    )
    assert [r["step"] for r in outcome.history] == [1, 2]
    assert all(math.isfinite(r["train/loss"]) for r in outcome.history)
    assert load_model(saved).predict([val.samples[0].read()])
    with pytest.raises(RecipeError, match="more than the 2 images"):
        train_detectron2(recipe, train, val, folder=tmp_path / "three", device="cpu", num_gpus=3)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["SOLVER.BASE_LRR=1"], r"did you mean SOLVER\.BASE_LR"),
        (["INPUT.RANDOM_FLIP=none"], "augmentation.mirror"),
        (["DATASETS.TRAIN=[x]"], "--data"),
        (["MODEL.ROI_HEADS.NUM_CLASSES=80"], "there is one class"),
        (["MODEL.MASK_ON=true"], "train_maskrcnn"),
    ],
)
def test_settings_decided_elsewhere_are_refused(overrides, message, tmp_path):
    with pytest.raises((RecipeError, ModelError), match=message):
        training_config(load_recipe("demo_detector_detectron2", overrides), tmp_path, "cpu")


def test_settings_that_do_not_fit_together_end_in_one_line(data, tmp_path):
    recipe = load_recipe("demo_detector_detectron2", [*SMALL, "MODEL.FPN.IN_FEATURES=[res3,res4]"])
    with pytest.raises(ModelError, match=r"Detectron2 (stopped|cannot build).*"):
        train_detectron2(recipe, *data, folder=tmp_path / "odd", device="cpu")


def test_a_rate_that_explodes_says_what_to_lower(data, tmp_path):
    recipe = load_recipe("demo_detector_detectron2", [*SMALL, "SOLVER.BASE_LR=1e12", "SOLVER.WARMUP_ITERS=0"])
    with pytest.raises(ModelError, match=r"lower SOLVER\.BASE_LR \(now 1e\+12\)"):
        train_detectron2(recipe, *data, folder=tmp_path / "nan", device="cpu")


@pytest.mark.parametrize("paste", [0, 6])
def test_both_engines_see_the_same_augmented_examples(data, paste):
    from pipelines.data.loading.augment import Augmentation
    from pipelines.data.loading.batches import DetectorBatches
    from pipelines.training.detectron2.trainer import _Inputs

    settings = Augmentation(rotation=25, scale=0.3, brightness=0.2, contrast=0.2, saturation=0.3, paste=paste)
    batches = DetectorBatches(data[0], settings, batch_size=2, window=128, focus=0.8, min_visible=0.3, seed=7, masks=True)
    for step in range(4):
        for example, made in zip(batches[step], _Inputs(batches, True, 0, 1)[step], strict=True):
            assert np.array_equal(made["image"].numpy()[::-1].transpose(1, 2, 0), example.image)
            assert np.array_equal(made["instances"].gt_boxes.tensor.numpy(), example.boxes)
            assert np.array_equal(made["instances"].gt_masks.tensor.numpy(), example.masks.astype(bool))
            assert made["instances"].gt_classes.tolist() == [0] * len(example.boxes)


def test_windows_keep_their_scale_in_prediction(tmp_path):
    assert training_config(load_recipe("demo_detector_detectron2"), tmp_path, "cpu").INPUT.MIN_SIZE_TEST == 0
    assert training_config(load_recipe("course_mask"), tmp_path, "cpu").INPUT.MIN_SIZE_TEST == 800


@pytest.mark.parametrize("kind", ["bbox", "segm"])
@pytest.mark.parametrize("seed", range(4))
def test_our_ap_equals_detectron2s_evaluator(seed, kind, tmp_path, monkeypatch):
    from detectron2.data import DatasetCatalog, MetadataCatalog
    from detectron2.data.datasets import register_coco_instances
    from detectron2.evaluation import COCOEvaluator
    from detectron2.structures import Boxes
    from detectron2.structures import Instances as Theirs

    from pipelines.data.dataset import Dataset

    monkeypatch.setattr(Dataset, "digest", lambda self: "0")
    dataset, predictions = _case(seed)
    path = tmp_path / "truth.json"
    content = dataset.to_coco()
    path.write_text(json.dumps({**content, "info": {}}))
    name = f"planes-{kind}-{seed}"
    register_coco_instances(name, {}, str(path), str(tmp_path))
    try:
        DatasetCatalog.get(name)  # registers the numbers of the categories
        evaluator = COCOEvaluator(name, (kind,), False, output_dir=str(tmp_path), use_fast_impl=False)
        evaluator.reset()
        numbers = {s.image_id: i for i, s in enumerate(dataset.samples, start=1)}
        for instances in [p.above(0.05) for p in predictions]:
            evaluator.process(
                [{"image_id": numbers[instances.image_id]}], [{"instances": _theirs(Theirs, Boxes, instances)}]
            )
        theirs = evaluator.evaluate()[kind]
    finally:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)
    ours = evaluate_instances(dataset, predictions, kind).metrics
    for metric, expected in theirs.items():
        value = 100 * ours[metric]
        assert (math.isnan(value) and math.isnan(expected)) or value == pytest.approx(expected, abs=1e-6), metric
    assert coco_results(predictions, numbers, kind)


def _theirs(kind, boxes, instances: Instances):
    made = kind((instances.height, instances.width))
    made.pred_boxes = boxes(torch.from_numpy(instances.boxes))
    made.scores = torch.from_numpy(instances.scores)
    made.pred_classes = torch.from_numpy(instances.labels)
    made.pred_masks = (
        torch.from_numpy(np.stack([rle_decode(m) for m in instances.masks])) if len(instances) else torch.zeros(0)
    )
    return made


def test_the_table_is_printed_as_detectron2_prints_it(monkeypatch):
    from detectron2.utils.logger import create_small_table

    from pipelines.data.dataset import Dataset

    monkeypatch.setattr(Dataset, "digest", lambda self: "0")
    dataset, predictions = _case(1)
    evaluation = evaluate_instances(dataset, predictions, score_threshold=0.6)
    title, *lines = coco_tables(evaluation).splitlines()
    first = {k: 100 * evaluation.metrics[k] for k in ("AP", "AP50", "AP75", "APs", "APm", "APl")}
    assert lines[:3] == create_small_table(first).splitlines()
    assert "score >= 0.6" in title
    assert "maxDets 100" in title
