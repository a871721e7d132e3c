"""Weights for Detectron2's networks: its model zoo, its .pth and .pkl files, ours; pickled code is never run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from models.engines.detectron2.predictor import require_detectron2
from models.errors import ModelError, one_line
from models.saved.allowed_files import WEIGHTS_FILE
from models.saved.checkpoints import download_error, load_safely
from models.saved.safe_pickle import read_pickled_arrays


def load_initial(model: nn.Module, weights: str, config: str, cfg: Any) -> None:
    """Start a network from weights; tensors that do not fit (a head of other classes) keep their fresh values.

    Args:
        weights: ``none``; ``zoo``, the whole network of ``config`` in Detectron2's model
            zoo; ``imagenet``, the backbone that the config names; a URL; or a local
            .pth, .pkl, .safetensors or saved folder.

    Raises:
        ModelError: absent, offline, damaged, a pickle with code in it, or nothing fits.
    """
    source = weights_source(weights, config, cfg)
    if not source:
        return
    missing, _ = load_file(model, source)
    # Buffers do not count: Detectron2 fills in those of its frozen BatchNorm by itself.
    if {name for name, _ in model.named_parameters()} <= set(missing):
        raise ModelError(f"weights {weights}: no tensor fits this network")


def load_whole(model: nn.Module, path: str) -> None:
    """Load a checkpoint that must hold exactly this network.

    Raises:
        ModelError: a tensor is missing, too much, or of another shape.
    """
    missing, unexpected = load_file(model, path)
    if missing or unexpected:
        first = (missing or unexpected)[0]
        raise ModelError(
            f"weights {path}: not of this network ({len(missing)} tensors missing or of another shape, "
            f"{len(unexpected)} too many; the first: {first}); is the config and its number of classes right?"
        )


def weights_source(weights: str, config: str, cfg: Any) -> str:
    """Resolve ``weights`` for this config to a path or URL; empty for none.

    Raises:
        ModelError: the zoo has no weights for it, or no such file.
    """
    require_detectron2()
    if weights == "none":
        return ""
    if weights == "imagenet":
        return str(cfg.MODEL.WEIGHTS)
    if weights == "zoo":
        try:
            from detectron2 import model_zoo

            return str(model_zoo.get_checkpoint_url(f"{config.removesuffix('.yaml')}.yaml"))
        except ImportError as error:
            raise ModelError(f"Detectron2's model zoo cannot be imported ({error}); pip install 'setuptools<81'") from error
        except RuntimeError as error:
            raise ModelError(f"weights zoo: Detectron2's model zoo has none for {config}") from error
    if "://" in weights:
        return weights
    path = Path(weights)
    path = path / WEIGHTS_FILE if path.is_dir() else path
    if not path.is_file():
        raise ModelError(f"weights {weights}: no such file; give zoo, imagenet, none, a URL or a local path")
    return str(path)


def load_file(model: nn.Module, source: str) -> tuple[list[str], list[str]]:
    """Load the weights that fit; return names missing (or of another shape) and names that the network does not have.

    Raises:
        ModelError: cannot be downloaded or read safely.
    """
    checkpointer = safe_checkpointer(model)
    try:
        checkpointer.load(source)
    except ModelError:
        raise
    except Exception as error:
        if "://" in source:
            raise download_error(source, error) from error
        raise ModelError(f"weights {source}: cannot be loaded ({one_line(error, 200)})") from error
    report = checkpointer.incompatible
    return [*report.missing_keys, *(entry[0] for entry in report.incorrect_shapes)], list(report.unexpected_keys)


def safe_checkpointer(model: nn.Module, folder: str = "", *, trainer: Any = None) -> Any:
    """Detectron2's DetectionCheckpointer, which reads no pickle that runs code.

    ``incompatible`` holds fvcore's report of the last load. The state of ``trainer`` is kept in the
    checkpoints too, where it is given.
    """
    from detectron2.checkpoint import DetectionCheckpointer

    class SafeCheckpointer(DetectionCheckpointer):
        incompatible: Any = None

        def _load_file(self, filename: str) -> dict[str, Any]:
            return read_detectron2(filename)

        def _load_model(self, checkpoint: Any) -> Any:
            self.incompatible = super()._load_model(checkpoint)
            return self.incompatible

        def tag_last_checkpoint(self, last_filename_basename: str) -> None:
            # Written beside and renamed: a kill in between must not leave an empty name.
            path = Path(self.save_dir) / "last_checkpoint"
            temporary = path.with_suffix(".tmp")
            temporary.write_text(last_filename_basename)
            temporary.replace(path)

    return SafeCheckpointer(model, folder, **({} if trainer is None else {"trainer": trainer}))


def read_detectron2(filename: str) -> dict[str, Any]:
    """A checkpoint in the form that Detectron2's checkpointer expects of its ``_load_file``.

    Raises:
        ModelError: damaged, or a pickle that calls anything.
    """
    if filename.endswith(".safetensors"):
        from safetensors.torch import load_file as load_tensors

        return {"model": load_tensors(filename)}
    if filename.endswith(".pkl"):
        content = read_pickled_arrays(filename)
        if "model" in content and "__author__" in content:
            return content
        # Caffe2 and Detectron's files: names are matched by Detectron2's heuristics.
        blobs = content.get("blobs", content)
        table = {k: v for k, v in blobs.items() if not k.endswith("_momentum")}
        return {"model": table, "__author__": "Caffe2", "matching_heuristics": True}
    content = load_safely(filename)
    return content if "model" in content else {"model": content}
