"""Settings class -> click options, and what was said on the command line -> settings."""

import dataclasses
import typing
from collections.abc import Callable
from typing import Any, TypeVar

import click

S = TypeVar("S")
Command = Callable[..., Any]


def add_options(config: type[Any]) -> Callable[[Command], Command]:
    """A decorator that gives a command one option per field of a settings class."""

    def decorate(command: Command) -> Command:
        hints = typing.get_type_hints(config)
        for field in reversed(dataclasses.fields(config)):
            command = _option(field, hints[field.name])(command)
        return command

    return decorate


def to_flag(name: str) -> str:
    """`learning_rate` -> `--learning-rate`."""
    return "--" + name.replace("_", "-")


def _option(field: dataclasses.Field[Any], hint: Any) -> Callable[[Command], Command]:
    name, more = to_flag(field.name), field.metadata
    if hint is bool:
        names = f"{name}/--no-{name[2:]}" if more.get("switch") else name
        return click.option(names, default=field.default, is_flag=True, help=more["help"])
    if typing.get_origin(hint) is tuple:
        return click.option(name, multiple=True, type=typing.get_args(hint)[0], help=more["help"])
    kind = _OneOf(more["choices"]) if "choices" in more else hint
    shown = not more["help"].endswith("by recipe.") and field.default != ""
    return click.option(name, default=field.default, type=kind, show_default=shown, help=more["help"])


class _OneOf(click.Choice[str]):
    """A choice that may also be left empty, as a default is."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        return value if value == "" else super().convert(value, param, ctx)


def read_options(context: click.Context, config: type[S]) -> tuple[S, set[str]]:
    """The settings that a command was called with, and the names of those that were said and not default.

    Raises click.UsageError that names every value outside its range at once.
    """
    fields = dataclasses.fields(config)  # type: ignore[arg-type]
    commandline = click.core.ParameterSource.COMMANDLINE
    said = {f.name for f in fields if context.get_parameter_source(f.name) is commandline}
    values = {f.name: context.params[f.name] for f in fields}
    problems = [p for f in fields if f.name in said and (p := _check_range(f, values[f.name]))]
    if problems:
        raise click.UsageError("; ".join(problems), context)
    return config(**values), said


def _check_range(field: dataclasses.Field[Any], value: Any) -> str:
    if isinstance(value, tuple):
        return next((problem for one in value if (problem := _check_range(field, one))), "")
    if value == "":  # an unset variable of a script, not a wish for the default
        return f"{to_flag(field.name)} is empty"
    least, most = field.metadata.get("least"), field.metadata.get("most")
    if least is not None and not value >= least:
        return f"{to_flag(field.name)} {value} is below {least}"
    if most is not None and not value <= most:
        return f"{to_flag(field.name)} {value} is above {most}"
    return ""
