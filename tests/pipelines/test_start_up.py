"""What commands do to start and end sooner, and that it is undone where it must be."""

from __future__ import annotations

import atexit
import gc
import os

import pytest

from pipelines.start_up import importing, prepare_command
from pipelines.steps.cli_support import friendly


def test_garbage_is_collected_again_after_imports():
    assert gc.isenabled()
    with importing():
        assert not gc.isenabled()
        with importing():
            pass
        assert not gc.isenabled()
    assert gc.isenabled()
    with pytest.raises(ImportError), importing():
        raise ImportError
    assert gc.isenabled()


@pytest.mark.parametrize("given", [None, "false"])
def test_a_command_sends_no_telemetry_unless_asked_to(given, monkeypatch):
    monkeypatch.delenv("MLFLOW_DISABLE_TELEMETRY", raising=False)
    if given is not None:
        monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", given)
    at_exit = []
    monkeypatch.setattr(atexit, "register", at_exit.append)
    prepare_command.cache_clear()
    try:
        # What the command itself sees: MLflow reads it when it is imported.
        seen = friendly(lambda: os.environ.get("MLFLOW_DISABLE_TELEMETRY"))()
        friendly(lambda: None)()
    finally:
        prepare_command.cache_clear()
    assert seen == (given or "true")
    assert at_exit == [gc.freeze]
