"""Requests of a training; light, so that commands can be read before the libraries are loaded."""

from __future__ import annotations

from dataclasses import dataclass

WORK_DIR = ".planes/training"


@dataclass(frozen=True, kw_only=True)
class TrainingRequest:
    """What to train, on what, and where to register it.

    task: unet, detector or maskrcnn; recipe: name or path of a YAML file; data: data folder, COCO JSON or
    course JSON; register_as: registered model to add a version to; device: auto, cpu, cuda or cuda:N;
    overrides: ``section.key=value`` of the recipe; engine: detection library, None for the recipe's;
    work_dir: where checkpoints are kept; reuse: take the version of an equal training, if there is one;
    fresh: throw away an unfinished equal training; num_gpus: processes that Detectron2 starts;
    register: add a version, else log the model alone; label: what the run is called beside the model.
    """

    task: str
    recipe: str
    data: str
    register_as: str
    device: str = "auto"
    overrides: tuple[str, ...] = ()
    engine: str | None = None
    work_dir: str = WORK_DIR
    reuse: bool = False
    fresh: bool = False
    num_gpus: int = 1
    register: bool = True
    label: str = ""
