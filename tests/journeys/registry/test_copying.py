"""From one environment to the next: copies under another name and on another server."""

from __future__ import annotations

import re

import pytest

pytestmark = pytest.mark.xdist_group("registry")


def test_a_promotion_into_another_environment_copies_the_version_once(team):
    team.register(team.good, "dev.gated")
    done = team.registry("promote", "dev.gated/1", "--to", "prod.gated@production", *team.no_gates)
    assert "dev.gated/1 is prod.gated/1 there" in done.stdout
    assert team.aliases("prod.gated") == {"production": "1"}
    again = team.registry("copy", "dev.gated/1", "prod.gated")
    assert "dev.gated/1 is prod.gated/1" in again.stdout
    assert len(team.client.search_model_versions("name = 'prod.gated'")) == 1
    assert "copied from dev.gated/1" in re.sub(" +", " ", team.registry("show", "prod.gated/1").stdout)
    scored = team.score("--model", "prod.gated/production", "--data", team.data, "--out", "prod")
    assert "prod.gated/1" in scored.stdout


def test_a_copy_on_another_server_is_checked_and_uploaded(team):
    """Another server has nothing of this one."""
    name = team.model("to-be-copied", "good")
    other = f"sqlite:///{team.folder / 'other.db'}"
    team.registry("copy", f"{name}/1", "gated", "--to-server", other)
    there = {**team.env, "MLFLOW_TRACKING_URI": other}
    assert re.search(r"ok +example", team.project.registry("verify", "gated", **there).stdout)


def test_versions_that_nothing_names_are_swept(team):
    for _ in range(3):
        team.register(team.weak, "swept")
    team.promote("swept/1")
    dry = team.registry("gc", "swept", "--keep", "1", "--dry-run").stdout
    assert re.search(r"swept/3 +keep +one of the newest", dry)
    assert re.search(r"swept/2 +delete +nothing names it", dry)
    assert re.search(r"swept/1 +keep +production", dry)
    assert len(team.client.search_model_versions("name = 'swept'")) == 3
    assert "swept/2 deleted" in team.registry("gc", "swept", "--keep", "1", "--yes").stdout
    assert sorted(str(v.version) for v in team.client.search_model_versions("name = 'swept'")) == ["1", "3"]
