"""The documents: their commands run, their links lead somewhere, their tables are those of the program."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import click
import pytest
from PIL import Image

from softcache.stages.main import commands, main
from softcache.stages.make_variables import to_arguments
from tests.helpers.documents import (
    DOCUMENTS,
    Block,
    anchors,
    make_small,
    read_blocks,
    read_start,
    relative_links,
    split_command,
)
from tests.helpers.paths import ROOT

BLOCKS = [block for page in DOCUMENTS for block in read_blocks(page)]
SHELL = [block for block in BLOCKS if block.language == "sh"]
RUN_PAGES = [
    page
    for page in DOCUMENTS
    if any(b.page == page and b.language in ("sh", "python") and b.mode == "" for b in BLOCKS)
]
SLOW_PAGES = [page for page in DOCUMENTS if any(b.page == page and b.mode == "slow" for b in SHELL)]
EXAMPLES = sorted((ROOT / "examples").rglob("*.sh"))


# Blocks


@pytest.mark.parametrize("page", DOCUMENTS)
def test_every_block_of_shell_is_run_or_has_a_reason(page: str) -> None:
    for block in read_blocks(page):
        where = f"{page}:{block.line}"
        assert block.language in ("sh", "python", "text", ""), f"{where}: ```{block.language}"
        if block.language == "sh":
            assert block.mode in ("", "slow", "not-run"), f"{where}: ```sh {block.mode}"
            assert block.mode == "" or block.reason, (
                f"{where}: the line above gives no reason: <!-- {block.mode}: … -->"
            )
        elif block.language == "python":
            compile(block.text, where, "exec")
            assert block.mode in ("", "not-run") or re.fullmatch(r"file=[a-z_]+\.py", block.mode), (
                f"{where}: ```python {block.mode}"
            )
            assert block.mode != "not-run" or block.reason, (
                f"{where}: the line above gives no reason: <!-- not run: … -->"
            )
        else:
            assert "softcache " not in block.text or block.page == "docs/reference/cli.md", f"{where} is a block of sh"


@pytest.mark.parametrize("block", SHELL, ids=lambda block: f"{block.page}:{block.line}")
def test_every_command_can_be_parsed(block: Block) -> None:
    for line in block.commands():
        if parts := split_command(line):
            parse(parts[1])


def parse(arguments: list[str]) -> None:
    """Fails for a command, an option or a value that does not exist."""
    command = commands.get_command(click.Context(commands), arguments[0])
    assert command is not None, f"there is no command {arguments[0]}"
    command.make_context(arguments[0], list(arguments[1:]))


@pytest.mark.parametrize("page", DOCUMENTS)
def test_every_command_in_a_sentence_exists(page: str) -> None:
    for name in re.findall(r"`softcache ([a-z][a-z-]*)", DOCUMENTS[page]):
        assert name in commands.commands, f"{page}: softcache {name}"


@pytest.mark.parametrize(
    "line", sorted({line for block in SHELL for line in block.commands() if line.startswith("make ")})
)
def test_every_target_and_variable_of_make_exists(line: str) -> None:
    target, *variables = shlex.split(line)[1:]
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    done = subprocess.run(
        ["make", "-n", target], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    if target in commands.commands:
        parse(to_arguments(target, variables))
    else:
        assert variables == [] or target in ("students", "bench", "gpu-check"), line


def test_the_readme_shows_both_kinds_of_command() -> None:
    lines = [line for block in read_blocks("README.md") if block.language == "sh" for line in block.commands()]
    assert sum(line.startswith("softcache ") for line in lines) >= 5
    assert {"make teacher-cache", "make student"} <= set(lines)


# Running


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory, save_image: Callable[..., Image.Image]) -> Path:
    """A folder with images/ of two classes, and resnet56.th: random weights, with batch norms that fit them."""
    import torch

    from softcache.pipeline.models import build

    folder = tmp_path_factory.mktemp("with-images")
    for number, (split, count) in enumerate([("train", 10), ("test", 4)]):
        for label, name in enumerate(("cat", "dog")):
            for k in range(count):
                save_image(folder / f"images/{split}/{name}/{k}.png", 32, 32, 100 * number + 10 * k + label)
    network = build("resnet56", 2, 3, 32)
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 1.0
    network(torch.randn(16, 3, 32, 32))
    torch.save(network.state_dict(), folder / "resnet56.th")
    return folder


@pytest.fixture(scope="session")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher of digits that was trained for 2 epochs: stage one trains a long one where it is given none."""
    folder = tmp_path_factory.mktemp("teacher") / "digits-teacher"
    main(["teacher", "--train-size", "300", "--epochs", "2", "--out", str(folder)])
    return folder


@pytest.fixture(scope="session")
def quickstart(tmp_path_factory: pytest.TempPathFactory, teacher: Path) -> Path:
    """The folder as the quick start leaves it."""
    folder = tmp_path_factory.mktemp("quickstart")
    with pytest.MonkeyPatch.context() as patch:
        run_page("docs/quickstart.md", folder, teacher, patch)
    return folder


@pytest.fixture
def page_folder(request: pytest.FixtureRequest, tmp_path: Path, page: str) -> Path:
    """The folder in which the blocks of a page run."""
    folder, start = tmp_path / "page", read_start(page)
    if start == "as quickstart.md leaves it":
        shutil.copytree(request.getfixturevalue("quickstart"), folder)
    elif start == "with images":
        shutil.copytree(request.getfixturevalue("images"), folder)
    else:
        assert start == "", f"{page}: there is no folder '{start}'"
        folder.mkdir()
    for k, name in enumerate(("zero.png", "seven.png")):
        Image.new("L", (8, 8), 100 * k).save(folder / name)
    return folder


@pytest.mark.parametrize("page", [page for page in RUN_PAGES if page != "docs/quickstart.md"])
def test_the_commands_of_a_page_run(
    page: str, page_folder: Path, teacher: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_page(page, page_folder, teacher, monkeypatch)


def test_the_commands_of_the_quick_start_run(quickstart: Path) -> None:
    assert (quickstart / "report/report.html").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("page", SLOW_PAGES)
def test_the_slow_commands_of_a_page_run(
    page: str, page_folder: Path, teacher: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_page(page, page_folder, teacher, monkeypatch, slow=True)


def test_the_python_example_of_the_readme_prints_an_accuracy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (block,) = [block for block in read_blocks("README.md") if block.language == "python"]
    assert len(block.text.splitlines()) <= 15
    monkeypatch.chdir(tmp_path)
    main(["teacher", "--arch", "mlp:256", "--train-size", "300", "--epochs", "40", "--out", "teacher"])
    main(["teacher-cache", "--weights", "teacher", "--train-size", "300", "--out", "caches/digits"])
    capsys.readouterr()
    exec(compile(block.text, "README.md", "exec"), {"__name__": "__main__"})
    assert 0.8 < float(capsys.readouterr().out) <= 1


def run_page(page: str, folder: Path, teacher: Path, monkeypatch: pytest.MonkeyPatch, slow: bool = False) -> None:
    """Run the blocks of a page in order, in a folder."""
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(str(folder))
    names = {"__name__": "__main__"}
    for block in read_blocks(page):
        if block.language == "python" and block.mode.startswith("file="):
            Path(block.mode.removeprefix("file=")).write_text(block.text)
        elif block.language == "python" and block.mode == "":
            exec(compile(block.text, f"{page}:{block.line}", "exec"), names)
        elif block.language == "sh" and (block.mode == "" or (slow and block.mode == "slow")):
            for line in block.commands():
                run_line(line, f"{page}:{block.line}", teacher)


def run_line(line: str, where: str, teacher: Path) -> None:
    """Run a line of shell with small settings: softcache in this process, all else by bash."""
    parts = split_command(line)
    if parts is None:
        return run_in_shell(line, where)
    before, arguments = parts[0], make_small(parts[1])
    if arguments[0] == "teacher-cache" and "--weights" not in arguments and "--data" not in arguments:
        own = Path(f"{arguments[arguments.index('--out') + 1] if '--out' in arguments else 'caches/digits'}-teacher")
        if not own.exists():
            shutil.copytree(teacher, own)
        arguments += ["--weights", str(own)]
    if before != ["softcache"]:
        return run_in_shell(shlex.join([*before, *arguments]), where)
    code = 0
    try:
        main(arguments)
    except SystemExit as stop:
        code = int(stop.code or 0)
    assert code == 0, f"{where}: {shlex.join(['softcache', *arguments])} ended with exit code {code}"


def run_in_shell(line: str, where: str) -> None:
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT)}
    line = re.sub(r"^torchrun\b", f"{shlex.quote(sys.executable)} -m torch.distributed.run", line)
    done = subprocess.run(["bash", "-ec", line], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"{where}: {line}\n{done.stderr}"


# Examples


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_an_example_explains_itself_and_its_commands_exist(path: Path, tmp_path: Path) -> None:
    """Its shell is run with a program in the place of softcache that parses its arguments and writes them down."""
    text = path.read_text(encoding="utf-8")
    head = [line for line in text.splitlines()[1:] if line.startswith("#")]
    assert len(head) >= 2, "says what it shows"
    assert any("minute" in line or "hour" in line for line in head), "says how long it takes"
    (tmp_path / "bin").mkdir()
    stub = tmp_path / "bin/softcache"
    stub.write_text(f'#!/bin/sh\nprintf "%s\\n" "$(printf "%s\\t" "$@")" >> {tmp_path}/commands\n')
    stub.chmod(0o755)
    (tmp_path / "bin/torchrun").symlink_to(stub)
    (tmp_path / "bin/chromium").symlink_to("/bin/false")
    environment = {**os.environ, "PATH": f"{tmp_path}/bin:{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash", str(path)], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    lines = (tmp_path / "commands").read_text().splitlines()
    assert lines
    for line in lines:
        parse([word for word in line.split("\t") if word])


# Links and tables


@pytest.mark.parametrize("page", DOCUMENTS)
def test_links_lead_somewhere(page: str) -> None:
    for link in relative_links(page):
        name, _, anchor = link.partition("#")
        target = (ROOT / page).parent / name if name else ROOT / page
        assert target.exists(), f"{page}: {link}"
        if anchor:
            assert anchor in anchors(target), f"{page}: {link}"


def test_every_document_is_in_the_index() -> None:
    linked = {(ROOT / "docs" / link.partition("#")[0]).resolve() for link in relative_links("docs/README.md")}
    pages = {path.resolve() for path in (ROOT / "docs").rglob("*.md")} - {(ROOT / "docs/README.md").resolve()}
    assert pages <= linked


@pytest.mark.parametrize("script", ["make_cli_reference.py", "make_api_reference.py", "make_loss_list.py"])
def test_a_reference_is_current(script: str) -> None:
    command = [sys.executable, f"docs/{script}", "--check"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_the_tables_of_measurements_are_current() -> None:
    from bench import document

    assert document.main(["--check"]) == 0


def test_a_table_is_made_from_the_results_alone() -> None:
    from bench.document import update

    rows = [{"name": "bytes-10", "goal": 36, "median": 40.25, "spread": [39.0, 41.0], "reached": False, "why": ""}]
    text = "a\n<!-- bench: begin results -->\nold\n<!-- bench: end results -->\nb\n"
    new = update(text, {"rows": rows})
    assert "| `bytes-10` | ≤ 36 | **40.2 (39.0 to 41.0), missed** |" in new
    assert "old" not in new
    assert (new.startswith("a\n"), new.endswith("\nb\n")) == (True, True)
    assert update(new, {"rows": rows}) == new


def test_the_guides_name_every_row_of_the_tables() -> None:
    from softcache.data.sources import SOURCES
    from softcache.data.views.policy import VIEW_POLICIES
    from softcache.pipeline.cache.codecs import CODECS
    from softcache.pipeline.losses import LOSSES
    from softcache.pipeline.models import MODELS
    from softcache.stages.student.recipes import RECIPES

    for page, names in {
        "docs/guides/losses.md": LOSSES,
        "docs/guides/recipes.md": RECIPES,
        "docs/guides/own-data.md": [*SOURCES, *MODELS],
        "docs/explanation/views-and-determinism.md": VIEW_POLICIES,
        "docs/reference/cache-format.md": CODECS,
    }.items():
        missing = [name for name in names if not re.search(rf"`{re.escape(name)}(:[^`]*)?`", DOCUMENTS[page])]
        assert missing == [], page
