"""Commands as all of ours are: options under headings, examples, nearest names, options from the environment.

Only click is imported: ``--help`` and completion must answer at once.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping, Sequence
from typing import Any

import click
from click.core import ParameterSource

from models.errors import did_you_mean
from pipelines.steps.reporting import report_options, reporting

# Said on the command line alone: what throws work away, overrules a check, or ends the command.
COMMAND_LINE_ALONE = ("fresh", "force", "yes", "unchecked")
FOR_SCRIPTS, OTHER = "For scripts", "Other"

Headings = Mapping[str, Sequence[str]]


class Command(click.Command):
    """A command with headings, examples and variables.

    Args:
        headings: heading -> names of the parameters below it; others stand under *Other*.
        examples: lines for the help.
        env: beginning of the environment variables of its options, such as ``PLANES_SCORE``; a group gives one to its own.
        reports: whether it has ``--json`` and ``--quiet``, see `pipelines.steps.reporting`.
    """

    def __init__(
        self,
        *arguments: Any,
        headings: Headings | None = None,
        examples: Sequence[str] = (),
        env: str = "",
        reports: bool = False,
        **settings: Any,
    ) -> None:
        super().__init__(*arguments, **settings)
        self.headings, self.examples, self.env = headings or {}, examples, ""
        if reports:
            self.params = [*self.params, *report_options()]
            self.callback = reporting(self.callback) if self.callback else None
        if env:
            self.set_env(env)

    def set_env(self, env: str) -> None:
        """Let options be given by environment variables that begin with ``env``."""
        self.env = env
        for option in self._options():
            if option.expose_value and option_name(option) not in COMMAND_LINE_ALONE:
                option.envvar = variable(env, option)

    def _options(self) -> list[click.Option]:
        return [param for param in self.params if isinstance(param, click.Option)]

    def variables(self) -> dict[str, click.Option]:
        """Environment variable -> option, of those that may not come from it too."""
        return {variable(self.env, option): option for option in self._options()} if self.env else {}

    def make_context(self, info_name: str | None, args: list[str], parent: Any = None, **extra: Any) -> click.Context:
        """As click does; a variable that belongs to no option is a mistake.

        Raises:
            click.UsageError: there is one.
        """
        if self.env and not extra.get("resilient_parsing"):
            check_environment(self)
        try:
            return super().make_context(info_name, args, parent, **extra)
        except click.BadParameter as error:
            name, option = error.param and error.param.name, error.param
            if error.ctx and option and name and error.ctx.get_parameter_source(name) is ParameterSource.ENVIRONMENT:
                error.message = f"environment variable {option.envvar}: {error.message}"
            raise

    def invoke(self, ctx: click.Context) -> Any:
        """As click does; says what came from the environment, which nobody sees on the command line."""
        given = [
            f"{option.opts[0]} from {option.envvar}"
            for option in self._options()
            if option.name and ctx.get_parameter_source(option.name) is ParameterSource.ENVIRONMENT
        ]
        if given and not ctx.params.get("quiet"):
            click.echo(f"{ctx.command_path}: {', '.join(given)}", err=True)
        return super().invoke(ctx)

    def format_help_text(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The text, and the examples below it."""
        super().format_help_text(ctx, formatter)
        if self.examples:
            with formatter.section("Example" if len(self.examples) == 1 else "Examples"):
                for line in self.examples:
                    formatter.write(f"{'':>{formatter.current_indent}}{line}\n")

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Under their headings; without any in one list."""
        params = self.get_params(ctx)
        below = {name: heading for heading, names in self.headings.items() for name in names}
        below |= {"as_json": FOR_SCRIPTS, "quiet": FOR_SCRIPTS}
        rest = OTHER if self.headings else "Options"
        order = (*self.headings, FOR_SCRIPTS, rest) if self.headings else (rest, FOR_SCRIPTS)
        grouped: dict[str, list[tuple[str, str]]] = {name: [] for name in order}
        for param in params:
            record = param.get_help_record(ctx)
            if record is not None:
                grouped[below.get(param.name or "", rest)].append(record)
        for heading, records in grouped.items():
            if records:
                with formatter.section(heading):
                    formatter.write_dl(records)

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Which variables options may come from."""
        super().format_epilog(ctx, formatter)
        first = next((option for option in self._options() if option.envvar), None)
        if first is not None:
            formatter.write_paragraph()
            formatter.write_text(f"Options may come from the environment too: {first.opts[0]} from {first.envvar}.")


class Group(Command, click.Group):
    """A group of such commands, which names the nearest one.

    Args:
        alone: what to do instead where a word is no command, as a sentence.
    """

    command_class = Command

    def __init__(self, *arguments: Any, alone: str = "", **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self.alone = alone

    def add_command(self, cmd: click.Command, name: str | None = None) -> None:
        """As click does; its variables begin with those of the group."""
        super().add_command(cmd, name)
        if self.env and isinstance(cmd, Command):
            cmd.set_env(f"{self.env}_{(name or cmd.name or '').upper().replace('-', '_')}")

    def variables(self) -> dict[str, click.Option]:
        """Those of its commands too."""
        own = super().variables()
        for command in self.commands.values():
            own |= command.variables() if isinstance(command, Command) else {}
        return own

    def elsewhere(self, name: str) -> str:
        """The command of that name, or nearly so, in another group, as it is called; empty: none."""
        return ""

    def resolve_command(self, ctx: click.Context, args: list[str]) -> tuple[str | None, click.Command | None, list[str]]:
        """As click does, and a hint for what was meant."""
        name = args[0]
        known = self.list_commands(ctx)
        if ctx.resilient_parsing or name in known or name.startswith("-"):
            return super().resolve_command(ctx, args)
        written = name.replace("_", "-")
        near = [written] if written in known else difflib.get_close_matches(written, known, 3)
        hint = f"did you mean {' or '.join(near)}?" if near else self.elsewhere(name)
        raise click.UsageError(f"No such command {name!r}; {hint or 'there are: ' + ', '.join(known)}{self.alone}", ctx)

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Options under their headings, then the commands."""
        Command.format_options(self, ctx, formatter)
        self.format_commands(ctx, formatter)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Each with its whole first sentence."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, self.commands[name].get_short_help_str(200)) for name in self.list_commands(ctx)])


def option_name(option: click.Option) -> str:
    """What an option is called, without dashes before it: of ``--no-reuse`` too it is ``reuse``."""
    return max(option.opts, key=len).lstrip("-")


def variable(env: str, option: click.Option) -> str:
    """The environment variable of an option."""
    return f"{env}_{option_name(option).upper().replace('-', '_')}"


def check_environment(command: Command) -> None:
    """Find what a mistake in the name of a variable would leave without effect.

    Raises:
        click.UsageError: a variable that begins as those of the command and belongs to no option, or to one that is
            said on the command line alone.
    """
    known = command.variables()
    for name in sorted(os.environ):
        if not name.startswith(f"{command.env}_"):
            continue
        if name not in known:
            raise click.UsageError(f"environment variable {name}: no option has this name{did_you_mean(name, known)}")
        if known[name].envvar is None:
            raise click.UsageError(
                f"environment variable {name}: {known[name].opts[0]} is taken from the command line alone"
            )


def files(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[Any]:
    """Complete names of files, for `click.option`'s ``shell_complete``."""
    from click.shell_completion import CompletionItem

    return [CompletionItem(incomplete, type="file")]
