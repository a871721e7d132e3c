"""The journal: who was first, what an interruption leaves behind at each single step, and the way back."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

import mlflow
import numpy as np
import pytest
from mlflow.tracking import MlflowClient

from models.engines.unet.predictor import build_segmenter, segmenter_spec
from models.engines.unet.settings import SegmenterArchitecture
from models.errors import RegistryError
from models.saved.folder import save_model
from pipelines.registry import journal, lineage, promotion
from pipelines.registry.gates import Check
from pipelines.registry.model_versions import Registry
from pipelines.registry.registration import log_and_register
from pipelines.steps.alias_commands import tell_history
from pipelines.steps.inspect_commands import list_versions
from pipelines.tracking import mlflow_runs
from pipelines.use_cases.promote import show_checks
from tests.stores import new_store

NAME = "planes-x"
WRITES = (
    "create_registered_model",
    "create_model_version",
    "set_model_version_tag",
    "set_registered_model_alias",
    "set_registered_model_tag",
    "delete_registered_model_alias",
    "transition_model_version_stage",
)


@pytest.fixture(scope="module")
def registered(tmp_path_factory):
    """The file of a store with versions 1, 2, 3 of one saved folder."""
    folder = tmp_path_factory.mktemp("registered")
    made = Registry.connect(new_store(folder / "mlflow.db"))
    made.client.create_experiment("planes", artifact_location=(folder / "artefacts").as_uri())
    architecture = SegmenterArchitecture(network="skipnet", crop_size=64)
    weights = build_segmenter(architecture).state_dict()
    saved = save_model(folder / "m", segmenter_spec(architecture, ["plane"]), weights)
    with mlflow_runs.tracked_run(made.client, "run", {}) as run:
        first, _ = log_and_register(
            made, saved, NAME, example=np.zeros((64, 64, 3), np.uint8), tags={}, run_id=run.info.run_id
        )
    with mlflow_runs.addressed(made.client):
        for _ in range(2):
            made.client.create_model_version(NAME, first.source, run_id=run.info.run_id, tags=first.tags)
    return folder / "mlflow.db"


@pytest.fixture
def registry(registered, tmp_path):
    """A real SQLite store with those versions, whose files lie beside the first one."""
    made = Registry.connect(f"sqlite:///{shutil.copy(registered, tmp_path / 'mlflow.db')}")
    # Tests make versions past this project too.
    with mlflow_runs.addressed(made.client):
        yield made


@pytest.fixture
def client(registry):
    """The client of that store."""
    return registry.client


def _move(registry, to, kind="promote", at=None, why="better"):
    at = at or promotion.read_alias_state(registry, NAME, "production")
    return promotion.move(registry, at, to, kind, why)


def _aliases(registry):
    return registry.aliases_of(NAME)


def test_tables_show_texts_that_look_like_numbers_as_they_are(registry, client, monkeypatch, capsys):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", registry.uri)
    for version in "123":
        client.set_model_version_tag(NAME, version, "data_digest", "12345e12")
        client.set_model_version_tag(NAME, version, "git_commit", "1234e056")
    _move(registry, "1", why="1e5")
    tell_history(NAME, None, as_json=False)
    assert re.search(r" 1e5\n", capsys.readouterr().out)
    list_versions([NAME], as_json=False)
    assert len(re.findall(r" 12345e12 +1234e056\n", capsys.readouterr().out)) == 3
    check = Check("AP", "data", ">= 0.300", "0.650", "0.600", True)
    assert show_checks([check]).split()[-4:] == [">=", "0.300", "0.650", "0.600"]


def test_promotions_pile_up_and_rollbacks_take_them_off(registry, client):
    for version in "123":
        _move(registry, version)
    assert _aliases(registry) == {"production": "3", "previous": "2"}
    tags = client.get_model_version(NAME, "3").tags
    assert (tags["promoted_to_production"], tags["promoted_to_production_from"]) == ("better", "2")
    assert tags["promoted_to_production_by"] == journal.whoami()
    for back, below in (("2", "1"), ("1", None)):
        at = promotion.read_alias_state(registry, NAME, "production")
        assert promotion.rollback_target(registry, at) == back
        _move(registry, back, "rollback", at)
        assert _aliases(registry).get("previous") == below
    with pytest.raises(RegistryError, match="no version is known that was production before; give --version"):
        promotion.rollback_target(registry, promotion.read_alias_state(registry, NAME, "production"))
    assert [e.state for e in journal.read_journal(registry, NAME)] == ["committed"] * 5


def test_a_rollback_to_a_version_that_stood_there_twice_takes_one_promotion_off(registry, client):
    for version in "1213":
        _move(registry, version)
    _move(registry, "1", "rollback")
    assert _aliases(registry) == {"production": "1", "previous": "2"}
    assert promotion.rollback_target(registry, promotion.read_alias_state(registry, NAME, "production")) == "2"


def test_the_second_of_two_that_decided_at_once_is_told_who_won(registry, client):
    _move(registry, "1")
    first, second = (
        promotion.read_alias_state(registry, NAME, "production"),
        promotion.read_alias_state(registry, NAME, "production"),
    )
    _move(registry, "2", at=first)
    with pytest.raises(RegistryError, match=r"was moved to version 2 by .* meanwhile \(better\).*decide again"):
        _move(registry, "3", at=second)
    assert _aliases(registry) == {"production": "2", "previous": "1"}
    assert [e.state for e in journal.read_journal(registry, NAME)] == ["committed", "committed", "superseded"]
    # Aliases do not disturb each other.
    promotion.move(registry, promotion.read_alias_state(registry, NAME, "challenger"), "3", "promote", "new")
    assert _aliases(registry)["challenger"] == "3"


def test_of_several_moves_since_the_one_that_took_the_place_is_told(registry, client):
    _move(registry, "1")
    at = promotion.read_alias_state(registry, NAME, "production")
    _move(registry, "2", why="faster")
    _move(registry, "1", "rollback", why="too fast")
    with pytest.raises(RegistryError, match=r"was moved to version 2 by .* meanwhile \(faster\)"):
        _move(registry, "3", at=at)


def test_a_challenger_that_wins_is_no_challenger_any_more(registry, client):
    _move(registry, "1")
    promotion.move(registry, promotion.read_alias_state(registry, NAME, "challenger"), "3", "promote", "new")
    _move(registry, "3")
    assert _aliases(registry) == {"production": "3", "previous": "1"}


def test_moves_past_the_journal_are_seen_and_not_undone(registry, client):
    _move(registry, "1")
    at = promotion.read_alias_state(registry, NAME, "production")
    client.set_registered_model_alias(NAME, "production", "3")
    with pytest.raises(RegistryError, match="moved to version 3 past planes-registry meanwhile"):
        _move(registry, "2", at=at)
    assert _aliases(registry)["production"] == "3"
    _move(registry, "2")
    assert _aliases(registry) == {"production": "2", "previous": "3"}
    assert [e.state for e in journal.read_journal(registry, NAME)] == ["committed", "aborted", "committed"]


def test_other_spellings_of_an_alias_are_never_at_odds(registry, client):
    client.set_registered_model_alias(NAME, "Production", "1")
    seen = []
    real = MlflowClient.set_registered_model_alias

    def spying(self, *arguments):
        real(self, *arguments)
        seen.append(registry.find_alias(NAME, "production"))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MlflowClient, "set_registered_model_alias", spying)
        _move(registry, "2")
    assert seen[0] == "2"
    assert _aliases(registry) == {"production": "2", "previous": "1"}


def _killed_at(registry, step, to):
    """Move in a process that ends, without any clean-up, in place of its write number ``step``; True if it got that far."""
    pid = os.fork()
    if pid:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 9
    try:
        done = 0

        def ending(real):
            def write(*arguments, **options):
                nonlocal done
                done += 1
                if done == step:
                    os._exit(9)
                return real(*arguments, **options)

            return write

        for name in WRITES:
            setattr(MlflowClient, name, ending(getattr(MlflowClient, name)))
        _move(registry, to)
    finally:
        os._exit(0)


def test_a_kill_in_place_of_each_write_leaves_the_old_or_the_new_version(registry, client):
    """Every write of a promotion is left out once, with all that follows it; the next one puts things right."""
    _move(registry, "1")
    states, steps = set(), 0
    for step in range(1, 60):
        old, new = ("1", "2") if step % 2 else ("2", "1")
        if not _killed_at(registry, step, new):
            break
        steps += 1
        assert _aliases(registry)["production"] in (old, new)
        last = journal.effective_entries(journal.read_journal(registry, NAME), "production")[-1]
        states.add((last.state, _aliases(registry)["production"] == last.move.to))
        # Whoever comes next finishes what counts, and goes on to where the round was meant to end.
        at = promotion.read_alias_state(registry, NAME, "production")
        if at.version != new:
            _move(registry, new, at=at)
        assert _aliases(registry) == {"production": new, "previous": old}
        assert all(e.state in ("committed", "superseded") for e in journal.read_journal(registry, NAME))
    assert steps >= 8
    # Before the entry, between entry and alias, and after the alias.
    assert states == {("committed", True), ("pending", False), ("pending", True)}


def test_one_journal_for_all_models_keeps_their_moves_apart(registry, client):
    _move(registry, "1")
    first = client.get_model_version(NAME, "1")
    for name in ("planes-y", f"{NAME}-2"):
        client.create_registered_model(name)
        client.create_model_version(name, first.source, tags=first.tags)
        promotion.move(registry, promotion.read_alias_state(registry, name, "production"), "1", "promote", f"of {name}")
    _move(registry, "2")
    assert [m.name for m in client.search_registered_models() if m.name not in registry.registered_names()] == [
        "planes-journal"
    ]
    assert [(e.number, e.move.to) for e in journal.read_journal(registry, NAME)] == [(1, "1"), (4, "2")]
    assert [e.move.why for e in journal.read_journal(registry, "planes-y")] == ["of planes-y"]
    with pytest.raises(RegistryError, match="is the journal of planes-y, not a model"):
        registry.resolve("planes-journal/2")


def test_an_entry_that_the_model_does_not_know_of_does_not_count(registry, client):
    """Who may write to the journal, but not to the model, can neither move its alias nor rewrite its history."""
    _move(registry, "1")
    last = journal.read_journal(registry, NAME)[-1]
    real = client.get_model_version("planes-journal", str(last.number))
    forged = {**real.tags, "after": last.id, "to": "3", "from": "1", "token": "f" * 32, "state": "pending"}
    client.create_model_version("planes-journal", real.source, tags=forged)
    assert [e.id for e in journal.read_journal(registry, NAME)] == [last.id]
    client.set_model_version_tag("planes-journal", str(last.number), "state", "pending")
    assert promotion.complete_pending(registry, NAME, "production") is None
    _move(registry, "2")
    assert _aliases(registry) == {"production": "2", "previous": "1"}
    client.set_model_version_tag("planes-journal", str(last.number), "to", "3")
    assert [e.move.to for e in journal.read_journal(registry, NAME)] == ["2"]
    _move(registry, "3")
    assert _aliases(registry)["production"] == "3"


def test_an_answer_that_got_lost_is_found_by_its_token(registry, client, monkeypatch):
    real = MlflowClient.create_model_version
    lost = []

    def answers_get_lost(self, name, *arguments, **options):
        made = real(self, name, *arguments, **options)
        if name == journal.JOURNAL and not lost:
            lost.append(made.version)
            raise mlflow.MlflowException("connection reset by peer")
        return made

    monkeypatch.setattr(MlflowClient, "create_model_version", answers_get_lost)
    _move(registry, "1")
    assert [str(e.number) for e in journal.read_journal(registry, NAME)] == [str(v) for v in lost]
    assert journal.read_journal(registry, NAME)[0].state == "committed"
    assert _aliases(registry) == {"production": "1"}


def _interrupted(registry, to):
    """A move that is in the journal but was not carried out."""
    at = promotion.read_alias_state(registry, NAME, "production")
    return journal.append(registry, NAME, journal.Move("production", "promote", to, at.version, at.after, "better"))


def test_the_version_of_an_interrupted_move_is_not_swept(registry, client):
    _move(registry, "1")
    _interrupted(registry, "2")
    reasons = {kept.version: kept.reason for kept in lineage.sweep(registry, NAME, keep_newest=0)}
    assert (reasons["2"], reasons["3"]) == ("was production", "")


def test_who_was_held_up_does_not_undo_a_later_move(registry, client, monkeypatch):
    """Between the look at the alias and its move another process finished this move and made the next one."""
    _move(registry, "1")
    entry = _interrupted(registry, "2")
    real = Registry.set_alias

    def held_up(self, name, alias, version):
        monkeypatch.setattr(Registry, "set_alias", real)
        promotion.finish(registry, NAME, entry)
        _move(registry, "3")
        real(self, name, alias, version)

    monkeypatch.setattr(Registry, "set_alias", held_up)
    promotion.finish(registry, NAME, entry)
    assert _aliases(registry) == {"production": "3", "previous": "2"}


def test_an_abandoned_entry_is_not_where_the_alias_belongs(registry, client, monkeypatch):
    """As above, but the later move was abandoned: the alias stays with the newest move that was not."""
    _move(registry, "1")
    entry = _interrupted(registry, "2")
    real = Registry.set_alias

    def held_up(self, name, alias, version):
        monkeypatch.setattr(Registry, "set_alias", real)
        promotion.finish(registry, NAME, entry)
        later = _interrupted(registry, "3")
        journal.mark(registry, NAME, later, "aborted")
        real(self, name, alias, version)

    monkeypatch.setattr(Registry, "set_alias", held_up)
    assert promotion.finish(registry, NAME, entry).move.to == "2"
    assert _aliases(registry)["production"] == "2"
    assert [e.state for e in journal.read_journal(registry, NAME)] == ["committed", "committed", "aborted"]


def test_a_move_that_was_abandoned_meanwhile_is_told(registry, client, monkeypatch):
    _move(registry, "1")
    entry = _interrupted(registry, "2")
    real = Registry.set_alias

    def held_up(self, name, alias, version):
        monkeypatch.setattr(Registry, "set_alias", real)
        journal.mark(registry, NAME, entry, "aborted")
        real(self, name, alias, version)

    monkeypatch.setattr(Registry, "set_alias", held_up)
    with pytest.raises(RegistryError, match="decide again"):
        promotion.finish(registry, NAME, entry)
    assert _aliases(registry)["production"] == "1"


def test_a_rollback_after_a_move_past_the_journal_goes_one_back(registry, client):
    _move(registry, "1")
    _move(registry, "2")
    client.set_registered_model_alias(NAME, "production", "3")
    at = promotion.read_alias_state(registry, NAME, "production")
    assert promotion.rollback_target(registry, at) == "2"


def test_what_an_earlier_release_adds_after_the_switch_does_not_count(registry, client):
    """0.6.0 does not see this journal: what it writes into its own one changes no history."""
    legacy = f"{NAME}-journal"
    client.create_registered_model(legacy, tags={"planes_journal_of": NAME})
    source = client.get_model_version(NAME, "1").source

    def of_060(to, origin, after):
        tags = {"planes_journal_of": NAME, "alias": "production", "kind": "promote", "to": to, "from": origin}
        client.create_model_version(legacy, source, tags={**tags, "after": after, "state": "done", "by": "x", "at": "y"})

    of_060("1", "-", "0")
    client.set_registered_model_alias(NAME, "production", "1")
    assert [e.move.to for e in journal.read_journal(registry, NAME)] == ["1"]
    _move(registry, "2")
    of_060("3", "1", "1")
    assert [(e.move.to, e.state) for e in journal.read_journal(registry, NAME)] == [("1", "committed"), ("2", "committed")]
    _move(registry, "3")
    assert _aliases(registry) == {"production": "3", "previous": "2"}


def test_an_overtaken_move_does_not_come_back_when_others_are_deleted(registry, client):
    _move(registry, "1")
    first, second = (
        promotion.read_alias_state(registry, NAME, "production"),
        promotion.read_alias_state(registry, NAME, "production"),
    )
    _move(registry, "2", at=first)
    with pytest.raises(RegistryError, match="decide again"):
        _move(registry, "3", at=second)
    _move(registry, "1", "rollback")
    faster = next(e for e in journal.read_journal(registry, NAME) if e.move.to == "2")
    client.delete_model_version("planes-journal", str(faster.number))
    promotion.read_alias_state(registry, NAME, "production")
    assert _aliases(registry)["production"] == "1"


def test_a_move_that_is_told_to_have_failed_does_not_happen_later(registry, client, monkeypatch):
    _move(registry, "1")
    real = MlflowClient.create_model_version

    def answers_get_lost(self, name, *arguments, **options):
        made = real(self, name, *arguments, **options)
        if name == journal.JOURNAL:
            raise mlflow.MlflowException("connection reset by peer")
        return made

    def search_fails(self, *_, **__):
        raise mlflow.MlflowException("connection refused")

    at = promotion.read_alias_state(registry, NAME, "production")
    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, "create_model_version", answers_get_lost)
        patch.setattr(MlflowClient, "search_model_versions", search_fails)
        with pytest.raises(RegistryError, match="cannot be written"):
            _move(registry, "2", at=at)
    promotion.read_alias_state(registry, NAME, "production")
    assert _aliases(registry)["production"] == "1"
    _move(registry, "3")
    assert _aliases(registry) == {"production": "3", "previous": "1"}


def test_no_model_is_registered_under_the_name_of_the_journal(registry, client):
    with pytest.raises(RegistryError, match="is the journal of promotions; give the model another name"):
        log_and_register(
            registry, Path("m"), "planes-journal", example=np.zeros((64, 64, 3), np.uint8), tags={}, run_id="r"
        )


def test_a_viewer_is_told_before_anything_is_written(registry, client, monkeypatch):
    def denied(self, *arguments, **options):
        raise mlflow.MlflowException("Permission denied")

    monkeypatch.setattr(MlflowClient, "set_registered_model_tag", denied)
    with pytest.raises(RegistryError, match=f"you need the right to edit {NAME} and planes-journal"):
        _move(registry, "1")
    assert not client.search_registered_models("name = 'planes-journal'")


@pytest.mark.parametrize(("word", "state"), [("begun", "pending"), ("done", "committed"), ("abandoned", "aborted")])
def test_states_are_read_by_the_words_that_they_once_had(registry, client, word, state):
    _move(registry, "1")
    ((key, value),) = [(k, v) for k, v in client.get_registered_model(NAME).tags.items() if k.startswith(journal.MOVE_TAG)]
    assert value.startswith("committed ")
    client.set_registered_model_tag(NAME, key, f"{word} {value.partition(' ')[2]}")
    assert [e.state for e in journal.read_journal(registry, NAME)] == [state]
    promotion.read_alias_state(registry, NAME, "production")
    assert client.get_registered_model(NAME).tags[key].startswith("committed ") == (word == "begun")


def test_a_move_that_the_earlier_release_left_is_marked_in_its_words(registry, client):
    legacy = f"{NAME}-journal"
    client.create_registered_model(legacy, tags={"planes_journal_of": NAME})
    tags = {"planes_journal_of": NAME, "alias": "production", "kind": "promote", "to": "1", "from": "-", "after": "0"}
    source = client.get_model_version(NAME, "1").source
    client.create_model_version(legacy, source, tags={**tags, "state": "begun", "by": "x", "at": "y"})
    promotion.read_alias_state(registry, NAME, "production")
    assert _aliases(registry)["production"] == "1"
    assert client.get_model_version(legacy, "1").tags["state"] == "done"
    assert [e.state for e in journal.read_journal(registry, NAME)] == ["committed"]


def test_every_page_of_versions_is_read(registry, client, monkeypatch):
    for to in ("1", "2", "3"):
        _move(registry, to)
    monkeypatch.setattr("pipelines.registry.model_versions.PAGE", 1)
    assert [int(v.version) for v in registry.versions_of(NAME)] == [3, 2, 1]
    assert [e.move.to for e in journal.read_journal(registry, NAME)] == ["1", "2", "3"]
