"""The share of images that may fail: exit code 3 above it, not at it."""

from pathlib import Path

import pytest
from click.testing import CliRunner

from pipelines.registry.model_versions import Registry
from scoring import use_cases
from scoring.cli import main
from scoring.jobs.job import JobResult


@pytest.mark.parametrize(
    ("failures", "most", "code"),
    [((0,), "0", 0), ((1,), "0", 3), ((1,), "0.05", 0), ((2,), "0.05", 3), ((0, 2), "0.05", 3), ((19,), None, 0)],
)
def test_exit_code(tmp_path, monkeypatch, failures, most, code):
    jobs = [JobResult("m/1", Path("m-1"), images=20 - n, instances=0, failures=n, seconds=1.0) for n in failures]
    monkeypatch.setattr(Registry, "connect", lambda: None)
    monkeypatch.setattr(use_cases, "score", lambda *_: jobs)
    arguments = ["--model", "m/1", "--data", str(tmp_path), "--out", str(tmp_path / "out")]
    done = CliRunner().invoke(main, [*arguments, *(["--max-errors", most] if most else [])])
    assert (done.exit_code, "more than --max-errors allows" in done.stderr) == (code, code == 3)
