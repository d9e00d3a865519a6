"""`python -m softcache.stages.make_variables COMMAND NAME=VALUE …`: make's variables as the options of a command.

LEARNING_RATE=0.1 is `--learning-rate 0.1`. A flag is 1 or 0. The value of an option that may be repeated is split at
blanks, as a shell does: LOSS='kd hard:weight=0.1' is `--loss kd --loss hard:weight=0.1`. A name may come twice; the
last one counts.

Before COMMAND may stand `--check`: nothing is run, the options of `student` are checked, so that a wrong name is found
before a cache is made; or `--typed make TARGET NAME=VALUE … --`, the command line of make of which this is one step,
for the message that says how to continue.
"""

import shlex
import sys

import click

from softcache.stages.cli.configs import StudentsConfig
from softcache.stages.cli.options import read_options, to_flag
from softcache.stages.cli.run_command import run_command
from softcache.stages.cli.typed_command import remember_make_command

from .main import commands, main


def to_arguments(command: str, variables: list[str]) -> list[str]:
    """Return the command line of a command.

    Args:
        command: its name.
        variables: "NAME=VALUE" each. One that the command does not know becomes an option all the same, so that the
            command itself reports it, with the nearest name that exists.

    Raises:
        click.UsageError: A flag is neither 1 nor 0, or a quote in a value is not closed.
    """
    options = {parameter.name: parameter for parameter in commands.commands[command].params}
    values = dict(variable.split("=", 1) for variable in variables)
    arguments = [command]
    for name, value in values.items():
        if not value:
            raise click.UsageError(f"{name}= is empty: give it a value, or leave it out")
        flag, option = to_flag(name.lower()), options.get(name.lower())
        if isinstance(option, click.Option) and option.is_flag:
            if value not in ("0", "1"):
                raise click.UsageError(f"{name}={value}: {name} is 1 or 0")
            arguments += [flag] if value == "1" else option.secondary_opts
        elif option is not None and option.multiple:
            arguments += [text for word in _split(name, value) for text in (flag, word)]
        else:
            arguments += [flag, value]
    return arguments


def _split(name: str, value: str) -> list[str]:
    """Split a value at blanks, as a shell does. Raises click.UsageError for a quote that is not closed."""
    try:
        return shlex.split(value)
    except ValueError as error:
        raise click.UsageError(f"{name}={value}: {error}") from None


def run(words: list[str]) -> None:
    """Run a command with variables, or with --check check them alone. Exits with code 2 and one line for a wrong one.

    Args:
        words: [--check] [--typed make TARGET NAME=VALUE … --] COMMAND NAME=VALUE …
    """
    is_check = words[0] == "--check"
    if is_check:
        words = words[1:]
    elif words[0] == "--typed":
        end = words.index("--")
        remember_make_command(words[1:end])
        words = words[end + 1 :]
    command, *variables = words
    try:
        line = to_arguments(command, variables)
        context = commands.commands[command].make_context(f"softcache {command}", line[1:]) if is_check else None
    except click.ClickException as error:
        error.show()
        sys.exit(2)
    if context is None:
        print("softcache", shlex.join(line), file=sys.stderr)
        main(line)
    else:
        run_command(lambda: _check_students(context))


def _check_students(context: click.Context) -> None:
    from .student.several_students import check_options

    check_options(*read_options(context, StudentsConfig))


if __name__ == "__main__":
    run(sys.argv[1:])
