"""The compiled teacher that is kept: what identifies it, when it is believed, and that it gives the same bits."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from softcache.pipeline.cache.manifest_reader import read_manifest
from softcache.stages.teacher_cache import kept_programs
from softcache.stages.teacher_cache.compilation import identify
from softcache.stages.teacher_cache.kept_programs import KeptPrograms
from tests.helpers.commands import Stages, tiny_cache_command

USED = "the compiled teacher of an earlier command is used"
COMPILING = "compiling the teacher, 5 to 25 s"
VIEWS = torch.arange(4 * 3 * 2 * 2, dtype=torch.uint8).reshape(4, 3, 2, 2)


@pytest.fixture
def kept(tmp_path: Path) -> KeptPrograms:
    """A folder with one program, `a`."""
    programs = KeptPrograms(tmp_path / "cache" / "compiled")
    assert programs.write("a", b"native code")
    return programs


def folder_of(programs: KeptPrograms) -> Path:
    assert programs.folder is not None
    return programs.folder


# The folder


def test_a_program_is_read_as_it_was_written_and_its_folder_is_closed_to_others(kept: KeptPrograms) -> None:
    assert kept.read("a") == b"native code"
    assert kept.read("b") is None
    assert folder_of(kept).stat().st_mode & 0o777 == 0o700
    assert (folder_of(kept) / "key").stat().st_mode & 0o777 == 0o600
    assert kept.write("a", b"newer code")
    assert kept.read("a") == b"newer code"


def flip_a_bit(folder: Path) -> None:
    content = bytearray((folder / "a.program").read_bytes())
    content[-1] ^= 1
    (folder / "a.program").write_bytes(content)


def cut_off(folder: Path) -> None:
    os.truncate(folder / "a.program", 20)


def take_signature_away(folder: Path) -> None:
    (folder / "a.program").write_bytes(b"native code")


def open_folder(folder: Path) -> None:
    folder.chmod(0o755)


def open_key(folder: Path) -> None:
    (folder / "key").chmod(0o640)


def change_key(folder: Path) -> None:
    (folder / "key").write_bytes(bytes(32))


def shorten_key(folder: Path) -> None:
    (folder / "key").write_bytes(b"")


def link_program(folder: Path) -> None:
    (folder / "a.program").rename(folder / "elsewhere")
    (folder / "a.program").symlink_to(folder / "elsewhere")


def link_folder(folder: Path) -> None:
    folder.rename(folder.with_name("elsewhere"))
    folder.symlink_to(folder.with_name("elsewhere"))


@pytest.mark.parametrize(
    "change",
    [
        flip_a_bit,
        cut_off,
        take_signature_away,
        open_folder,
        open_key,
        change_key,
        shorten_key,
        link_program,
        link_folder,
    ],
)
def test_a_program_that_another_may_have_made_is_not_believed(
    kept: KeptPrograms, change: Callable[[Path], None]
) -> None:
    change(folder_of(kept))
    assert kept.read("a") is None


def test_a_program_is_believed_under_its_own_name_alone(kept: KeptPrograms) -> None:
    (folder_of(kept) / "a.program").rename(folder_of(kept) / "b.program")
    assert kept.read("b") is None


def test_a_file_or_folder_of_another_user_is_not_believed(kept: KeptPrograms, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    assert kept.read("a") is None
    assert not kept.write("a", b"native code")


def test_nothing_is_written_into_a_folder_that_is_open_to_others(tmp_path: Path) -> None:
    (tmp_path / "compiled").mkdir()
    (tmp_path / "compiled").chmod(0o777)
    programs = KeptPrograms(tmp_path / "compiled")
    assert not programs.write("a", b"native code")
    assert programs.describe_obstacle().endswith("or it is not yours: chmod 700 it")
    assert list((tmp_path / "compiled").iterdir()) == []


def test_the_least_recently_used_are_deleted(kept: KeptPrograms, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept_programs, "MAX_PROGRAMS", 3)
    folder = folder_of(kept)
    for age, name in ((300, "a"), (200, "b"), (100, "c")):
        kept.write(name, b"native code")
        os.utime(folder / f"{name}.program", (1e9 - age, 1e9 - age))
    abandoned = folder / ".x.program.1.tmp"
    abandoned.write_bytes(b"half")
    os.utime(abandoned, (1e9, 1e9))
    assert kept.read("a")  # used once more
    kept.write("d", b"native code")
    assert sorted(path.name for path in folder.iterdir()) == ["a.program", "c.program", "d.program", "key"]
    monkeypatch.setattr(kept_programs, "MAX_BYTES", 2 * (folder / "a.program").stat().st_size)
    kept.write("e", b"native code")
    assert [name for name in "acde" if kept.read(name)] == ["d", "e"]


def test_without_a_folder_nothing_is_kept() -> None:
    assert not KeptPrograms(None).write("a", b"native code")
    assert KeptPrograms(None).describe_obstacle() == "there is no home folder"
    assert KeptPrograms(None).read("a") is None


# The identity


class Network(nn.Module):
    """A network with a weight, and numbers that are in no state dict."""

    def __init__(self, weight: float = 1.0, hidden: float = 2.0, slope: float = 3.0):
        super().__init__()
        self.weight = nn.Parameter(torch.full((12, 2), weight))
        self.hidden, self.slope = torch.tensor([hidden]), slope

    def forward(self, views: torch.Tensor) -> list[torch.Tensor]:
        return [(views.float().flatten(1) @ self.weight) * self.slope + self.hidden]


def test_equal_networks_have_one_identity_whatever_their_views_show() -> None:
    assert identify(Network(), VIEWS) == identify(Network(), VIEWS + 1)


@pytest.mark.parametrize(
    ("network", "views"),
    [
        (Network(weight=1.5), VIEWS),
        (Network(hidden=1.5), VIEWS),
        (Network(slope=1.5), VIEWS),
        (Network(), VIEWS.float()),
        (Network(), VIEWS[:3]),
        (lambda views: [-output for output in Network()(views)], VIEWS),
        (lambda views: 2 * Network()(views), VIEWS),
    ],
)
def test_whatever_changes_the_outputs_changes_the_identity(network: Any, views: torch.Tensor) -> None:
    assert identify(network, views) != identify(Network(), VIEWS)


def test_what_changes_the_compiled_code_changes_the_identity(monkeypatch: pytest.MonkeyPatch) -> None:
    names = {identify(Network(), VIEWS)}
    with monkeypatch.context() as patch:
        patch.setenv("TORCHINDUCTOR_MAX_AUTOTUNE", "1")
        names.add(identify(Network(), VIEWS))
    for place, name, value in (
        (torch, "__version__", "2.0"),
        (torch, "get_num_threads", lambda: 77),
        (torch.backends.cpu, "get_cpu_capability", lambda: "AVX9"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(place, name, value)
            names.add(identify(Network(), VIEWS))
    assert len(names) == 5


def test_identifying_a_network_does_not_import_the_compiler() -> None:
    code = (
        "import sys, torch\nfrom softcache.stages.teacher_cache.compilation import identify\n"
        "identify(lambda views: [views + 1], torch.zeros(2))\nassert 'torch._dynamo' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


# The command


@pytest.mark.slow
def test_a_later_process_uses_what_was_compiled_and_writes_the_same_rows(
    tiny: Path, stages_process: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Really compiled, twice: a minute. A cache that grows is compiled whether that is faster or not."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user"))

    def grow(name: str) -> tuple[str, list[str]]:
        """Grow a copy of the cache by a draw; return what the command said, and the digests of the rows."""
        shutil.copytree(tiny / "cache", tmp_path / name)
        command = [*tiny_cache_command(tiny)[:-1], name, "--draws", "4", "--compile"]
        done = stages_process(*command, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        return done.stdout, [shard.payload for shard in read_manifest(tmp_path / name).shards]

    said, payloads = grow("first")
    assert COMPILING in said
    assert len(payloads) > len(read_manifest(tiny / "cache").shards)
    said, later = grow("second")
    assert USED in said
    assert COMPILING not in said
    assert later == payloads
    (program,) = (tmp_path / "user/softcache/compiled").glob("*.program")
    content = bytearray(program.read_bytes())
    content[len(content) // 2] ^= 1
    program.write_bytes(content)
    said, later = grow("third")
    assert COMPILING in said
    assert USED not in said
    assert later == payloads


@pytest.mark.slow
def test_a_network_that_cannot_be_exported_is_compiled_by_torch_compile(
    tiny: Path, stages: Stages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail_to_export(*arguments: Any, **more: Any) -> Any:
        raise RuntimeError("an operation that cannot be exported")

    compiled: list[Any] = []
    compile_really = torch.compile

    def compile_and_note(*arguments: Any, **more: Any) -> Any:
        compiled.append(arguments)
        return compile_really(*arguments, **more)

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user"))
    monkeypatch.setattr(torch.export, "export", fail_to_export)
    monkeypatch.setattr(torch, "compile", compile_and_note)
    code, out, err = stages.call(*tiny_cache_command(tiny)[:-1], tmp_path / "c", "--compile")
    assert code == 0, err
    assert out.count(COMPILING) == 1
    assert "the teacher runs as it is" not in out
    assert len(compiled) == 1
    assert not (tmp_path / "user").exists() or not list((tmp_path / "user").rglob("*.program"))
