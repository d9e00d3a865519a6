"""Text from files that can come from anyone: names in messages, and made safe for Markdown and CSV.

For one text on a terminal see `make_printable`.
"""

import re
from collections.abc import Sequence

from .errors import make_printable

_MARKDOWN = {c: f"\\{c}" for c in "\\`*_[]|#~$@"}  # markup, formulas, and names that GitHub notifies
_MARKDOWN |= {"<": "&lt;", ">": "&gt;", "&": "&amp;"}  # HTML
_LINK = re.compile(r"(?i)\b(https?|ftp|mailto|javascript|data|file|www)([:.])")  # becomes a link without any markup
_FORMULA = re.compile(r"(^|[;\t])(\s*)([=+\-@＝＋－＠])")  # also behind a separator that a spreadsheet may take


SHOWN_NAMES = 5  # that a message lists


def shorten_names(names: Sequence[str]) -> str:
    """Format the first five of some names from files, and an ellipsis where there are more."""
    shown = ", ".join(make_printable(name, 120) for name in names[:SHOWN_NAMES])
    return shown + (", …" if len(names) > SHOWN_NAMES else "")


def escape_markdown(text: object, max_length: int | None = None) -> str:
    """Escape text for Markdown, on one line: it is shown as it is, as text, with no link, image, code or HTML in it.

    Args:
        text: Any object; its str() is used.
        max_length: Characters to keep; None keeps all.
    """
    printable = make_printable(text, max_length)
    escaped = "".join(_MARKDOWN.get(c, c) for c in printable)
    return _LINK.sub(r"\1\\\2", escaped)


def format_code_span(text: object, in_table: bool = False) -> str:
    """Format text as inline code of Markdown, with as many backticks around it as its own need.

    Args:
        text: Any object; its str() is used.
        in_table: Whether it is in a cell of a table, where a pipe has to be escaped.
    """
    printable = make_printable(text, None)
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", printable)), default=0))
    padding = " " if len(fence) > 1 else ""
    code = printable.replace("|", "\\|") if in_table else printable
    return f"{fence}{padding}{code}{padding}{fence}"


def escape_csv_cell(value: object) -> object:
    """Make a cell of a CSV file safe for a spreadsheet, which would compute text that begins like a formula.

    Args:
        value: A number or None, which is returned as it is, or text, which gets an apostrophe before a formula.
    """
    return _FORMULA.sub(r"\1'\2\3", make_printable(value, None)) if isinstance(value, str) else value
