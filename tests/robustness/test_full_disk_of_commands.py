"""A file that cannot grow, by whatever library writes it, is one line of every command."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.helpers import processes
from tests.helpers.processes import Forks, list_temporary_files, make_student_command

forks = processes.forks
Dose = Callable[[int, int], int]
TEACHER = ("teacher", "--train-size", 200, "--arch", "mlp:8", "--epochs", 2)


def list_commands(tiny: Path, out: Path) -> dict[str, list[object]]:
    """Return {what writes the file: a command}."""
    student = make_student_command(tiny / "cache", out, 2)
    return {
        "torch.save": [*TEACHER, "--out", out],
        "tensorboard": [*TEACHER, "--tensorboard", "--out", out],
        "safetensors": student,
        "matplotlib": ["inspect", tiny / "cache", "--out", out],
        "sqlite": ["tune", *student[1:], "--trials", 2, "--search", "learning_rate=0.01|0.1"],
        "tarfile": ["cache-pack", tiny / "cache", out],
        "copy": [*TEACHER, "--keep-every", 1, "--select", "accuracy", "--out", out],
    }


@pytest.mark.parametrize("name", list_commands(Path(), Path()))
def test_a_limit_on_the_size_of_files_is_one_line_of_every_command(
    tiny: Path, forks: Forks, tmp_path: Path, name: str, dose: Dose
) -> None:
    for file_size in (1200, 4000, 8000)[: dose(1, 3)]:  # the limit is for what is printed, too
        out = tmp_path / f"out-{file_size}"
        child = forks.run(*list_commands(tiny, out)[name], file_size=file_size, finalize=True)
        assert child.code == 1 or (child.code == 0 and file_size > 1200), (file_size, child.output)
        assert "Traceback" not in child.output, (file_size, child.output)
        if child.code == 1:
            assert "File too large" in child.error or "the storage" in child.error, (file_size, child.output)
        assert not out.is_dir() or list_temporary_files(out) == []
