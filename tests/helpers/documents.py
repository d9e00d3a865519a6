"""The documents, their blocks of code, and the commands in these; how each command is made small enough for a test.

The first words of a fence tell what happens to a block:

    ```sh               run by the default test suite, with small settings
    ```sh slow          run by `make slow`, with small settings; a comment above gives the reason
    ```sh not-run       checked without being run; a comment above gives the reason
    ```python           run by the default test suite
    ```python not-run   checked to be Python; a comment above gives the reason
    ```python file=X    written into the file X of the page's folder

The blocks of a page run in order, in a folder of the page's own; blocks of Python share their names. The folder is
empty, unless a comment of the page says `<!-- folder: as quickstart.md leaves it -->` or
`<!-- folder: with images -->` (images/, and resnet56.th for them).
"""

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.helpers.paths import ROOT

DOCUMENTS = {
    str(path.relative_to(ROOT)): path.read_text(encoding="utf-8")
    for path in (
        *(ROOT / name for name in ("README.md", "DESIGN.md", "CONTRIBUTING.md", "CHANGELOG.md")),
        *sorted((ROOT / "docs").rglob("*.md")),
    )
}
_FENCE = re.compile(r"^```(.*?)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_REASON = re.compile(r"<!-- (not run|slow): (.+) -->\s*\Z")
_FOLDER = re.compile(r"<!-- folder: (.+) -->")


@dataclass(frozen=True)
class Block:
    """A block of code. language: sh, python …; mode: slow, not-run, file=NAME or nothing; reason: why it is not run by
    default; line: where it begins."""

    page: str
    line: int
    language: str
    mode: str
    text: str
    reason: str

    def commands(self) -> list[str]:
        """The commands of a block of shell, without comments, with continued lines joined."""
        lines = self.text.replace("\\\n", " ").splitlines()
        return [line for line in (re.sub(r"(^|\s)#.*", "", line).strip() for line in lines) if line]


def read_blocks(page: str) -> list[Block]:
    """All blocks of code of a document, in order."""
    text, blocks = DOCUMENTS[page], []
    for fence in _FENCE.finditer(text):
        language, _, mode = fence[1].partition(" ")
        kind = _REASON.search(text, 0, fence.start())
        reason = kind[2] if kind and kind[1].replace(" ", "-") == mode else ""
        line = text.count("\n", 0, fence.start()) + 1
        blocks.append(Block(page, line, language, mode, fence[2], reason))
    return blocks


def read_start(page: str) -> str:
    """What is in the folder of a page when it begins: nothing, or what its comment names."""
    found = _FOLDER.search(DOCUMENTS[page])
    return found[1] if found else ""


def split_command(line: str) -> tuple[list[str], list[str]] | None:
    """A line of shell that runs softcache as (words before the command's name, name and arguments); else None."""
    words = shlex.split(line)
    for at, word in enumerate(words):
        if word == "softcache" and (at == 0 or words[at - 1] == "-m"):
            return words[: at + 1], words[at + 1 :]
    return None


def make_small(arguments: list[str]) -> list[str]:
    """The same command with few rows, epochs, trials and seeds: of an option that is given twice the last counts."""
    name, small = arguments[0], list(arguments)
    for option, factor in (("--draws", 10), ("--trials", 20), ("--finetune-epochs", 10), ("--seeds", 2)):
        if option in small:
            at = small.index(option) + 1
            number = int(small[at])
            small[at] = str(number // factor if number > factor else number)
    return small + [word for option in _small_options(name, arguments) for word in option.split()]


def _small_options(name: str, arguments: list[str]) -> Iterator[str]:
    if name in ("teacher", "teacher-cache") and "--data" not in arguments and "--imbalance" not in arguments:
        yield "--train-size 300"
    if name in ("teacher", "student", "born-again", "methods", "tune"):
        yield "--epochs 2"
    if name == "methods":
        yield "--only kd,hint --time-steps 1"
    if name == "inspect":
        yield "--rows 200 --repeats 2"
    if name == "export" and "--int8" in arguments:
        yield "--most-drop 1"
    if name == "report":
        yield "--no-latency"


def relative_links(page: str) -> list[str]:
    """Targets of links and images of a document that are not of another site; outside blocks of code."""
    text = _FENCE.sub("", DOCUMENTS[page])
    links = re.findall(r"\]\(([^)\s]+)\)", text)
    return [link for link in links if not link.startswith(("http://", "https://", "mailto:"))]


def anchors(page: Path) -> set[str]:
    """The anchors of a document's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", _FENCE.sub("", page.read_text(encoding="utf-8")), re.MULTILINE)
    texts = (re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading) for heading in headings)
    return {re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-") for text in texts}
