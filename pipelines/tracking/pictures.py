"""Pictures of a run by key and step, which MLflow's pages show run beside run."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping

import numpy as np
from mlflow.tracking import MlflowClient

from models.errors import one_line

# Name of the small file beside each picture, written after it (MLflow 3.17).
LOGGED = re.compile(r"images/(.+)\+step\+(\d+)\+timestamp\+.*\+compressed\.webp")

log = logging.getLogger(__name__)


class PictureLog:
    """Logs pictures of one run, each key and step once, though the process that logged it was killed and began again.

    A picture is a file and a small one, which MLflow's pages show: a kill between the two leaves the first one, unused.

    MLflow's log_image may only queue a picture (MLFLOW_ENABLE_ASYNC_LOGGING), and what is queued is lost with the process.
    Here a picture is stored when `log` returns.
    """

    def __init__(self, client: MlflowClient, run_id: str) -> None:
        self._client, self._run_id = client, run_id
        self._known: set[tuple[str, int]] | None = None
        self._given_up = False

    def log(self, pictures: Mapping[str, np.ndarray], step: int = 0) -> None:
        """Log RGB uint8 (H, W, 3) pictures by key; after one that the store does not take, no more.

        A picture is no reason to end a training, so that is said in a warning.
        """
        for key, picture in pictures.items():
            if self._given_up:
                return
            try:
                if (key, step) not in self._logged():
                    self._client.log_image(self._run_id, picture, key=key, step=step, synchronous=True)
                    self._logged().add((key, step))
            except Exception as error:
                # Each kind of store raises its own.
                self._given_up = True
                log.warning(
                    "%s: the store does not take pictures, the run has no more of them (%s)", key, one_line(error, 200)
                )

    def _logged(self) -> set[tuple[str, int]]:
        if self._known is None:
            files = self._client.list_artifacts(self._run_id, "images")
            found = [match for file in files if (match := LOGGED.fullmatch(file.path))]
            self._known = {(match[1].replace("~", "/"), int(match[2])) for match in found}
        return self._known
