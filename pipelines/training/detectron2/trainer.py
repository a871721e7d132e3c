"""Training with Detectron2's own trainer, hooks and launcher; it tells the same listeners as our loop."""

from __future__ import annotations

import json
import logging
import os
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from models.engines.detectron2.predictor import Detectron2Predictor, detectron2_spec, has_masks, make_config
from models.engines.detectron2.weights import load_initial, safe_checkpointer
from models.errors import ModelError, PlanesError, RecipeError, one_line
from models.saved.folder import save_model
from models.tiling.predictor import by_tiles
from pipelines.data.dataset import Dataset
from pipelines.data.loading.batches import DetectorBatches, Example
from pipelines.data.loading.unreadable import Unreadable
from pipelines.evaluation.sample_pictures import SamplePictures
from pipelines.recipes.settings import Detectron2Recipe
from pipelines.training.checkpoints import read_best
from pipelines.training.detector import validation_metrics
from pipelines.training.group import check_processes
from pipelines.training.loop import Interrupt, Listener, Outcome, step_loader
from pipelines.training.pictures import VALIDATION_SAMPLE, Pictures
from pipelines.training.synthetic import draw_scenes, drawn_windows

OUTCOME = "outcome.json"
LOG = "detectron2.log"

# Keys that the recipe, the data set or the command line decide here.
DECIDED_ELSEWHERE = {
    "INPUT.RANDOM_FLIP": "augmentation.mirror",
    "INPUT.CROP": "window",
    "INPUT.MASK_FORMAT": "nothing, masks come from the data set",
    "DATASETS": "--data",
    "OUTPUT_DIR": "--work-dir",
    "MODEL.DEVICE": "--device",
    "MODEL.ROI_HEADS.NUM_CLASSES": "nothing, there is one class",
    "MODEL.RETINANET.NUM_CLASSES": "nothing, there is one class",
}


def training_config(recipe: Detectron2Recipe, folder: Path, device: str) -> Any:
    """Detectron2's whole configuration (a CfgNode) of a recipe.

    With ``window`` set, images keep the scale of the windows in prediction too, unless
    ``INPUT.MIN_SIZE_TEST`` is given.

    Raises:
        EngineMissing: Detectron2 is not installed.
        ModelError, RecipeError: settings that cannot be used.
    """
    for key in recipe.opts:
        for taken, instead in DECIDED_ELSEWHERE.items():
            if key == taken or key.startswith(f"{taken}."):
                one = key.endswith("NUM_CLASSES") and recipe.opts[key] == 1
                if not one:
                    raise RecipeError(f"opts {key}: is decided by {instead}")
    cuda = device.startswith("cuda")
    ours: dict[str, Any] = {
        "SEED": 0,
        "SOLVER.CHECKPOINT_PERIOD": 100,
        "DATALOADER.NUM_WORKERS": 4 if cuda else 0,
        # From scratch nothing is worth keeping as it is.
        **({"MODEL.BACKBONE.FREEZE_AT": 0} if recipe.weights == "none" else {}),
        **({"INPUT.MIN_SIZE_TRAIN": [0], "INPUT.MIN_SIZE_TEST": 0} if recipe.window else {}),
    }
    cfg = make_config(recipe.config, {**ours, **recipe.opts}, 1)
    if has_masks(cfg) != (recipe.task == "maskrcnn"):
        what = "makes no masks" if recipe.task == "maskrcnn" else "makes masks: train_maskrcnn, or opts MODEL.MASK_ON False"
        raise RecipeError(f"config {recipe.config}: {what}")
    cfg.MODEL.DEVICE = device
    cfg.OUTPUT_DIR = str(folder)
    return cfg


def train_detectron2(
    recipe: Detectron2Recipe,
    train: Dataset,
    val: Dataset | None,
    *,
    folder: Path,
    device: str,
    listeners: Sequence[Listener] = (),
    num_gpus: int = 1,
) -> tuple[Path, Outcome]:
    """Train (or resume) in ``folder`` and save the chosen weights as ``folder/model``.

    ``num_gpus`` processes are started by Detectron2's launcher and share each batch;
    on the CPU they talk through gloo.

    Raises:
        EngineMissing: Detectron2 is not installed.
        PlanesError: data, settings or weights that cannot be used.
    """
    cfg = training_config(recipe, folder, device)
    check_processes(num_gpus, device, cfg.SOLVER.IMS_PER_BATCH)
    from detectron2.engine import launch

    folder.mkdir(parents=True, exist_ok=True)
    draw_scenes(recipe, folder)
    try:
        with _gpus_hidden(num_gpus > 1 and device == "cpu"):
            launch(_work, num_gpus, dist_url="auto", args=(recipe, train, val, folder, device, listeners))
    except torch.multiprocessing.ProcessRaisedException as error:
        # The child's traceback as text; its last line says what was wrong.
        last = str(error).strip().splitlines()[-1]
        raise ModelError(f"a training process failed: {last[:300]}") from error
    content = json.loads((folder / OUTCOME).read_text())
    return folder / "model", Outcome({}, content["step"], content["best"], content["history"])


@contextmanager
def _gpus_hidden(hide: bool) -> Iterator[None]:
    """Let processes that are started see no GPU: where there is one, the launcher lets them talk through it alone."""
    before = os.environ.get("CUDA_VISIBLE_DEVICES")
    if hide:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    try:
        yield
    finally:
        if hide and before is None:
            del os.environ["CUDA_VISIBLE_DEVICES"]
        elif hide:
            os.environ["CUDA_VISIBLE_DEVICES"] = str(before)


def _work(  # noqa: PLR0917 - the launcher passes them so
    recipe: Detectron2Recipe,
    train: Dataset,
    val: Dataset | None,
    folder: Path,
    device: str,
    listeners: Sequence[Listener],
) -> None:
    """Train in one process of the launcher."""
    from detectron2.utils import comm

    _log_to_file(folder)
    cfg = training_config(recipe, folder, device)
    batches = _batches(recipe, cfg, train)
    # Only one process logs and reports.
    listeners = listeners if comm.is_main_process() else ()
    interrupt = Interrupt(listeners) if comm.get_world_size() == 1 else None
    pictures = SamplePictures(val, crops=False, name=VALIDATION_SAMPLE) if val else None
    try:
        trainer = _make_trainer(
            cfg,
            batches,
            evaluate=_evaluation(recipe, cfg, val, batches.unreadable, pictures),
            pictures=pictures.take if pictures else None,
            listeners=listeners,
            interrupt=interrupt,
        )
        if trainer.checkpointer.has_checkpoint():
            try:
                trainer.resume_or_load(resume=True)
            except Exception as error:
                raise ModelError(f"{folder}: cannot be resumed ({one_line(error, 200)}); train with --fresh") from error
        else:
            load_initial(_bare(trainer.model), recipe.weights, recipe.config, cfg)
        trainer.train()
    except (PlanesError, OSError):
        raise
    except FloatingPointError as error:
        rate = f"now {cfg.SOLVER.BASE_LR:g}"
        raise ModelError(f"{one_line(error, 100)}; lower SOLVER.BASE_LR ({rate}) or raise SOLVER.WARMUP_ITERS") from error
    except Exception as error:
        # Settings that do not fit together come out of Detectron2 as errors of many kinds.
        what = f"{type(error).__name__}: {one_line(error, 160)}"
        raise ModelError(f"Detectron2 stopped ({what}); do the settings fit together? More in {folder / LOG}") from error
    finally:
        if interrupt:
            interrupt.restore()
    if comm.is_main_process():
        _finish(trainer, recipe, cfg, folder)
    comm.synchronize()


def _finish(trainer: Any, recipe: Detectron2Recipe, cfg: Any, folder: Path) -> None:
    recorder = trainer.recorder
    best = recorder.best_step
    weights = _bare(trainer.model).state_dict() if best is None else read_best(folder, best)
    spec = detectron2_spec(
        recipe.config, cfg, [recipe.data.category], tiling=recipe.prediction, rendering=recipe.data.rendering
    )
    save_model(folder / "model", spec, weights)
    content = {"step": best or len(recorder.history), "best": recorder.best, "history": recorder.history}
    (folder / OUTCOME).write_text(json.dumps(content))


def _bare(model: torch.nn.Module) -> torch.nn.Module:
    return model.module if isinstance(model, torch.nn.parallel.DistributedDataParallel) else model


def _evaluation(
    recipe: Detectron2Recipe, cfg: Any, val: Dataset | None, unreadable: Unreadable, pictures: SamplePictures | None
) -> Callable[[torch.nn.Module], dict[str, float]] | None:
    if val is None or not val.planes:
        return None

    def evaluate(model: torch.nn.Module) -> dict[str, float]:
        predictor = by_tiles(Detectron2Predictor(_bare(model), cfg), recipe.prediction, cfg.MODEL.DEVICE)
        return validation_metrics(predictor, val, masks=has_masks(cfg), unreadable=unreadable, pictures=pictures)

    return evaluate


def _batches(recipe: Detectron2Recipe, cfg: Any, train: Dataset) -> DetectorBatches:
    edges = tuple(cfg.INPUT.MIN_SIZE_TRAIN)
    if cfg.INPUT.MIN_SIZE_TRAIN_SAMPLING == "range":
        edges = tuple(range(edges[0], edges[1] + 1))
    return DetectorBatches(
        train,
        recipe.augmentation,
        batch_size=cfg.SOLVER.IMS_PER_BATCH,
        window=recipe.window,
        focus=recipe.focus,
        min_visible=recipe.min_visible,
        seed=recipe.seed,
        zoom=recipe.window_zoom,
        plane_sizes=recipe.plane_sizes,
        masks=has_masks(cfg),
        edges=edges,
        max_edge=cfg.INPUT.MAX_SIZE_TRAIN,
        other=drawn_windows(recipe, Path(cfg.OUTPUT_DIR)),
        unreadable=Unreadable(Path(cfg.OUTPUT_DIR)),
    )


def _log_to_file(folder: Path) -> None:
    """Detectron2's own messages go to a file beside the checkpoints instead of the terminal."""
    for name in ("detectron2", "fvcore"):
        logger = logging.getLogger(name)
        for handler in list(logger.handlers):
            logger.removeHandler(handler)
            handler.close()
        handler = logging.FileHandler(folder / LOG)
        handler.setFormatter(logging.Formatter("%(asctime)s %(name)s %(levelname)s: %(message)s"))
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
        logger.propagate = False


class _Inputs:
    """Batches in the form that Detectron2's networks take, this process's share of each."""

    def __init__(self, batches: DetectorBatches, bgr: bool, rank: int, world: int) -> None:
        self.batches, self.bgr, self.rank, self.world = batches, bgr, rank, world

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, step: int) -> list[dict[str, Any]]:
        return [self._input(e) for e in self.batches.share(step, self.rank, self.world)]

    def _input(self, example: Example) -> dict[str, Any]:
        from detectron2.structures import BitMasks, Boxes, Instances

        image = example.image[:, :, ::-1] if self.bgr else example.image
        height, width = image.shape[:2]
        truth = Instances((height, width))
        truth.gt_boxes = Boxes(torch.from_numpy(np.ascontiguousarray(example.boxes, dtype=np.float32)))
        truth.gt_classes = torch.zeros(len(example.boxes), dtype=torch.int64)
        if example.masks is not None:
            truth.gt_masks = BitMasks(torch.from_numpy(example.masks.astype(bool)))
        tensor = torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))
        return {"image": tensor, "height": height, "width": width, "instances": truth}


class _FromStart:
    """An iterable over the batches that begins where a resumed trainer goes on."""

    def __init__(self, inputs: _Inputs, total: int, workers: int) -> None:
        self.inputs, self.total, self.workers, self.start = inputs, total, workers, 0

    def __iter__(self) -> Iterator[Any]:
        # Begun with the first batch: Detectron2 0.6 of 2021 asks for the iterator before it knows where to go on.
        yield from step_loader(self.inputs, self.start, self.total, self.workers)


def _make_trainer(
    cfg: Any,
    batches: DetectorBatches,
    *,
    evaluate: Callable[[torch.nn.Module], dict[str, float]] | None,
    pictures: Pictures | None,
    listeners: Sequence[Listener],
    interrupt: Interrupt | None,
) -> Any:
    from detectron2.engine import DefaultTrainer, create_ddp_model
    from detectron2.engine.train_loop import TrainerBase
    from detectron2.utils import comm

    from pipelines.training.detectron2.precision import make_stepper

    class PlanesTrainer(DefaultTrainer):
        """Detectron2's default trainer with our batches, evaluation and safe checkpoints."""

        def __init__(self) -> None:
            TrainerBase.__init__(self)
            model = self.build_model(cfg)
            optimizer = self.build_optimizer(cfg, model)
            self.inputs = _FromStart(
                _Inputs(batches, cfg.INPUT.FORMAT == "BGR", comm.get_rank(), comm.get_world_size()),
                cfg.SOLVER.MAX_ITER,
                cfg.DATALOADER.NUM_WORKERS,
            )
            # A module on the CPU takes no device ids, which Detectron2 would give it.
            options = {"device_ids": None} if cfg.MODEL.DEVICE == "cpu" else {}
            model = create_ddp_model(model, broadcast_buffers=False, **options)
            self._trainer = make_stepper(
                model, self.inputs, optimizer, device=cfg.MODEL.DEVICE, mixed=cfg.SOLVER.AMP.ENABLED
            )
            self.scheduler = self.build_lr_scheduler(cfg, optimizer)
            self.checkpointer = safe_checkpointer(model, cfg.OUTPUT_DIR, trainer=weakref.proxy(self))
            self.start_iter, self.max_iter, self.cfg = 0, cfg.SOLVER.MAX_ITER, cfg
            self.register_hooks(self.build_hooks())

        def build_hooks(self) -> list[Any]:
            from pipelines.training.detectron2.hooks import make_hooks

            hooks, self.recorder = make_hooks(
                self,
                Path(cfg.OUTPUT_DIR),
                listeners=listeners,
                evaluate=evaluate,
                pictures=pictures,
                epoch=len(batches),
                interrupt=interrupt,
            )
            return hooks

        def train(self) -> None:
            self.inputs.start = self.start_iter
            TrainerBase.train(self, self.start_iter, self.max_iter)

    torch.manual_seed(max(cfg.SEED, 0))
    return PlanesTrainer()
