"""From the fields of a config class to click's options, and from a command line to a config."""

import dataclasses
import math
import typing
from collections.abc import Callable
from typing import Any, TypeVar

import click

from softcache.base.arguments import check_bool, check_integer, check_number, check_text, type_error
from softcache.base.errors import UsageError

from .option_groups import HEADINGS

Config = TypeVar("Config")
Command = Callable[..., Any]


def add_options(config: type[Any]) -> Callable[[Command], Command]:
    """Return a decorator that gives a command an option for each field of a config class."""

    def decorate(command: Command) -> Command:
        hints = typing.get_type_hints(config)
        for field in reversed(dataclasses.fields(config)):
            command = _make_option(config, field, hints[field.name])(command)
        return command

    return decorate


def to_flag(name: str) -> str:
    """Return the option of a field: `learning_rate` -> `--learning-rate`."""
    return "--" + name.replace("_", "-")


class Option(click.Option):
    """An option that has a heading in `--help`."""

    def __init__(self, *args: Any, heading: str, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.heading = heading


@dataclasses.dataclass
class Invocation:
    """How the program was called, beside the options of its command; the `obj` of click's contexts.

    Attributes:
        show_traceback: print the traceback of every error, also of one that gets a line alone.
    """

    show_traceback: bool = False


def make_traceback_option() -> Option:
    """Make the option --traceback, which every command has, and the program itself before the command's name."""

    def store(context: click.Context, parameter: click.Parameter, value: bool) -> None:
        if value and isinstance(context.obj, Invocation):
            context.obj.show_traceback = True

    return Option(
        ["--traceback"],
        is_flag=True,
        is_eager=True,  # it also holds for an error of the command line
        expose_value=False,
        callback=store,
        heading="Output",
        help="Print the whole traceback of an error, also of one in code of yours.",
    )


class GroupedOptionsCommand(click.Command):
    """A command whose `--help` lists its options under their headings; each has --traceback."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.params.append(make_traceback_option())

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the options, heading by heading."""
        sections: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            if (record := parameter.get_help_record(ctx)) is not None:
                heading = parameter.heading if isinstance(parameter, Option) else "Other"
                sections.setdefault(heading, []).append(record)
        for heading in sorted(sections, key=HEADINGS.index):
            with formatter.section(heading):
                formatter.write_dl(sections[heading])


class SectionedGroup(click.Group):
    """A group whose `--help` lists its commands under headings.

    Attributes:
        sections: {heading: names of commands}.
    """

    command_class = GroupedOptionsCommand
    sections: typing.ClassVar[dict[str, tuple[str, ...]]] = {}

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.params.append(make_traceback_option())

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the commands, heading by heading."""
        width = formatter.width - 6 - max(map(len, self.commands))
        for heading, names in self.sections.items():
            with formatter.section(heading):
                formatter.write_dl([(name, self.commands[name].get_short_help_str(width)) for name in names])


def _make_option(config: type[Any], field: dataclasses.Field[Any], hint: Any) -> Callable[[Command], Command]:
    name, more = to_flag(field.name), field.metadata
    kwargs: dict[str, Any] = {"cls": Option, "heading": _find_heading(config, field.name), "help": more["help"]}
    if hint is bool:
        names = f"{name}/--no-{name[2:]}" if more.get("switch") else name
        return click.option(names, default=field.default, is_flag=True, **kwargs)
    if more.get("by_recipe"):
        kwargs["show_default"] = "by data set"
    elif field.default not in ("", (), -1):  # -1: taken from another option, which the help names
        kwargs["show_default"] = True
    if typing.get_origin(hint) is tuple:
        return click.option(name, multiple=True, type=typing.get_args(hint)[0], **kwargs)
    kind = _ChoiceOrEmpty(more["choices"]) if "choices" in more else hint
    return click.option(name, default=field.default, type=kind, **kwargs)


def _find_heading(config: type[Any], name: str) -> str:
    """Return the heading of the class that declares a field first; a class that overrides it does not move it."""
    declaring = [base for base in config.__mro__ if name in vars(base).get("__annotations__", {})]
    return str(getattr(declaring[-1], "heading", "Other"))


class _ChoiceOrEmpty(click.Choice[str]):
    """A choice that may also be left empty, as a default is."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        return value if value == "" else super().convert(value, param, ctx)


def read_options(context: click.Context, config: type[Config]) -> tuple[Config, set[str]]:
    """Read the options that a command was called with.

    Args:
        context: of the command.
        config: its config class.

    Returns:
        The config, and the names of the options that were typed: a default that was typed is among them.

    Raises:
        click.UsageError: names every value outside its range at once.
    """
    fields = dataclasses.fields(config)  # type: ignore[arg-type]
    commandline = click.core.ParameterSource.COMMANDLINE
    explicit = {field.name for field in fields if context.get_parameter_source(field.name) is commandline}
    values = {field.name: context.params[field.name] for field in fields}
    problems = [p for f in fields if f.name in explicit and (p := _check_range(f, values[f.name]))]
    if problems:
        raise click.UsageError("; ".join(problems), context)
    return config(**values), explicit


def _check_range(field: dataclasses.Field[Any], value: Any) -> str:
    if isinstance(value, tuple):
        return next((problem for item in value if (problem := _check_range(field, item))), "")
    if value == "":  # an unset variable of a script, not a wish for the default
        return f"{to_flag(field.name)} is empty"
    if isinstance(value, float) and not math.isfinite(value):
        return f"{to_flag(field.name)} {value} is not a finite number"
    least, most = field.metadata.get("least"), field.metadata.get("most")
    if least is not None and not value >= least:
        return f"{to_flag(field.name)} {value} is below {least}"
    if most is not None and not value <= most:
        return f"{to_flag(field.name)} {value} is above {most}"
    return ""


def check_value(field: dataclasses.Field[Any], value: Any) -> Any:
    """Check a value that did not come from the command line: one of settings.json, or of a call in Python.

    Args:
        field: of the option.
        value: the value; the default is always accepted.

    Returns:
        The value; a number of NumPy as one of Python.

    Raises:
        UsageError: it is of another type, no choice, not finite or out of range.
    """
    name, default, metadata = field.name, field.default, field.metadata
    if isinstance(default, bool):
        return check_bool(name, value)
    if isinstance(default, tuple):
        if not isinstance(value, tuple) or not all(isinstance(item, str) for item in value):
            raise type_error(name, value, "a tuple of str")
        return value
    if isinstance(default, str):
        choices = metadata.get("choices")
        if choices and check_text(name, value) != default and value not in choices:
            raise UsageError(f"{name}='{value}': there are {', '.join(choices)}")
        return check_text(name, value)
    value = check_integer(name, value) if isinstance(default, int) else check_number(name, value)
    least, most = metadata.get("least"), metadata.get("most")
    if value != default and ((least is not None and value < least) or (most is not None and value > most)):
        raise UsageError(f"{name}={value} is not {_format_range(least, most)}")
    return value


def _format_range(least: float | None, most: float | None) -> str:
    if most is None:
        return f"at least {least:g}"
    return f"between {least:g} and {most:g}" if least is not None else f"at most {most:g}"
