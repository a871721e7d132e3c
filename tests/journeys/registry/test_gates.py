"""Gates decide about a promotion, and what they decided is recorded on the version and as a run."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from pipelines.data.readers.opening import open_dataset
from tests.journeys.registry.conftest import gates_on

pytestmark = pytest.mark.xdist_group("registry")


@pytest.fixture
def strict(team):
    """A gates' file in which every kind of gate has its say."""
    full = gates_on(
        team,
        metrics={"IoU": {"minimum": 0.1, "min_gain": 0, "confidence": 0.6}},
        slices={"small planes": {"size": "small", "max_loss": 0.05}, "one image": {"images": "A0005", "max_loss": 0.5}},
        max_slowdown=20,
        max_size=1.5,
        max_megabytes=100,
        min_planes=5,
    )
    return team.gates("strict", full)


def test_a_failed_gate_moves_nothing(team, strict):
    name = team.model("gates-failed", "weak")
    for more in ((), ("--dry-run",)):
        done = team.registry("promote", name, "1", "--to", "production", "--gates", strict, *more, code=2)
        assert re.search(r"FAIL +IoU +airfield/test +>= 0.1 +0\.0", done.stdout)
        assert re.search(r"pass +planes +airfield/test +>= 5 +15", done.stdout)
        assert f"{name}/1 {'would not be' if more else 'not'} promoted to production: IoU 0.0" in done.stdout
    assert team.aliases(name) == {}


def test_force_moves_it_and_keeps_the_reason(team, strict):
    name = team.model("gates-forced", "weak")
    weak = ("promote", name, "1", "--to", "production", "--gates", strict)
    assert "--force needs --reason TEXT" in team.registry(*weak, "--force", code=2).stderr
    forced = team.registry(*weak, "--force", "--reason", "the first one, for the pipeline")
    assert f"{name}/1 is production now: the first one, for the pipeline (failed: IoU" in forced.stdout
    assert team.aliases(name) == {"production": "1"}
    assert f"{name}/1 is production already" in team.registry("promote", f"{name}/1", "--to", "Production").stdout


def test_a_tie_is_no_gain(team):
    name = team.model("gates-tie", "weak", "weak")
    team.promote(f"{name}/1")
    gain = team.gates("gain", gates_on(team, metrics={"IoU": {"min_gain": 0}}))
    tie = team.registry("promote", f"{name}/2", "--to", "production", "--gates", gain, code=2)
    assert "IoU gain" in tie.stdout
    assert team.aliases(name) == {"production": "1"}


def test_a_challenger_stands_beside_production(team, strict):
    name = team.model("gates-challenger", "weak", "weak", "good")
    team.promote(f"{name}/1")
    challenger = team.registry("promote", f"{name}/3", "--to", "challenger", "--gates", strict)
    assert f"{name}/3 against {name}/1" in challenger.stdout
    assert team.aliases(name) == {"production": "1", "challenger": "3"}
    models = ("--model", f"{name}/production", "--model", f"{name}@challenger")
    both = team.score(*models, "--data", team.data, "--out", "both")
    assert re.search(rf"{name}/1 .*\n.*{name}/3 ", both.stdout)


def test_a_promotion_is_recorded_on_the_version_and_as_a_run(team, strict):
    name = team.model("gates-won", "weak", "weak", "good")
    team.promote(f"{name}/1")
    promote = ("promote", f"{name}/3", "--to", "production", "--gates", strict)
    dry = team.registry(*promote, "--dry-run")
    assert f"{name}/3 would be promoted to production: 10 gates passed" in dry.stdout
    assert team.aliases(name) == {"production": "1"}
    won = team.registry(*promote, "--reason", "sharper outlines")
    assert "FAIL" not in won.stdout
    assert re.search(r"pass +IoU gain, confidence +airfield/test +>= 0.6 +1\.0000", won.stdout)
    assert team.aliases(name) == {"production": "3", "previous": "1"}

    # Aliases and MLflow's old stages agree.
    stages = {str(v.version): v.current_stage for v in team.client.search_model_versions(f"name = '{name}'")}
    assert stages == {"1": "Archived", "2": "None", "3": "Production"}
    tags = team.client.get_model_version(name, "3").tags
    who = team.env.get("MLFLOW_TRACKING_USERNAME", tags["promoted_to_production_by"])
    assert (tags["promoted_to_production"], tags["promoted_to_production_from"]) == ("sharper outlines", "1")
    assert tags["promoted_to_production_by"] == who != ""
    run = team.client.get_run(tags["promoted_to_production_run"])
    assert (run.data.tags["decision"], run.data.params["baseline"]) == ("promoted", f"{name}/1")
    assert run.data.metrics["candidate/IoU"] > run.data.metrics["baseline/IoU"]
    checks = Path(team.client.download_artifacts(run.info.run_id, "checks.txt", str(team.folder))).read_text()
    assert checks.strip() in won.stdout
    assert "pass IoU gain" in re.sub(" +", " ", team.registry("show", f"{name}/3").stdout)


def test_required_data_is_a_gate(team):
    name = team.model("gates-data", "good")
    assert re.search(r"tested on +digest none\n", team.registry("show", f"{name}/1").stdout)
    required = {"path": team.data, "split": "test", "digest": "f" * 16}
    content = {"data": [required], "gates": {"production": {"min_planes": 1}}}
    promote = ("promote", f"{name}/1", "--to", "production")
    done = team.registry(*promote, "--gates", team.gates("data", content), "--dry-run", code=2)
    assert re.search(r"FAIL +data set +\S+/test +f{16} +not evaluated", done.stdout)
    digest = open_dataset(team.data, "test").digest()
    required["digest"] = digest
    done = team.registry(*promote, "--gates", team.gates("data", content), "--dry-run")
    assert re.search(rf"pass +data set +\S+/test +{digest} +there", done.stdout)


def test_a_version_is_not_promoted_on_its_training_set(team):
    digest = open_dataset(team.data, "test").digest()
    name = team.model("gates-cheat", "good", tags={"data_digest": digest})
    content = {"data": [{"path": team.data, "split": "test", "digest": digest}], "gates": {"production": {"min_planes": 1}}}
    done = team.registry("promote", f"{name}/1", "--to", "production", "--gates", team.gates("cheat", content), code=2)
    assert re.search(r"FAIL +images +airfield/test +none trained on +it is the training set", done.stdout)
