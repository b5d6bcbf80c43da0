"""The command's reference: each command with its arguments and options, as `--help` has them."""

from collections.abc import Iterator
from typing import Any

from typer import Context
from typer.core import TyperGroup
from typer.main import get_command

from syncnorm.cli import app as command_line

PAGE, PLACE = "docs/reference/command", "<!-- the commands -->"


def commands() -> str:
    """All commands as Markdown."""
    group = get_command(command_line)
    assert isinstance(group, TyperGroup)
    return "\n".join(_section(group, Context(group, info_name="syncnorm"), 2))


def _section(command: Any, context: Context, level: int) -> Iterator[str]:
    usage = " ".join([context.command_path, *command.collect_usage_pieces(context)])
    if level > 2 or not isinstance(command, TyperGroup):
        yield f"\n{'#' * (level - 1)} {context.command_path}\n"
        yield f"```text\n{usage}\n```\n"
        yield command.help + "\n"
        records = [each.get_help_record(context) for each in command.params]
        for names, text in filter(None, records):
            yield f"`{names}`\n: {text}\n"
    if isinstance(command, TyperGroup):
        for name in command.list_commands(context):
            each = command.get_command(context, name)
            yield from _section(each, Context(each, info_name=name, parent=context), level + 1)


def fill(app: Any, page: str, source: list[str]) -> None:
    """Put the commands into their page."""
    if page == PAGE:
        source[0] = source[0].replace(PLACE, commands())


def setup(app: Any) -> dict[str, bool]:
    """Register with Sphinx."""
    app.connect("source-read", fill)
    return {"parallel_read_safe": True}
