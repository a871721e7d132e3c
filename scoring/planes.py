"""The command ``planes``: every other one under one name."""

from __future__ import annotations

from importlib import import_module

import click

from pipelines.steps.commands import Group

# Name -> module of its command, and its help in a line; modules are imported when they are called.
COMMANDS = {
    "doctor": ("pipelines.steps.doctor", "What of this machine and environment the commands find, and what is missing."),
    "prepare-data": ("pipelines.steps.prepare_data", "Draw the synthetic airfield."),
    "train-unet": ("pipelines.steps.train_unet", "Train a segmenter of planes in their box crops."),
    "train-detector": ("pipelines.steps.train_detector", "Train a detector of planes."),
    "train-maskrcnn": ("pipelines.steps.train_maskrcnn", "Train a Mask R-CNN."),
    "ablate": ("pipelines.steps.ablate", "Train variants of a recipe and compare them."),
    "compose": ("pipelines.steps.compose", "Compose a detector and a segmenter."),
    "import-model": ("pipelines.steps.import_model", "Register weights that were trained elsewhere."),
    "score": ("scoring.cli", "Score images; compare, evaluate and export what was scored."),
    "registry": ("pipelines.steps.registry_cli", "Promote, roll back, show, verify, copy versions."),
    "demo": ("scoring.demo", "The whole line once."),
}


class _Commands(Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        """Names, in the order of the work."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command itself."""
        if cmd_name not in COMMANDS:
            return None
        command: click.Command = import_module(COMMANDS[cmd_name][0]).main
        return command

    def elsewhere(self, name: str) -> str:
        """Commands of `score` and `registry` by their names alone."""
        for group in ("score", "registry"):
            command = self.get_command(click.Context(self), group)
            if isinstance(command, click.Group) and name in command.commands:
                return f"did you mean {group} {name}?"
        return ""

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Without importing any."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in COMMANDS.items()])


@click.command(
    cls=_Commands,
    context_settings={"max_content_width": 110},
    examples=(
        "planes doctor",
        "planes train-detector --recipe detector_scratch --data path/to/yours",
        'planes score --model planes-det/production --data "photos/*.jpg"',
    ),
)
@click.version_option(package_name="planes")
def main() -> None:
    """Find and outline planes in aerial images, with models that MLflow tracks."""


if __name__ == "__main__":
    main()
