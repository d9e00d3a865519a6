"""Write docs/reference/cli.md from the commands themselves.

python docs/make_cli_reference.py            write the page
python docs/make_cli_reference.py --check    write nothing; exit code 1 where the page is not current
"""

import sys
from pathlib import Path

import click

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # the checkout that this file is part of, whatever is installed

from softcache.stages.cli.option_groups import HEADINGS  # noqa: E402
from softcache.stages.cli.options import Option  # noqa: E402
from softcache.stages.main import Commands, commands  # noqa: E402

PAGE = ROOT / "docs/reference/cli.md"
HEAD = """# Command line

<!-- Written by docs/make_cli_reference.py: change the help texts, not this page. -->

`softcache COMMAND` and `python -m softcache COMMAND` are the same. In make, an option is the variable of its name:
`make student ARCH=cnn LEARNING_RATE=0.1 BASELINE=1` is `softcache student --arch cnn --learning-rate 0.1 --baseline`.
The values of an option that may be repeated are separated by blanks: `LOSS='kd:temperature=4 hard:weight=0.1'`. "By
data set" marks a default that depends on the data set.
"""


def write_page() -> str:
    """Return the whole page: the commands under their headings, then each with its options."""
    parts = [HEAD]
    for heading, names in Commands.sections.items():
        lines = [f"- [`{name}`](#softcache-{name}): {_first_sentence(commands.commands[name])}" for name in names]
        parts.append(f"## {heading}\n\n" + "\n".join(lines) + "\n")
    parts += [_describe(name, commands.commands[name]) for names in Commands.sections.values() for name in names]
    return "\n".join(parts)


def _first_sentence(command: click.Command) -> str:
    return (command.help or "").strip().split(". ")[0].rstrip(".") + "."


def _describe(name: str, command: click.Command) -> str:
    """Return the section of a command: what it does, its usage, and a table of options for each heading of --help."""
    context = click.Context(command, info_name=f"softcache {name}", terminal_width=10_000, max_content_width=10_000)
    usage = " ".join(command.collect_usage_pieces(context))
    tables: dict[str, list[str]] = {}
    for parameter in command.get_params(context):
        record = parameter.get_help_record(context)
        if isinstance(parameter, Option) and record:
            row = "| `{}` | {} |".format(*(" ".join(cell.split()).replace("|", r"\|") for cell in record))
            tables.setdefault(parameter.heading, []).append(row)
    text = " ".join((command.help or "").split())
    parts = [f"## `softcache {name}`\n\n{text}\n\n```text\nsoftcache {name} {usage}\n```\n"]
    for heading in sorted(tables, key=HEADINGS.index):
        parts.append("\n".join([f"| {heading} | |", "|---|---|", *tables[heading]]) + "\n")
    return "\n".join(parts)


def main() -> int:
    page = write_page()
    if "--check" in sys.argv[1:]:
        is_current = PAGE.is_file() and PAGE.read_text(encoding="utf-8") == page
        if not is_current:
            print(f"{PAGE.relative_to(ROOT)} is out of date: run  make docs", file=sys.stderr)
        return int(not is_current)
    PAGE.write_text(page, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
