"""Promotions that race or are killed: exactly one wins, and the alias is the old or the new version.

A few rounds here, and thirty in `make soak`.
"""

from __future__ import annotations

import random
import time

import pytest

from tests.journeys.conftest import error_line

pytestmark = pytest.mark.xdist_group("registry")

ROUNDS = pytest.mark.parametrize("rounds", [2, pytest.param(30, marks=pytest.mark.soak)])


def _start(team, version):
    return team.project.start("planes-registry", "promote", version, "--to", "production", *team.no_gates, **team.env)


@ROUNDS
def test_of_two_promotions_at_once_exactly_one_wins(team, rounds):
    """Rounds in which both decided before either moved; rounds in which one came later are played again."""
    name = team.model(f"race-{rounds}", "weak", "weak")
    contested = 0
    for _ in range(3 * rounds):
        known = team.entries(name)
        # Both from the same place, which is neither of them.
        if "production" in team.aliases(name):
            team.client.delete_registered_model_alias(name, "production")
        both = [_start(team, f"{name}/{version}") for version in "12"]
        done = [one.wait() for one in both]
        fresh = [e for e in team.entries(name) if e["number"] > max([k["number"] for k in known], default=0)]
        holder = team.aliases(name)["production"]
        if sorted(e["state"] for e in fresh) == ["committed", "superseded"]:
            contested += 1
            winner = next(e for e in fresh if e["state"] == "committed")["move"]["to"]
            assert holder == winner
            assert [d.returncode for d in done] == [int(v != winner) for v in "12"]
            loser = done["12".index("1" if winner == "2" else "2")]
            assert f"production was moved to version {winner} by" in error_line(loser)
            assert f"{name}/{winner} is production now" in done["12".index(winner)].stdout
        else:
            # One saw what the other had done.
            assert [d.returncode for d in done] == [0, 0], [d.stderr for d in done]
            assert [e["state"] for e in fresh] == ["committed", "committed"]
            assert holder == fresh[-1]["move"]["to"]
        if contested == rounds:
            break
    assert contested == rounds


@ROUNDS
def test_a_promotion_killed_at_any_moment_leaves_the_old_or_the_new_version(team, rounds):
    """Kills until a sixth of them fell between entry and end; the history tells, the next promotion goes on."""
    name = team.model(f"killed-{rounds}", "weak", "weak")
    team.promote(f"{name}/1")
    started = time.monotonic()
    assert _start(team, f"{name}/2").wait().returncode == 0
    usual = time.monotonic() - started
    kills = interrupted = 0
    order = random.Random(7)
    while (kills < rounds or interrupted < rounds // 5) and kills < 5 * rounds:
        before = team.aliases(name)["production"]
        after = "1" if before == "2" else "2"
        running = _start(team, f"{name}/{after}")
        time.sleep(order.uniform(0.3, 1.05) * usual)
        running.kill()
        done = running.wait()
        assert done.returncode in (-9, 0)
        kills += done.returncode == -9
        now = team.aliases(name)["production"]
        assert now in (before, after)
        last = team.entries(name)[-1]
        assert last["state"] in ("pending", "committed")
        assert now == last["move"]["to"] or last["state"] == "pending"
        if last["state"] == "pending":
            interrupted += 1
            assert "the last move was interrupted" in team.registry("history", name).stdout
            again = team.promote(f"{name}/{after}")
            assert "finished a move that was interrupted" in again.stdout
            assert team.aliases(name)["production"] == after
    assert kills >= rounds
    assert interrupted >= rounds // 5
    assert {e["state"] for e in team.entries(name)} <= {"committed", "superseded"}
