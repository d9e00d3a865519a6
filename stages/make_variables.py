"""`python -m softcache.stages.make_variables COMMAND NAME=VALUE …`: make's variables as the options of a command.

LEARNING_RATE=0.1 is `--learning-rate 0.1`. A flag is 1 or 0. The value of an option that may be repeated is split at
blanks, as a shell does: LOSS='kd hard:weight=0.1' is `--loss kd --loss hard:weight=0.1`. A name may come twice; the
last one counts. With `--check` before COMMAND nothing is run: a wrong name is found before a cache is made.
"""

import shlex
import sys

import click

from softcache.stages.cli.options import to_flag

from .main import commands, main


def to_arguments(command: str, variables: list[str]) -> list[str]:
    """Return the command line of a command.

    Args:
        command: its name.
        variables: "NAME=VALUE" each. One that the command does not know becomes an option all the same, so that the
            command itself reports it, with the nearest name that exists.
    """
    options = {parameter.name: parameter for parameter in commands.commands[command].params}
    values = dict(variable.split("=", 1) for variable in variables)
    arguments = [command]
    for name, value in values.items():
        flag, option = to_flag(name.lower()), options.get(name.lower())
        if isinstance(option, click.Option) and option.is_flag and value in ("0", "1"):
            arguments += [flag] if value == "1" else option.secondary_opts
        elif option is not None and option.multiple:
            arguments += [text for word in shlex.split(value) for text in (flag, word)]
        else:
            arguments += [flag, value]
    return arguments


def check(line: list[str]) -> None:
    """Parse a command line and run nothing. Exits with code 2 and one line where it is wrong."""
    try:
        commands.commands[line[0]].make_context(f"softcache {line[0]}", line[1:])
    except click.ClickException as error:
        error.show()
        sys.exit(2)


if __name__ == "__main__":
    only_check, words = sys.argv[1] == "--check", [word for word in sys.argv[1:] if word != "--check"]
    line = to_arguments(words[0], words[1:])
    if only_check:
        check(line)
    else:
        print("softcache", shlex.join(line), file=sys.stderr)
        main(line)
