"""What all commands have in common: headings, examples, hints, options from the environment, JSON, quiet, exit codes."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import click
import pytest
from click.testing import CliRunner

from models.errors import DataError, did_you_mean
from pipelines.steps.cli_support import friendly, show_progress, terminal_bar
from pipelines.steps.commands import COMMAND_LINE_ALONE, Command, Group, option_name
from pipelines.steps.promote import main as promote_step
from pipelines.steps.registry_cli import main as registry
from pipelines.steps.reporting import end, record
from scoring.cli import main as score
from scoring.planes import COMMANDS
from scoring.planes import main as planes

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent


def _all() -> Iterator[tuple[str, click.Command]]:
    """Every command of ours by how it is called."""
    tops = {f"planes {name}": import_module(module).main for name, (module, _) in COMMANDS.items()}
    for name, command in {**tops, "promote": promote_step}.items():
        yield name, command
        if isinstance(command, click.Group):
            yield from ((f"{name} {inner}", one) for inner, one in command.commands.items())


ALL = dict(_all())


@pytest.mark.parametrize("name", ALL)
def test_every_option_stands_below_one_heading(name):
    command = ALL[name]
    assert isinstance(command, Command)
    placed = [param for names in command.headings.values() for param in names]
    assert len(placed) == len(set(placed))
    params = {param.name for param in command.params if isinstance(param, click.Option)}
    # Those of trainings are shared, and a U-Net has no engines.
    assert set(placed) <= params or set(placed) - params == {"engine", "scores_from"}
    if len(params) > 8:
        assert command.headings, "so many options need headings"
        assert params - set(placed) <= {"as_json", "quiet", "version"}
    shown = CliRunner().invoke(command, ["--help"], prog_name=name).output
    for heading in command.headings:
        assert f"\n{heading}:\n" in shown
    options = [option_name(param) for param in command.params if isinstance(param, click.Option)]
    for option in options:
        # As an option of its own line, once.
        assert len(re.findall(rf"^  --{option}\b(?!-)", shown, re.M)) == 1, option


@pytest.mark.parametrize("name", ALL)
def test_every_command_shows_an_example_that_it_takes(name):
    command = ALL[name]
    assert command.examples
    shown = CliRunner().invoke(command, ["--help"], prog_name=name).output
    for line in re.sub(r"\\\n\s*", "", "\n".join(command.examples)).splitlines():
        words = shlex.split(line)
        first = {"planes": planes, "score": score, "planes-registry": registry, "python": promote_step}[words[0]]
        given = words[3:] if words[0] == "python" else words[1:]
        inner: click.Command = first
        while isinstance(inner, click.Group) and given and not given[0].startswith("-"):
            found = inner.get_command(click.Context(inner), given[0])
            assert found is not None, line
            inner, given = found, given[1:]
        assert inner is command or isinstance(command, click.Group)
        inner.make_context("example", list(given))
    for line in command.examples:
        assert f"  {line}\n" in shown


@pytest.mark.parametrize(
    ("command", "words", "said"),
    [
        (score, "compar a b", "No such command 'compar'; did you mean compare?"),
        (score, "run --model a", "there are: compare, evaluate, export, view; to score images: score --model"),
        (score, "--modle a", "--model"),
        (score, "compare a --dta x", "(Possible options: --data, --out)"),
        (score, "--runner rai", "'rai' is not one of 'local', 'ray'"),
        (registry, "promot planes-det", "No such command 'promot'; did you mean promote?"),
        (planes, "train", "did you mean train-unet"),
        (planes, "train_detector", "did you mean train-detector"),
        (planes, "promote planes-det", "did you mean registry promote?"),
        (planes, "view folder", "did you mean score view?"),
        (planes, "xyzzy", "there are: doctor, prepare-data"),
    ],
)
def test_a_mistyped_word_is_answered_with_the_nearest(command, words, said):
    done = CliRunner().invoke(command, words.split())
    assert (done.exit_code, done.stdout) == (2, "")
    assert said in done.stderr


def test_the_nearest_of_names():
    assert did_you_mean("prodution", ["latest", "production"]) == "; did you mean production?"
    assert did_you_mean("x", ["production"]) == did_you_mean("production", []) == ""


# The environment.


def _of_environment() -> dict[str, click.Option]:
    found: dict[str, click.Option] = {}
    for command in {id(c): c for c in ALL.values()}.values():
        if isinstance(command, Command) and not isinstance(command, Group):
            twice = set(found) & set(command.variables())
            assert not twice, twice
            found |= command.variables()
    return found


def test_variables_of_options_are_no_others():
    named: set[str] = set()
    for path in (p for folder in ("models", "pipelines", "scoring", "tests") for p in (ROOT / folder).rglob("*.py")):
        if path != Path(__file__):
            named |= set(re.findall(r"\bPLANES_[A-Z_]*[A-Z]\b", path.read_text()))
    known = {*_of_environment(), *score.variables(), *registry.variables()}
    assert {"PLANES_CACHE", "PLANES_TRACEBACK"} <= named
    assert not named & known
    # Nor may they look like options with a mistake in the name.
    begins = {f"{command.env}_" for command in ALL.values() if isinstance(command, Command) and command.env}
    prefixes = {text.rstrip("_") for text in begins}
    assert not [name for name in named - prefixes if name.startswith(tuple(begins))]
    assert all(name.startswith("PLANES_") for name in known)
    assert "PLANES_SCORE_COMPARE_DATA" in score.variables()


@pytest.fixture
def seen(monkeypatch):
    """What `score` and `score compare` would be called with."""
    from scoring import cli

    calls: list[dict] = []
    monkeypatch.setattr(cli, "_score", lambda **options: calls.append(options))
    monkeypatch.setattr(cli, "_compare", lambda names, options: calls.append({"names": names, **options}))
    return calls


def test_options_come_from_the_environment(seen, monkeypatch):
    monkeypatch.setenv("PLANES_SCORE_MODEL", "planes-det/1 planes-det/2")
    monkeypatch.setenv("PLANES_SCORE_DATA", "survey")
    monkeypatch.setenv("PLANES_SCORE_UPDATE", "1")
    monkeypatch.setenv("PLANES_SCORE_TILE_OVERLAP", "0.3")
    monkeypatch.setenv("PLANES_SCORE_COMPARE_DATA", "other")
    for command, before in ((score, []), (planes, ["score"])):
        assert CliRunner().invoke(command, before).exit_code == 0
        one = seen.pop()
        assert (one["models"], one["data"], one["update"], one["tile_overlap"]) == (
            ("planes-det/1", "planes-det/2"),
            "survey",
            True,
            "0.3",
        )
        # The command line goes before.
        assert CliRunner().invoke(command, [*before, "--data", "here"]).exit_code == 0
        assert seen.pop()["data"] == "here"
        assert CliRunner().invoke(command, [*before, "compare", "a"]).exit_code == 0
        assert seen.pop()["data"] == "other"


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("PLANES_SCORE_MODLE", "no option has this name; did you mean PLANES_SCORE_MODEL?"),
        ("PLANES_SCORE_FRESH", "--fresh is taken from the command line alone"),
        ("PLANES_SCORE_VERSION", "--version is taken from the command line alone"),
        ("PLANES_SCORE_MAX_ERRORS", "environment variable PLANES_SCORE_MAX_ERRORS: 'x' is not a valid float"),
    ],
)
def test_a_variable_that_would_do_nothing_is_refused(seen, monkeypatch, name, said):
    monkeypatch.setenv(name, "x")
    done = CliRunner().invoke(score, ["--model", "a", "--data", "b"])
    assert (done.exit_code, seen) == (2, [])
    assert said in done.stderr


def test_what_overrules_is_said_on_the_command_line_alone():
    options = {option_name(o) for c in ALL.values() for o in c.params if isinstance(o, click.Option)}
    assert {"fresh", "force", "yes", "unchecked"} <= options & set(COMMAND_LINE_ALONE)
    for command in ALL.values():
        for option in command.params:
            if isinstance(option, click.Option) and option_name(option) in COMMAND_LINE_ALONE:
                assert option.envvar is None or (option_name(option) == "version" and "rollback" in option.envvar.lower())


# JSON, quiet, exit codes.


def _command(body):
    @click.command(cls=Command, reports=True)
    @friendly
    def main() -> None:
        body()

    return main


def _work():
    import logging

    logging.getLogger("scoring.somewhere").info("a line of ours")
    logging.getLogger("models.somewhere").warning("a warning")
    print("a line of a library")
    click.echo("a table")
    list(show_progress(range(2), 2, "images"))
    record(metrics={"AP": 0.5, "APs": float("nan")}, folder=Path("out"))


def test_json_is_all_that_stdout_holds():
    done = CliRunner().invoke(_command(_work), ["--json"], prog_name="work")
    assert done.exit_code == 0
    assert json.loads(done.stdout) == {
        "command": "work",
        "exit_code": 0,
        "error": None,
        "metrics": {"AP": 0.5, "APs": None},
        "folder": "out",
    }
    for line in ("a line of ours", "a line of a library", "a table", "images: 2/2"):
        assert line in done.stderr
    plain = CliRunner().invoke(_command(_work), [])
    assert plain.stderr == "a warning\n"
    assert "a line of ours" in plain.stdout
    assert "{" not in plain.stdout


def test_quiet_says_nothing_but_errors(monkeypatch):
    done = CliRunner().invoke(_command(_work), ["--quiet"])
    assert (done.exit_code, done.output) == (0, "")
    both = CliRunner().invoke(_command(_work), ["--quiet", "--json"])
    assert both.stderr == ""
    assert json.loads(both.stdout)["folder"] == "out"

    def fail() -> None:
        raise DataError("here: no such file")

    done = CliRunner().invoke(_command(fail), ["--quiet"])
    assert (done.exit_code, done.stdout, done.stderr) == (1, "", "Error: here: no such file\n")
    # A bar neither, where there is a terminal.
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    bars = []
    for option in ([], ["--quiet"]):
        CliRunner().invoke(_command(lambda: bars.append(terminal_bar())), option)
    assert (bars[0] is None, bars[1]) == (False, None)


def _raise(error):
    def body() -> None:
        record(folder="out")
        raise error

    return body


def _many_errors() -> None:
    end(3, "50 % of the images failed")


@pytest.mark.parametrize(
    ("body", "code", "said"),
    [
        (_raise(DataError("a\n b")), 1, "a b"),
        (_raise(click.UsageError("give --model")), 2, "give --model"),
        (_raise(KeyboardInterrupt()), 130, "interrupted"),
        (_many_errors, 3, "50 % of the images failed"),
        (_raise(ZeroDivisionError("a mistake of ours")), 1, "a mistake of ours"),
    ],
)
def test_errors_are_in_the_object_too(body, code, said):
    done = CliRunner().invoke(_command(body), ["--json"])
    told = json.loads(done.stdout)
    assert (done.exit_code, told["exit_code"], told["error"]) == (code, code, said)
    if body is not _many_errors:
        assert told["folder"] == "out"


def test_a_groups_own_option_is_not_that_of_its_commands(seen):
    done = CliRunner().invoke(score, ["compare", "a"])
    assert (done.exit_code, done.stdout) == (0, "")
    assert len(seen) == 1


# Completion.


def _completed(program: str, words: str, shell: str = "bash") -> list[str]:
    """What the real console script proposes for the last word."""
    script = BIN / program
    if not script.exists():
        pytest.skip("the package is not installed, so there are no console scripts")
    variable = f"_{program.upper().replace('-', '_')}_COMPLETE"
    given = words.split(" ")
    env = {**os.environ, variable: f"{shell}_complete", "COMP_WORDS": words, "COMP_CWORD": str(len(given) - 1)}
    env["PYTHONPATH"] = str(ROOT)
    if shell == "fish":
        env["COMP_CWORD"] = given[-1]
    done = subprocess.run([script], env=env, capture_output=True, text=True, check=False)
    assert done.stderr == ""
    return done.stdout.split()


@pytest.mark.parametrize(
    ("program", "words", "proposed"),
    [
        ("planes", "planes tr", ["plain,train-unet", "plain,train-detector", "plain,train-maskrcnn"]),
        ("planes", "planes score com", ["plain,compare"]),
        ("planes", "planes registry prom", ["plain,promote"]),
        ("planes", "planes trian-unet --re", []),
        ("score", "score e", ["plain,evaluate", "plain,export"]),
        ("score", "score --ti", ["plain,--tile", "plain,--tile-overlap"]),
        ("score", "score --runner ", ["plain,local", "plain,ray"]),
        ("score", "score --data pho", ["file,pho"]),
        ("score", "score compare pre", ["file,pre"]),
        ("planes-registry", "planes-registry ro", ["plain,rollback"]),
        ("planes-registry", "planes-registry promote a --dr", ["plain,--dry-run"]),
    ],
)
def test_commands_options_and_files_are_completed(program, words, proposed):
    found = _completed(program, words)
    assert [line for line in found if line in proposed] == proposed
    assert bool(found) == bool(proposed)


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_other_shells(shell):
    found = _completed("score", "score com", shell)
    assert "compare" in "\n".join(found)


@pytest.mark.parametrize("program", ["planes", "score", "planes-registry"])
def test_the_scripts_of_the_shells(program):
    script = BIN / program
    if not script.exists():
        pytest.skip("the package is not installed, so there are no console scripts")
    variable = f"_{program.upper().replace('-', '_')}_COMPLETE"
    for shell in ("bash", "zsh", "fish"):
        env = {**os.environ, "PYTHONPATH": str(ROOT), variable: f"{shell}_source"}
        done = subprocess.run([script], env=env, capture_output=True, text=True, check=True)
        assert program in done.stdout
        assert variable in done.stdout


def test_completion_imports_nothing_heavy():
    code = (
        "import sys\nfrom scoring.planes import main\n"
        "try:\n    main(prog_name='planes')\nexcept SystemExit:\n    pass\n"
        "heavy = {'torch', 'mlflow', 'pandas', 'numpy', 'cv2', 'ray', 'pydantic'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    for words in ("planes ", "planes score --", "planes train-detector --", "planes registry promote --"):
        env = {**os.environ, "PYTHONPATH": str(ROOT), "_PLANES_COMPLETE": "bash_complete", "COMP_WORDS": words}
        env["COMP_CWORD"] = str(len(words.split(" ")) - 1)
        done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stderr) == (0, ""), words
        assert done.stdout


def test_no_help_loads_anything_heavy():
    code = (
        "import sys\nfrom scoring.planes import COMMANDS, main\n"
        "for name in COMMANDS:\n"
        "    try:\n        main([name, '--help'])\n    except SystemExit:\n        pass\n"
        "    heavy = {'torch', 'mlflow', 'pandas', 'numpy', 'cv2', 'ray', 'pydantic', 'rich'} & set(sys.modules)\n"
        "    assert not heavy, (name, heavy)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT)
    assert (done.returncode, done.stderr) == (0, "")


def test_ctrl_c_is_told_to_scripts(monkeypatch):
    @click.command(cls=Command, reports=True)
    def stopped():
        raise KeyboardInterrupt

    done = CliRunner().invoke(stopped, ["--json"])
    assert done.exit_code == 130
    found = json.loads(done.stdout)
    assert (found["exit_code"], found["error"]) == (130, "interrupted")


def test_json_is_readable_whatever_the_stream_can_write():
    @click.command(cls=Command, reports=True)
    def told():
        record(folder="o\udce9 ü")

    done = CliRunner(charset="ascii").invoke(told, ["--json"])
    assert done.exit_code == 0
    assert json.loads(done.stdout)["folder"] == "o\udce9 ü"


def test_options_for_scripts_do_not_stand_before_the_command():
    from scoring.cli import main

    for option in ("--json", "--quiet"):
        done = CliRunner().invoke(main, [option, "evaluate", "a.csv", "--data", "b"])
        assert done.exit_code == 2
        assert f"{option} stands after the command: main evaluate {option}" in done.stderr


def test_what_comes_from_the_environment_is_said(monkeypatch):
    @click.command(cls=Command, env="PLANES_TRIED", reports=True)
    @click.option("--tile")
    @click.option("--version", "which")
    def tried(tile, which):
        click.echo(f"{tile} {which}")

    monkeypatch.setenv("PLANES_TRIED_TILE", "256")
    monkeypatch.setenv("PLANES_TRIED_VERSION", "3")
    done = CliRunner().invoke(tried, [])
    assert (done.stdout, done.stderr) == (
        "256 3\n",
        "tried: --tile from PLANES_TRIED_TILE, --version from PLANES_TRIED_VERSION\n",
    )
    assert CliRunner().invoke(tried, ["--quiet"]).stderr == ""
    assert CliRunner().invoke(tried, ["--tile", "8", "--version", "1"]).stderr == ""


def test_quotes_hold_what_belongs_together_also_in_variables():
    from pipelines.steps.options import split_words

    # As click hands over what a variable holds.
    assert split_words(("data.category='my", "plane'", "steps=3")) == ["data.category=my plane", "steps=3"]
    assert split_words(("a=1 b=2", "c=3")) == ["a=1", "b=2", "c=3"]
    with pytest.raises(click.UsageError, match="a quote is not closed"):
        split_words(("data.category='my",))


def test_what_a_store_did_not_take_is_told_to_scripts(tmp_path, monkeypatch):
    from scoring import use_cases

    def lost(*_):
        raise use_cases.NotLogged(
            "m/1: scored, but not logged", [SimpleNamespace(facts={"folder": tmp_path, "unlogged": "away"})]
        )

    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    monkeypatch.setattr(use_cases, "score", lost)
    done = CliRunner().invoke(score, ["--model", "m/1", "--data", str(tmp_path), "--json"])
    found = json.loads(done.stdout)
    assert (done.exit_code, found["jobs"]) == (1, [{"folder": str(tmp_path), "unlogged": "away"}])
    assert "scored, but not logged" in found["error"]
