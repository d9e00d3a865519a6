"""Write docs/reference/cli.md from the commands themselves.

python docs/make_cli_reference.py            write the page
python docs/make_cli_reference.py --check    write nothing; exit code 1 where the page is not current
"""

import sys
from pathlib import Path

import click

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # the checkout that this file is part of, whatever is installed

from softcache.stages.main import commands  # noqa: E402

PAGE = ROOT / "docs/reference/cli.md"
GROUPS = {
    "Caches": ("teacher-cache", "check-cache", "inspect", "blend", "cache-pack", "cache-unpack"),
    "Training": ("teacher", "student", "born-again", "methods", "tune", "losses", "recipes"),
    "Results": ("evaluate", "compare", "report", "export", "predict"),
}
HEAD = """# Command line

<!-- Written by docs/make_cli_reference.py: change the help texts, not this page. -->

`softcache COMMAND` and `python -m softcache COMMAND` are the same. In make, an option is the variable of its name:
`make student ARCH=cnn LEARNING_RATE=0.1 BASELINE=1` is `softcache student --arch cnn --learning-rate 0.1 --baseline`.
The values of an option that may be repeated are separated by blanks: `LOSS='kd:temperature=4 hard:weight=0.1'`. "By
recipe" marks a default that depends on the data set.
"""


def write_page() -> str:
    """The whole page. Raises ValueError for a command that is in no group."""
    named = [name for names in GROUPS.values() for name in names]
    if sorted(named) != sorted(commands.commands):
        raise ValueError(f"GROUPS and the commands differ: {sorted(set(named) ^ set(commands.commands))}")
    parts = [HEAD]
    for group, names in GROUPS.items():
        lines = [f"- [`{name}`](#softcache-{name}): {_first_sentence(commands.commands[name])}" for name in names]
        parts.append(f"## {group}\n\n" + "\n".join(lines) + "\n")
    parts += [_describe(name, commands.commands[name]) for name in named]
    return "\n".join(parts)


def _first_sentence(command: click.Command) -> str:
    return (command.help or "").strip().split(". ")[0].rstrip(".") + "."


def _describe(name: str, command: click.Command) -> str:
    context = click.Context(command, info_name=f"softcache {name}", terminal_width=10_000, max_content_width=10_000)
    usage = " ".join(command.collect_usage_pieces(context))
    rows = []
    for parameter in command.get_params(context):
        record = parameter.get_help_record(context)
        if isinstance(parameter, click.Option) and record and "--help" not in record[0]:
            rows.append("| `{}` | {} |".format(*(" ".join(cell.split()).replace("|", r"\|") for cell in record)))
    text = " ".join((command.help or "").split())
    table = "\n".join(["| option | |", "|---|---|", *rows])
    return f"## `softcache {name}`\n\n{text}\n\n```text\nsoftcache {name} {usage}\n```\n\n{table}\n"


def main() -> int:
    page = write_page()
    if "--check" in sys.argv[1:]:
        current = PAGE.is_file() and PAGE.read_text(encoding="utf-8") == page
        if not current:
            print(f"{PAGE.relative_to(ROOT)} is out of date: python docs/make_cli_reference.py", file=sys.stderr)
        return int(not current)
    PAGE.write_text(page, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
