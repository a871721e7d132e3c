"""The registry as a team uses it, with the same assertions on SQLite and on PostgreSQL + S3 behind a server with logins."""

from __future__ import annotations

import json
import random
import re
import shutil
import subprocess
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import mlflow
import numpy as np
import pytest
import yaml
from mlflow.tracking import MlflowClient

from pipelines.registry import journal
from tests.journeys.conftest import REGISTER, Project, error_line
from tests.journeys.stack import BUCKET, MlflowServer, ObjectStore, Postgres

pytestmark = pytest.mark.xdist_group("registry")

_ROW = {"image_id": "0", "instance": 0, "x1": 1.0, "y1": 1.0, "x2": 9.0, "y2": 9.0, "label": 0, "height": 96, "width": 96}
_ROW |= {"mask_size": None, "mask_counts": None}
NOTHING_ASKED = {"gates": {"production": {}}}


@dataclass
class Team:
    """A working folder and the registry that its commands use."""

    project: Project
    env: dict[str, str]
    weak: Path
    good: Path
    server: MlflowServer | None = None
    store: ObjectStore | None = None

    @property
    def folder(self) -> Path:
        return self.project.folder

    def registry(self, *arguments, **options):
        return self.project.registry(*arguments, **{**self.env, **options})

    def score(self, *arguments, **options):
        return self.project.score(*arguments, **{**self.env, **options})

    def register(self, saved: Path, name: str, **tags: str) -> None:
        self.project.run("python", "-c", REGISTER, str(saved), name, json.dumps(tags), **self.env)

    def aliases(self, name: str) -> dict[str, str]:
        return {k: str(v) for k, v in self.client.get_registered_model(name).aliases.items()}

    @property
    def client(self) -> MlflowClient:
        return MlflowClient(self.env["MLFLOW_TRACKING_URI"])

    def gates(self, name: str, content: dict) -> str:
        path = self.folder / f"{name}.yaml"
        path.write_text(yaml.safe_dump(content))
        return str(path)


@pytest.fixture(scope="module", params=["sqlite", "postgresql-s3"])
def team(request, gated, tmp_path_factory):
    """gated/1 and gated/2 (equal, hardly trained), gated/3 (better), planes-det/1, registered in the store."""
    folder = tmp_path_factory.mktemp(request.param)
    patch = pytest.MonkeyPatch()
    training = gated.folder / ".planes" / "training"
    by_hash = {gated.client.get_model_version("gated", n).tags["digest"]: n for n in ("1", "3")}
    from models.saved.folder import folder_digest

    saved = {by_hash.get(folder_digest(p)): p for p in training.glob("gated-*/model")}
    made = Team(Project(folder, gated.data), {}, saved["1"], saved["3"])
    started = []
    if request.param == "sqlite":
        made.env["MLFLOW_TRACKING_URI"] = f"sqlite:///{folder / 'mlflow.db'}"
    else:
        for kind in (Postgres, ObjectStore):
            if kind.missing():
                pytest.skip(kind.missing())
        base = tmp_path_factory.mktemp("servers")
        database, store = Postgres(base / "postgres"), ObjectStore(base / "s3")
        started += [database, store]
        database.start()
        store.start()
        made.server = MlflowServer(base / "mlflow", {**made.project.env(), **store.env}, database.uri, store.uri, auth=True)
        made.server.start()
        started.append(made.server)
        made.store = store
        made.env |= {"MLFLOW_TRACKING_URI": made.server.uri, "PLANES_CACHE": str(folder / "cache"), **made.server.admin}
        for key, value in made.server.admin.items():
            patch.setenv(key, value)
    for name, path in (("gated", made.weak), ("gated", made.weak), ("gated", made.good)):
        made.register(path, name, data="airfield/train", data_digest="0" * 16, git_commit="0" * 40)
    made.register(next(training.glob("planes-det-*/model")), "planes-det")
    yield made
    patch.undo()
    for server in reversed(started):
        server.stop()


def _gates(team, **production):
    data = [{"path": str(team.project.data), "split": "test"}]
    challenger = {"against": "production", "metrics": {"IoU": {"minimum": 0.1}}}
    return {"data": data, "gates": {"production": production, "challenger": challenger}}


def test_gates_decide_and_the_decision_is_recorded(team):
    full = _gates(
        team,
        metrics={"IoU": {"minimum": 0.1, "min_gain": 0, "confidence": 0.6}},
        slices={"small planes": {"size": "small", "max_loss": 0.05}, "one image": {"images": "A0005", "max_loss": 0.5}},
        max_slowdown=20,
        max_size=1.5,
        max_megabytes=100,
        min_planes=5,
    )
    strict = team.gates("strict", full)
    weak = ("promote", "gated", "1", "--to", "production", "--gates", strict)
    for more in ((), ("--dry-run",)):
        done = team.registry(*weak, *more, code=2)
        assert re.search(r"FAIL +IoU +airfield/test +>= 0.1 +0\.0", done.stdout)
        assert re.search(r"pass +planes +airfield/test +>= 5 +15", done.stdout)
        assert f"gated/1 {'would not be' if more else 'not'} promoted to production: IoU 0.0" in done.stdout
    assert team.aliases("gated") == {}
    # --force moves it all the same, and says why for ever.
    assert "--force needs --reason TEXT" in team.registry(*weak, "--force", code=2).stderr
    forced = team.registry(*weak, "--force", "--reason", "the first one, for the pipeline")
    assert "gated/1 is production now: the first one, for the pipeline (failed: IoU" in forced.stdout
    assert team.aliases("gated") == {"production": "1"}
    assert "gated/1 is production already" in team.registry("promote", "gated/1", "--to", "Production", code=0).stdout

    tie = team.registry(
        "promote",
        "gated/2",
        "--to",
        "production",
        "--gates",
        team.gates("gain", _gates(team, metrics={"IoU": {"min_gain": 0}})),
        code=2,
    )
    assert "IoU gain" in tie.stdout
    challenger = team.registry("promote", "gated/3", "--to", "challenger", "--gates", strict)
    assert "gated/3 against gated/1" in challenger.stdout
    assert team.aliases("gated") == {"production": "1", "challenger": "3"}
    both = team.score(
        "--model",
        "gated/production",
        "--model",
        "gated@challenger",
        "--data",
        str(team.project.data),
        "--out",
        "both",
        "--overlays",
        "0",
    )
    assert re.search(r"gated/1 .*\n.*gated/3 ", both.stdout)

    dry = team.registry("promote", "gated/3", "--to", "production", "--gates", strict, "--dry-run")
    assert "gated/3 would be promoted to production: 10 gates passed" in dry.stdout
    assert team.aliases("gated")["production"] == "1"
    won = team.registry("promote", "gated/3", "--to", "production", "--gates", strict, "--reason", "sharper outlines")
    assert "FAIL" not in won.stdout
    assert re.search(r"pass +IoU gain, confidence +airfield/test +>= 0.6 +1\.0000", won.stdout)
    assert team.aliases("gated") == {"production": "3", "previous": "1"}

    # Aliases and MLflow's old stages agree.
    stages = {str(v.version): v.current_stage for v in team.client.search_model_versions("name = 'gated'")}
    assert stages == {"1": "Archived", "2": "None", "3": "Production"}
    tags = team.client.get_model_version("gated", "3").tags
    who = team.env.get("MLFLOW_TRACKING_USERNAME", tags["promoted_to_production_by"])
    assert (tags["promoted_to_production"], tags["promoted_to_production_from"]) == ("sharper outlines", "1")
    assert tags["promoted_to_production_by"] == who != ""
    run = team.client.get_run(tags["promoted_to_production_run"])
    assert (run.data.tags["decision"], run.data.params["baseline"]) == ("promoted", "gated/1")
    assert run.data.metrics["candidate/IoU"] > run.data.metrics["baseline/IoU"]
    checks = Path(team.client.download_artifacts(run.info.run_id, "checks.txt", str(team.folder))).read_text()
    assert checks.strip() in won.stdout


def test_required_data_and_training_data_are_gates(team):
    data = str(team.project.data)
    digest = re.search(r"tested on +digest (\w+)", team.registry("show", "gated/3").stdout)
    assert digest[1] == "none"
    wanted = {"data": [{"path": data, "split": "test", "digest": "f" * 16}], "gates": {"production": {"min_planes": 1}}}
    done = team.registry(
        "promote", "gated/2", "--to", "production", "--gates", team.gates("data", wanted), "--dry-run", code=2
    )
    assert re.search(r"FAIL +data set +\S+/test +f{16} +not evaluated", done.stdout)
    from pipelines.data.readers.opening import open_dataset

    real = open_dataset(data, "test").digest()
    wanted["data"][0]["digest"] = real
    done = team.registry("promote", "gated/2", "--to", "production", "--gates", team.gates("data", wanted), "--dry-run")
    assert re.search(rf"pass +data set +\S+/test +{real} +there", done.stdout)
    team.register(team.good, "cheat", data_digest=real)
    done = team.registry("promote", "cheat/1", "--to", "production", "--gates", team.gates("data", wanted), code=2)
    assert re.search(r"FAIL +images +airfield/test +none trained on +it is the training set", done.stdout)


def test_rollback_history_and_what_is_shown(team):
    assert (
        "gated/1 is production again, instead of version 3: blurred at night"
        in team.registry("rollback", "gated", "--reason", "blurred at night").stdout
    )
    assert team.aliases("gated") == {"production": "1"}
    assert "no version is known that was production before" in error_line(team.registry("rollback", "gated", code=1))
    team.registry("rollback", "gated", "--version", "3", "--reason", "it was the camera")
    assert team.aliases("gated")["production"] == "3"
    told = json.loads(team.registry("history", "gated", "--json").stdout)
    moves = [
        (m["move"]["alias"], m["move"]["origin"], m["move"]["to"], m["move"]["kind"], m["state"]) for m in told["moves"]
    ]
    assert moves == [
        ("production", None, "1", "force", "committed"),
        ("challenger", None, "3", "promote", "committed"),
        ("production", "1", "3", "promote", "committed"),
        ("production", "3", "1", "rollback", "committed"),
        ("production", "1", "3", "rollback", "committed"),
    ]
    text = team.registry("history", "gated").stdout
    for part in ("blurred at night", "challenger: version 3 went on to production", "now: ", "production -> 3"):
        assert part in text

    listed = team.registry("list").stdout
    assert re.search(r"gated/3 +.*production", listed)
    assert "journal" not in listed
    shown = team.registry("show", "gated", "3").stdout
    for part in (
        "trained on",
        "airfield/train (digest 0000",
        "by            trainer",
        "commit 0000",
        "scoring runs",
        "pass IoU gain",
        "blurred at night",
    ):
        assert part.replace("            ", " ") in re.sub(" +", " ", shown), part
    differing = team.registry("diff", "gated/1", "gated/3").stdout
    assert "weights_sha256" not in differing
    assert re.search(r"files +digest", differing)
    assert "the same params, metrics, data, code and files" in team.registry("diff", "gated/1", "gated/2").stdout
    checked = team.registry("verify", "planes-det").stdout
    assert re.search(r"ok +files", checked)
    assert re.search(r"ok +example +\d+ planes as logged: boxes within 0 pixels|ok +example +no plane", checked)
    for wrong, message in (
        (("show", "gated/9"), "no version, alias or stage '9'"),
        (("history", "nobody"), "nobody"),
        (("promote", "gated/3", "--to", "latest"), "alias 'latest': has a meaning of its own"),
        (("show", "planes-journal/1"), "is the journal of gated, not a model"),
        (("rollback", "gated", "--version", "77"), "no version, alias or stage '77'"),
    ):
        assert message in error_line(team.registry(*wrong, code=1))


def test_from_one_environment_to_the_next(team):
    nothing = team.gates("nothing", NOTHING_ASKED)
    team.register(team.good, "dev.gated")
    done = team.registry("promote", "dev.gated/1", "--to", "prod.gated@production", "--gates", nothing)
    assert "dev.gated/1 is prod.gated/1 there" in done.stdout
    assert team.aliases("prod.gated") == {"production": "1"}
    again = team.registry("copy", "dev.gated/1", "prod.gated")
    assert "dev.gated/1 is prod.gated/1" in again.stdout
    assert len(team.client.search_model_versions("name = 'prod.gated'")) == 1
    assert "copied from dev.gated/1" in re.sub(" +", " ", team.registry("show", "prod.gated/1").stdout)
    scored = team.score(
        "--model", "prod.gated/production", "--data", str(team.project.data), "--out", "prod", "--overlays", "0"
    )
    assert "prod.gated/1" in scored.stdout
    # Another server has nothing of this one: the files are checked and uploaded.
    other = f"sqlite:///{team.folder / 'other.db'}"
    team.registry(
        "copy", "prod.gated/1", "gated", "--to-server", other, MLFLOW_TRACKING_URI=team.env["MLFLOW_TRACKING_URI"]
    )
    there = {**team.env, "MLFLOW_TRACKING_URI": other}
    assert re.search(r"ok +example", team.project.registry("verify", "gated", **there).stdout)


def test_versions_that_nothing_names_are_swept(team):
    for _ in range(3):
        team.register(team.weak, "swept")
    team.registry("promote", "swept/1", "--to", "production", "--gates", team.gates("nothing", NOTHING_ASKED))
    dry = team.registry("gc", "swept", "--keep", "1", "--dry-run").stdout
    assert re.search(r"swept/3 +keep +one of the newest", dry)
    assert re.search(r"swept/2 +delete +nothing names it", dry)
    assert re.search(r"swept/1 +keep +production", dry)
    assert len(team.client.search_model_versions("name = 'swept'")) == 3
    assert "swept/2 deleted" in team.registry("gc", "swept", "--keep", "1", "--yes").stdout
    assert sorted(str(v.version) for v in team.client.search_model_versions("name = 'swept'")) == ["1", "3"]


@pytest.fixture(scope="module")
def racers(team):
    """race/1 and race/2, and gates that ask for nothing."""
    for _ in range(2):
        team.register(team.weak, "race")
    return team, team.gates("nothing", NOTHING_ASKED)


def _start(team, version, gates):
    return team.project.start(
        "planes-registry", "promote", f"race/{version}", "--to", "production", "--gates", gates, **team.env
    )


def test_of_two_promotions_at_once_exactly_one_wins(racers):
    """30 rounds in which both decided before either moved; rounds in which one came later are played again."""
    team, gates = racers
    contested = 0
    for _ in range(90):
        known = _entries(team, "race")
        # Both from the same place, which is neither of them.
        team.client.delete_registered_model_alias("race", "production")
        both = [_start(team, version, gates) for version in "12"]
        done = [one.wait() for one in both]
        fresh = [e for e in _entries(team, "race") if e["number"] > max([k["number"] for k in known], default=0)]
        holder = team.aliases("race")["production"]
        if sorted(e["state"] for e in fresh) == ["committed", "superseded"]:
            contested += 1
            winner = next(e for e in fresh if e["state"] == "committed")["move"]["to"]
            assert holder == winner
            assert [d.returncode for d in done] == [int(v != winner) for v in "12"]
            loser = done["12".index("1" if winner == "2" else "2")]
            assert f"production was moved to version {winner} by" in error_line(loser)
            assert f"race/{winner} is production now" in done["12".index(winner)].stdout
        else:
            # One saw what the other had done.
            assert [d.returncode for d in done] == [0, 0], [d.stderr for d in done]
            assert [e["state"] for e in fresh] == ["committed", "committed"]
            assert holder == fresh[-1]["move"]["to"]
        if contested == 30:
            break
    assert contested == 30


def _entries(team, name):
    """The journal as the history tells it, read without a command."""
    mlflow.set_tracking_uri(team.env["MLFLOW_TRACKING_URI"])
    try:
        return [asdict(e) for e in journal.read_journal(name)]
    finally:
        mlflow.set_tracking_uri(None)


def test_a_promotion_killed_at_any_moment_leaves_the_old_or_the_new_version(racers):
    """30 kills and more, until five fell between entry and end; the history tells, the next promotion goes on."""
    team, gates = racers
    team.registry("rollback", "race", "--version", "1", "--unchecked")
    started = time.monotonic()
    team.registry("promote", "race/2", "--to", "production", "--gates", gates)
    usual = time.monotonic() - started
    kills = interrupted = 0
    order = random.Random(7)
    while (kills < 30 or interrupted < 5) and kills < 150:
        before = team.aliases("race")["production"]
        after = "1" if before == "2" else "2"
        running = _start(team, after, gates)
        time.sleep(order.uniform(0.3, 1.05) * usual)
        running.kill()
        done = running.wait()
        assert done.returncode in (-9, 0)
        kills += done.returncode == -9
        now = team.aliases("race")["production"]
        assert now in (before, after)
        last = _entries(team, "race")[-1]
        assert last["state"] in ("pending", "committed")
        assert now == last["move"]["to"] or last["state"] == "pending"
        if last["state"] == "pending":
            interrupted += 1
            assert "the last move was interrupted" in team.registry("history", "race").stdout
            again = team.registry("promote", f"race/{after}", "--to", "production", "--gates", gates)
            assert "finished a move that was interrupted" in again.stdout
            assert team.aliases("race")["production"] == after
    assert kills >= 30
    assert interrupted >= 5
    assert {e["state"] for e in _entries(team, "race")} <= {"committed", "superseded"}


def _plant(team, name, change):
    """Register a version and change its saved files where the store keeps them, as somebody with access there could."""
    team.register(team.weak, name)
    if team.store is None:
        source = team.client.get_model_version_download_uri(name, "1")
        change(Path(source) / "artifacts" / "model")
        return
    client, prefix = team.store.s3, "artefacts/"
    source = team.client.get_model_version_download_uri(name, "1").partition(":/")[2].strip("/")
    local = team.folder / f"planted-{name}"
    keys = [
        o["Key"] for o in client.list_objects_v2(Bucket=BUCKET, Prefix=f"{prefix}{source}/artifacts/model/")["Contents"]
    ]
    (local / "model").mkdir(parents=True)
    for key in keys:
        client.download_file(BUCKET, key, str(local / "model" / key.rpartition("/")[2]))
    change(local / "model")
    for path in local.rglob("*"):
        if path.is_file() and not path.is_symlink():
            client.upload_file(str(path), BUCKET, f"{prefix}{source}/artifacts/{path.relative_to(local)}")


def _pickle(folder):
    import pickle

    class Evil:
        def __reduce__(self):
            return Path.touch, (folder.parent / "owned",)

    (folder / "weights.pkl").write_bytes(pickle.dumps(Evil()))


def _tampered(folder):
    content = bytearray((folder / "weights.safetensors").read_bytes())
    content[-1] ^= 1
    (folder / "weights.safetensors").write_bytes(bytes(content))


def _giant(folder):
    spec = json.loads((folder / "model.json").read_text())
    spec["architecture"]["decoder_channels"] = [4096] * 5
    (folder / "model.json").write_text(json.dumps(spec))


def _giant_weights(folder):
    header = json.dumps({"x": {"dtype": "F32", "shape": [10**6, 10**6], "data_offsets": [0, 4 * 10**12]}}).encode()
    (folder / "weights.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)


def _long_spec(folder):
    (folder / "model.json").write_text("[" * 2_000_000)


def _deep_spec(folder):
    (folder / "model.json").write_text("[" * 400_000)


def _hidden(folder):
    (folder / "detector").mkdir()
    (folder / "detector" / "__init__.py").write_text("raise SystemExit(7)\n")


@pytest.mark.parametrize(
    ("change", "message", "signed"),
    [
        (_pickle, "holds 'weights.pkl', which no saved model has", False),
        (_tampered, "its files are not those that were registered", False),
        (_hidden, "holds 'detector/__init__.py', which no saved model has", False),
        (_long_spec, "model.json has 2,000,000 bytes", False),
        # Whoever can change the tags too is held by the form of the files.
        (_giant, "weights do not fit the architecture", True),
        (_giant_weights, "damaged weights", True),
        (_deep_spec, "not valid JSON", True),
    ],
)
def test_planted_versions_are_refused_and_nothing_of_them_runs(team, tmp_path, change, message, signed):
    name = f"evil{change.__name__}"
    _plant(team, name, change)
    if signed:
        from models.saved.folder import folder_digest

        shutil.copytree(team.weak, tmp_path / "model")
        change(tmp_path / "model")
        team.client.set_model_version_tag(name, "1", "digest", folder_digest(tmp_path / "model"))
    arguments = ("--model", f"{name}/1", "--data", str(team.project.data), "--out", str(tmp_path / "out"))
    started = time.monotonic()
    # Of the same digest an honest version may be in the cache already.
    fresh = {"PLANES_CACHE": str(tmp_path / "cache")}
    assert message in error_line(team.score(*arguments, code=1, **fresh))
    assert time.monotonic() - started < 60
    assert not list((tmp_path / "out").glob("*/instances.parquet"))
    assert not list(team.folder.rglob("owned"))
    checked = team.registry("verify", name, code=1, **fresh)
    assert "FAIL" in checked.stdout
    assert "Traceback" not in checked.stderr


def test_links_and_paths_that_lead_out_are_refused(team, tmp_path):
    if team.store is not None:
        pytest.skip("an object store has no links, and this one takes no such keys")
    secret = tmp_path / "secret"
    secret.write_text("{}")

    def link(folder):
        (folder / "model.json").unlink()
        (folder / "model.json").symlink_to(secret)

    def whole(folder):
        shutil.copytree(folder, tmp_path / "elsewhere")
        shutil.rmtree(folder)
        folder.symlink_to(tmp_path / "elsewhere")

    def escape(folder):
        (folder / "..\\..\\owned").write_text("x")

    for change, message in ((link, "is a link"), (whole, "is a link"), (escape, "leads out of it")):
        name = f"leading-{change.__name__}"
        _plant(team, name, change)
        arguments = ("--model", f"{name}/1", "--data", str(team.project.data), "--out", str(tmp_path / "out"))
        assert message in error_line(team.score(*arguments, code=1))


def test_a_tag_that_is_no_digest_is_refused(team, tmp_path):
    team.register(team.weak, "named")
    team.client.set_model_version_tag("named", "1", "digest", "../../../tmp/x")
    done = team.score("--model", "named/1", "--data", str(team.project.data), "--out", str(tmp_path / "out"), code=1)
    assert "its tag digest is no digest" in error_line(done)


def test_a_viewer_may_score_and_look_but_not_promote(team, tmp_path):
    if team.server is None:
        pytest.skip("a SQLite store has no logins")
    viewer = team.server.add_user("viewer-of-planes")
    use = {**viewer, "MLFLOW_EXPERIMENT_NAME": "scorings of viewer-of-planes"}
    arguments = (
        "--model",
        "gated/production",
        "--data",
        str(team.project.data),
        "--out",
        str(tmp_path / "out"),
        "--overlays",
        "0",
    )
    # Where all runs go by default he may not write: nothing is lost, and he is told.
    denied = error_line(team.score(*arguments, code=1, **viewer))
    assert "ermission denied" in denied
    assert "MLFLOW_EXPERIMENT_NAME" in denied
    scored = team.score(*arguments, **use)
    assert "gated/3" in scored.stdout
    assert "gated/3" in team.registry("list", **viewer).stdout
    assert "production -> 3" in team.registry("history", "gated", **viewer).stdout
    entries = len(_entries(team, "gated"))
    nothing = team.gates("nothing", NOTHING_ASKED)
    for command in (
        ("promote", "gated/2", "--to", "production", "--gates", nothing),
        ("rollback", "gated", "--version", "1"),
    ):
        assert "ermission denied" in error_line(team.registry(*command, code=1, **use))
    assert team.aliases("gated")["production"] == "3"
    assert len(_entries(team, "gated")) == entries
    wrong = {**viewer, "MLFLOW_TRACKING_PASSWORD": "guessed"}
    assert "cannot be reached" in error_line(team.registry("list", code=1, **wrong))


def test_whose_role_is_to_release_may_promote(team):
    if team.server is None:
        pytest.skip("a SQLite store has no logins")
    releaser = team.server.add_user("releaser", registered_model="EDIT", experiment="EDIT")
    done = team.registry(
        "promote", "gated/2", "--to", "staging", "--gates", team.gates("nothing", NOTHING_ASKED), **releaser
    )
    assert "gated/2 is staging now" in done.stdout
    assert _entries(team, "gated")[-1]["by"] == "releaser"
    assert team.client.get_model_version("gated", "2").current_stage == "Staging"


def test_who_may_edit_the_journal_alone_moves_no_alias(team):
    """Everybody who promotes anything writes to one journal: that right must be worth nothing for other models."""
    if team.server is None:
        pytest.skip("a SQLite store has no logins")
    other = team.server.add_user("other-team", experiment="EDIT")
    team.server.grant("other-team", "registered_model", "planes-journal", "EDIT")
    known, stands = _entries(team, "gated"), team.aliases("gated")["production"]
    done = team.registry("rollback", "gated", "--version", "1", code=1, **other)
    assert "ermission denied" in error_line(done)
    assert "you need the right to edit gated and planes-journal" in done.stderr
    # What a promotion writes, without the one thing that needs a right on the model.
    with pytest.MonkeyPatch.context() as patch:
        for key, value in other.items():
            patch.setenv(key, value)
        tags = {"planes_journal_of": "gated", "alias": "production", "token": "e" * 32, "to": "1", "from": stands}
        team.client.create_model_version("planes-journal", "models:/gated/1", tags={**tags, "after": known[-1]["token"]})
    assert _entries(team, "gated") == known
    assert "finished" not in team.registry("rollback", "gated", "--version", stands).stdout
    assert team.aliases("gated")["production"] == stands


def test_who_releases_one_model_needs_that_and_the_journal(team):
    if team.server is None:
        pytest.skip("a SQLite store has no logins")
    own = team.server.add_user("owner-of-one", experiment="EDIT")
    team.register(team.weak, "one-model")
    team.server.grant("owner-of-one", "registered_model", "one-model", "EDIT")
    promote = ("promote", "one-model/1", "--to", "production", "--gates", team.gates("nothing", NOTHING_ASKED))
    assert "you need the right to edit one-model and planes-journal" in error_line(team.registry(*promote, code=1, **own))
    team.server.grant("owner-of-one", "registered_model", "planes-journal", "EDIT")
    assert "one-model/1 is production now" in team.registry(*promote, **own).stdout
    assert [e["state"] for e in _entries(team, "one-model")] == ["committed"]


@pytest.mark.parametrize("right", ["EDIT", "MANAGE"])
def test_who_may_move_but_not_delete_aliases_is_not_stopped_by_that(team, right):
    if team.server is None:
        pytest.skip("a SQLite store has no logins")
    releaser = team.server.add_user(f"releaser-{right}", registered_model=right, experiment="EDIT")
    name, nothing = f"released-{right}", ("--gates", team.gates("nothing", NOTHING_ASKED))
    for _ in range(2):
        team.register(team.weak, name)
    team.registry("promote", f"{name}/1", "--to", "production", *nothing)
    for alias in ("challenger", "production"):
        assert (
            f"{name}/2 is {alias} now" in team.registry("promote", f"{name}/2", "--to", alias, *nothing, **releaser).stdout
        )
    left = {"challenger": "2"} if right == "EDIT" else {}
    assert team.aliases(name) == {"production": "2", "previous": "1", **left}
    team.registry("rollback", name, **releaser)
    assert team.aliases(name)["production"] == "1"
    assert {e["state"] for e in _entries(team, name)} == {"committed"}


def test_the_rows_of_an_example_are_what_the_version_predicts(team):
    """The logged output, compared with the saved model's own prediction."""
    from models.loading import load_model
    from pipelines.registry.verification import Example

    source = team.client.get_model_version_download_uri("planes-det", "1")
    if team.store is None:
        content = (Path(source) / "artifacts" / "example.json").read_bytes()
    else:
        key = f"artefacts/{source.partition(':/')[2].strip('/')}/artifacts/example.json"
        content = team.store.s3.get_object(Bucket=BUCKET, Key=key)["Body"].read()
    example = Example.model_validate_json(content)
    folder = next((Path(str(team.weak)).parents[1]).glob("planes-det-*/model"))
    (found,) = load_model(folder, "cpu").predict([example.decoded()])
    np.testing.assert_allclose([r.score for r in example.rows], found.scores, atol=1e-4)


def test_verify_tells_a_version_that_predicts_something_else(team):
    if team.store is not None:
        pytest.skip("files are changed where they lie, in a folder")
    team.register(team.good, "drifted")
    path = Path(team.client.get_model_version_download_uri("drifted", "1")) / "artifacts" / "example.json"
    logged = json.loads(path.read_text())
    for rows, message in (
        ([*logged["rows"], {**_ROW, "score": 0.5}], rf"FAIL +example +{len(logged['rows'])} planes, \d+ "),
        ([{"x1": 1}], "FAIL +example +.*is damaged"),
        ([{**_ROW, "score": 0.5, "mask_size": [9, 10**9], "mask_counts": "11"}], "FAIL +example +.*is damaged"),
    ):
        path.write_text(json.dumps({**logged, "rows": rows}))
        done = team.registry("verify", "drifted", code=1)
        assert re.search(message, done.stdout), done.stdout
        assert "Traceback" not in done.stderr
    path.write_text("{")
    assert "is damaged" in team.registry("verify", "drifted", code=1).stdout
    path.unlink()
    assert re.search(r"\? +example +no output was logged", team.registry("verify", "drifted").stdout)


def test_two_versions_differ_in_data_and_code(team, root):
    commits = subprocess.run(["git", "log", "--format=%H", "-2"], cwd=root, capture_output=True, text=True).stdout.split()
    for commit, digest in zip((commits * 2)[:2] or ["0" * 40, "1" * 40], ("a" * 16, "b" * 16), strict=True):
        team.register(team.weak, "twins", git_commit=commit, data_digest=digest)
    told = json.loads(team.registry("diff", "twins/1", "twins/2", "--json").stdout)
    rows = {(r["section"], r["key"]): (r["twins/1"], r["twins/2"]) for r in told["rows"]}
    assert rows["data", "data_digest"] == ("a" * 16, "b" * 16)
    if len(commits) == 2:
        assert rows["code", "git_commit"] == tuple(commits)
