"""A process of its own that quantises a saved network: ``python -m ... KIND NETWORK INPUTS INTO``.

OpenVINO 2026.4 crashes now and then (a segmentation fault in one of some ten runs) while NNCF collects what the
layers of a detector give for inputs of any size; here that costs another try, not the work of whoever asked.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np

from models.engines.openvino.dense import is_dense
from models.engines.openvino.telemetry import opt_out
from models.errors import one_line


def quantise(kind: str, network_file: str, inputs: str, into: str) -> None:
    """Quantise the dense layers of a network and save it.

    Args:
        kind: of the model; of a segmenter every layer is quantised that can be.
        network_file: OpenVINO's XML.
        inputs: folder of ``.npz`` files, each with the arrays of one call, in order.
        into: the XML to write.
    """
    opt_out()
    import nncf
    import openvino

    network = openvino.Core().read_model(network_file)
    # Layers of one module share a name, and NNCF knows them by it.
    for number, layer in enumerate(network.get_ops()):
        layer.set_friendly_name(f"{layer.get_friendly_name()}#{number}")
    exact = [] if kind == "segmenter" else [layer.get_friendly_name() for layer in network.get_ops() if _exact(layer)]
    files = sorted(Path(inputs).glob("*.npz"))
    nncf.set_log_level(40)
    quantised = nncf.quantize(
        network,
        nncf.Dataset(files, _arrays),
        preset=nncf.QuantizationPreset.MIXED,
        subset_size=len(files),
        ignored_scope=nncf.IgnoredScope(names=exact, validate=False),
    )
    openvino.save_model(quantised, into, compress_to_fp16=False)


def _arrays(path: Path) -> dict[int, np.ndarray]:
    with np.load(path) as content:
        return dict(enumerate(content[name] for name in content.files))


def _exact(layer: Any) -> bool:
    """Whether a layer of a detector stays as it is: the geometry of boxes."""
    if layer.get_type_name() in ("Constant", "Parameter", "Result"):
        return False
    return not is_dense(layer.get_friendly_name(), layer.get_type_name())


if __name__ == "__main__":
    try:
        quantise(*sys.argv[1:])
    except Exception as error:
        sys.exit(one_line(error, 300))
