"""Names from files do nothing in a terminal, a web page, a Markdown file or a spreadsheet."""

import csv
import re
from pathlib import Path

import pytest
import torch

from softcache.base.errors import make_printable
from softcache.base.text import escape_csv_cell, escape_markdown, format_code_span
from softcache.stages.cli.console import Console
from tests.helpers.commands import Stages

HOSTILE = ("\x1b[31m", "\x9b2J", "\u202e", "\u200b", "\u2066", "\r", "\n", "\t", "\x00", "\x7f", "\ufeff", "\ud800")


@pytest.mark.parametrize("text", HOSTILE)
def test_what_a_terminal_would_not_print_becomes_a_question_mark(text: str) -> None:
    assert make_printable(f"a{text}b") == "a" + "?" + text[1:] + "b"


@pytest.mark.parametrize("text", HOSTILE)
def test_a_command_prints_no_control_character_whatever_the_line_has(
    text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Console(json_only=False).print(f"class a{text}b")
    Console(json_only=False).note(f"class a{text}b")
    for output in capsys.readouterr():
        assert output.removesuffix("\n").isprintable()
        assert len(output.splitlines()) == 1


@pytest.mark.parametrize(
    "name", ["<script>", "[a](b)", "`code`", "a|b", "*a*", "_a_", "#1", "\\", "$x$", "@ann", "~~a~~"]
)
def test_markup_in_markdown_is_escaped(name: str) -> None:
    unescaped = re.sub(r"\\.", "", escape_markdown(name))  # without each backslash and what it escapes
    assert not set("<>[]`|*_#\\$@~") & set(unescaped)
    assert "&" not in re.sub("&(lt|gt|amp);", "", unescaped)


def test_addresses_do_not_become_links() -> None:
    assert escape_markdown("see https://a.b or www.a.b, mlp:8") == "see https\\://a.b or www\\.a.b, mlp:8"


def test_code_has_more_backticks_around_it_than_in_it() -> None:
    assert format_code_span("mlp:8") == "`mlp:8`"
    assert format_code_span("a``b` c") == "``` a``b` c ```"
    assert format_code_span("a|b", in_table=True) == "`a\\|b`"


@pytest.mark.parametrize("text", ["=1+1", "+1", "-1", "@SUM(A1)", " =1", "＝1"])
def test_a_cell_that_a_spreadsheet_would_compute_gets_an_apostrophe(text: str) -> None:
    assert escape_csv_cell(text) == f"'{text}"
    assert escape_csv_cell(f"a;{text}") == f"a;{escape_csv_cell(text)}"


def test_numbers_and_plain_names_are_cells_as_they_are() -> None:
    assert [escape_csv_cell(x) for x in (-1.5, None, 3, "a-b", "layer1:pool")] == [-1.5, None, 3, "a-b", "layer1:pool"]


def test_hostile_names_of_classes_reach_csv_and_markdown_escaped(stages: Stages, save_image) -> None:  # type: ignore[no-untyped-def]
    from softcache.pipeline.models import build

    classes = ("<img src=x onerror=alert(1)>", "=cmd|' C'!A0", "a|`b`[c](https:d)")
    for split, count in (("train", 12), ("test", 3)):
        for k, name in enumerate(classes):
            for i in range(count):
                save_image(Path("pets", split, name, f"{i}.png"), k=100 * k + i)
    torch.manual_seed(0)
    torch.save(build("mlp:4", 3, 3, 8).state_dict(), "w.pt")
    teacher = ("--teacher", "mlp:4", "--weights", "w.pt", "--normalize", "none", "--license", "a|b <b> [c](d)")
    stages("teacher-cache", "--data", "folder:pets", *teacher, "--views", "none", "--draws", 1, "--out", "c")
    assert "| licence | a\\|b &lt;b&gt; \\[c\\](d) |" in Path("c/README.md").read_text()
    stages("inspect", "c", "--repeats", 1, "--out", "i")
    with open("i/similarity.csv", newline="") as file:
        titles = next(csv.reader(file))
    assert titles == ["true class", classes[0], f"'{classes[1]}", classes[2]]
    stages("student", "--data", "folder:pets", "--cache", "c", "--arch", "mlp:4", "--epochs", 1, "--out", "s|`<b>")
    stages("report", "s|`<b>", "--data", "folder:pets", "--show", 1, "--no-latency", "--out", "r")
    html, markdown = Path("r/report.html").read_text(), Path("r/report.md").read_text()
    assert "<img src=x" not in html
    assert "&lt;img src=x onerror=alert(1)&gt;" in html
    assert "| s\\|\\`&lt;b&gt; | mlp:4 |" in markdown
    assert "<b>" not in markdown.rpartition("Made by")[0]
