"""From a saved folder to a registered version: evaluation, figures, tags, metrics linked to it."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import mlflow
import numpy as np

from models.errors import DataError, one_line
from models.geometry.boxes import crop_window
from models.saved.allowed_files import WEIGHTS_FILE
from models.saved.scores import Scores
from models.saved.spec import read_spec
from pipelines.data.dataset import Dataset
from pipelines.evaluation.metrics import Evaluation, coco_tables
from pipelines.evaluation.sample_images import evaluate_with_sheet
from pipelines.instance_table import write_instances
from pipelines.registry.model_card import write_card
from pipelines.registry.model_versions import Registry
from pipelines.registry.registration import log_and_register
from pipelines.registry.training_images import TrainingImages, images_of
from pipelines.tracking import mlflow_runs
from pipelines.tracking.pictures import PictureLog
from pipelines.use_cases.score_meaning import fit_on, keep_scores, log_scores

log = logging.getLogger(__name__)

# Tag of run and version: "complete", or what went wrong when it was evaluated.
EVALUATION = "evaluation"

# Artefact of a training that is measured on a fold: its predictions for that fold, an instance table.
PREDICTIONS_FILE = "fold_predictions.parquet"

# Side in pixels of the corner that is a detector's example where there are no planes.
CORNER = 128


@dataclass(frozen=True)
class Publication:
    """What to publish.

    Attributes:
        saved: folder of the model.
        name: registered model.
        example: RGB uint8 image (H, W, 3), logged as the input example.
        train: what it was trained on; None where nobody knows.
        val: what it was validated on.
        test: what it is measured on.
        tags: of the version.
        register: add a version; otherwise the model is logged alone.
        trained_on: the images that decided its weights, where they are not those of ``train`` and ``val``.
        scores: what its scores mean, where that is known; else it is found out on ``val``.
        keep_predictions: log the predictions for ``test``, as `PREDICTIONS_FILE`.
    """

    saved: Path
    name: str
    example: np.ndarray
    train: Dataset | None = None
    val: Dataset | None = None
    test: Dataset | None = None
    tags: Mapping[str, str] = field(default_factory=dict)
    register: bool = True
    trained_on: TrainingImages | None = None
    scores: Scores | None = None
    keep_predictions: bool = False


def publish(registry: Registry, what: Publication, run_id: str, *, device: str) -> tuple[str | None, dict[str, float]]:
    """Evaluate on validation and test, register, log metrics linked to the version, into the active run.

    Returns:
        The version (None where it is not registered) and the test metrics.

    Raises:
        PlanesError: the store refuses; or, once the version is registered, its evaluation failed.
    """
    results, failed = _evaluate(registry, what, run_id, device)
    tested = [(p.removeprefix("test/"), e) for p, e, d in results if d is what.test]
    metrics = {prefix + k: v for prefix, e in tested for k, v in e.finite().items()}
    tags = {**_tags(what, metrics), **what.tags, EVALUATION: failed or "not logged yet"}
    trained_on = what.trained_on or (images_of(what.train, what.val) if what.train else None)
    version, model_id = log_and_register(
        registry,
        what.saved,
        what.name,
        example=what.example,
        tags=tags,
        run_id=run_id,
        register=what.register,
        trained_on=trained_on,
    )
    for prefix, evaluation, dataset in results:
        mlflow_runs.log_evaluation(prefix, evaluation, dataset, model_id=model_id)
    for _, evaluation in tested:
        if "max_dets" in evaluation.settings:
            log.info(coco_tables(evaluation))
    number = str(version.version) if version else None
    label = f"{what.name}/{number}" if number else model_id
    mlflow.set_tags({"version": label, EVALUATION: failed or "complete"})
    if version is not None:
        # One that an earlier call registered, whose evaluation failed then, has other numbers now.
        registry.set_tags(version, {"metrics": tags["metrics"], EVALUATION: failed or "complete"})
        write_card(registry, version, read_spec(what.saved))
    if failed:
        raise DataError(f"{label} is registered, but its evaluation failed ({failed}); the same command evaluates it again")
    return number, metrics


def _evaluate(
    registry: Registry, what: Publication, run_id: str, device: str
) -> tuple[list[tuple[str, Evaluation, Dataset]], str]:
    """(metric prefix, evaluation, data set) of validation and test, and what went wrong, in a line."""
    results: list[tuple[str, Evaluation, Dataset]] = []
    failed = []
    scores = what.scores
    if scores is not None:
        keep_scores(what.saved, scores)
    for dataset, prefix in ((what.val, "val/best_"), (what.test, "test/")):
        if dataset is None:
            continue
        try:
            evaluations, sheet, predictions, pictures = evaluate_with_sheet(what.saved, dataset, device)
            results += [(prefix + p, e, dataset) for p, e in evaluations]
            if dataset is what.test:
                PictureLog(registry.client, run_id).log(pictures)
            if sheet is not None:
                mlflow.log_image(sheet, f"figures/{dataset.split}_samples.png")
            if dataset is what.val and scores is None:
                scores = fit_on(what.saved, dataset, predictions, f"validation, {len(dataset)} images")
            known = scores or read_spec(what.saved).scores
            if known is not None and (dataset is what.test or what.test is None):
                log_scores(known, dataset, predictions, prefix)
            if dataset is what.test and what.keep_predictions:
                with tempfile.TemporaryDirectory() as work:
                    write_instances(predictions, Path(work) / PREDICTIONS_FILE)
                    mlflow.log_artifact(str(Path(work) / PREDICTIONS_FILE))
        except Exception as error:
            # Whatever it is, hours of training must not be lost for it.
            if os.environ.get("PLANES_TRACEBACK"):
                raise
            failed.append(f"{dataset.name}/{dataset.split}: {one_line(error, 300)}")
    return results, "; ".join(failed)


def _tags(what: Publication, metrics: dict[str, float]) -> dict[str, str]:
    return {
        **mlflow_runs.source_tags(),
        **_threshold(what.saved),
        "data": f"{what.train.name}/{what.train.split}" if what.train else "unknown",
        "data_digest": what.train.digest() if what.train else "unknown",
        "test_digest": what.test.digest() if what.test else "none",
        "metrics": json.dumps({k: round(v, 4) for k, v in metrics.items()}),
        "weights_sha256": weights_digest(what.saved),
        "engine": read_spec(what.saved).engine,
    }


def _threshold(saved: Path) -> dict[str, str]:
    scores = read_spec(saved).scores
    return {} if scores is None else {"suggested_score_threshold": f"{scores.threshold:.4f}"}


def weights_digest(folder: Path) -> str:
    """sha256 of a saved folder's weights; of a composition, of its parts' weights one after the other."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob(WEIGHTS_FILE)):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def example_image(kind: str, dataset: Dataset) -> np.ndarray:
    """A small input: a plane's crop for a segmenter, a corner with a plane for a detector.

    A detector's is a corner without one where no image with a plane can be read.

    Raises:
        DataError: no image can be read, or for a segmenter none with a plane.
    """
    samples = [s for s in dataset.samples if len(s.boxes)]
    if kind != "segmenter":
        samples += [s for s in dataset.samples if not len(s.boxes)]
    margin = 0.0 if kind == "segmenter" else 0.5
    for sample in samples:
        try:
            image = sample.read()
        except Exception:
            # A decoder may raise anything on a damaged file, and whoever evaluates says what is wrong with it.
            continue
        if not len(sample.boxes):
            return image[:CORNER, :CORNER]
        x1, y1, x2, y2 = crop_window(sample.boxes[0], sample.height, sample.width, margin)
        return image[y1:y2, x1:x2]
    which = "image with a plane" if kind == "segmenter" else "image"
    raise DataError(
        f"{dataset.name}/{dataset.split}: no {which} can be read; an example of the input is registered with a version"
    )
