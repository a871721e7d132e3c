"""A detector version and a segmenter version composed into an instance segmenter version."""

from __future__ import annotations

import hashlib
import json
import logging
import tempfile
from collections.abc import Mapping
from pathlib import Path

from models.engines.composed import ComposedArchitecture, save_composed
from models.runtime.devices import pick_device
from models.saved.spec import read_spec
from pipelines.data.readers.opening import open_dataset
from pipelines.registry.lineage import read_training_images
from pipelines.registry.model_versions import Registry, Resolved
from pipelines.registry.registration import check_name
from pipelines.registry.training_images import TrainingImages, united
from pipelines.tracking import mlflow_runs
from pipelines.use_cases.publishing import Publication, example_image, publish
from pipelines.use_cases.requests import WORK_DIR, ComposeRequest
from pipelines.use_cases.training import open_test, source_digest

log = logging.getLogger(__name__)


def compose(registry: Registry, request: ComposeRequest) -> str:
    """Compose, evaluate on the test split where there is one, register; returns ``name/version``.

    Raises:
        PlanesError: components, data or store that cannot be used.
    """
    check_name(request.name)
    components = {"detector": registry.resolve(request.detector), "segmenter": registry.resolve(request.segmenter)}
    named = {role: component.label for role, component in components.items()}
    folders = {role: registry.fetch(component) for role, component in components.items()}
    category = read_spec(folders["detector"]).classes[0]
    test = open_test(request.data, category, None)
    key = _key(request, named, test.digest() if test else "", source_digest())
    known = registry.find_trained(request.name, key) if request.reuse else None
    if known is not None:
        log.info(f"{request.name}: version {known.version} is this composition; reused")
        return f"{request.name}/{known.version}"
    device = pick_device(request.device)
    architecture = ComposedArchitecture(overlaps=request.overlaps, min_score=request.min_score)
    Path(WORK_DIR).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=WORK_DIR) as work:
        saved = save_composed(
            Path(work) / "model", folders["detector"], folders["segmenter"], architecture=architecture, components=named
        )
        title = f"{request.name} {named['detector']} + {named['segmenter']}"
        with mlflow_runs.tracked_run(registry.client, title, {"task": "compose", **named}) as run:
            mlflow_runs.log_params({**request.__dict__, **named, "device": device})
            for component in components.values():
                mlflow_runs.link_model(component.model_id)
            if test is not None:
                mlflow_runs.log_dataset(test, "test")
            example_from = (test or open_dataset(request.data, "train", category=category)).rendered(
                read_spec(saved).rendering
            )
            tags = {**named, "training_key": key}
            example, known_images = example_image("detector", example_from), _training_images(registry, components)
            what = Publication(saved, request.name, example, test=test, tags=tags, trained_on=known_images)
            version, metrics = publish(registry, what, run.info.run_id, device=device)
    value = f"test mask_AP {metrics['mask_AP']:.3f}" if "mask_AP" in metrics else "no test set with outlines"
    log.info(f"{request.name} version {version} from {named['detector']} and {named['segmenter']}: {value}")
    log.info(f"MLflow UI: {mlflow_runs.ui_link(registry.client, run.info.run_id)}")
    return f"{request.name}/{version}"


def _training_images(registry: Registry, components: Mapping[str, Resolved]) -> TrainingImages:
    """What both components were trained on."""
    return united(
        {f"{role} {component.label}": read_training_images(registry, component) for role, component in components.items()}
    )


def _key(request: ComposeRequest, named: dict[str, str], *more: str) -> str:
    """Digest of components, settings, test data and code: what makes two compositions equal."""
    content = [sorted(named.items()), request.overlaps, request.min_score, *more]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:12]
