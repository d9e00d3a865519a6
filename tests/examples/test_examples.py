"""The programs of examples/: each runs, its student learns from the cache, and its loaders yield every row once."""

import json
import logging
import os
import re
import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from softcache import Batch, Cache, CacheLoader, DistillationLoss, build_cache
from tests.helpers.paths import ROOT
from tests.helpers.record_rows import record_passes

# {example: (epochs, the least accuracy)}. A student of the targets of other rows has 0.1 to 0.2.
EXAMPLES = {
    "accelerate_loop": (4, 0.93),
    "lightning_module": (4, 0.93),
    "own_dataset_and_teacher": (20, 0.88),
    "own_loop": (4, 0.93),
    "own_loss": (12, 0.88),
    "timm_student": (5, 0.85),
}
PACKAGES = {"accelerate_loop": "accelerate", "lightning_module": "lightning", "timm_student": "timm"}
TRAIN_ROWS = list(range(1257))
Run = Callable[..., float]

# Of releases of these packages that are older than PyTorch's.
pytestmark = [pytest.mark.filterwarnings(f"ignore::{kind}") for kind in ("DeprecationWarning", "FutureWarning")]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the cache that most examples make first."""
    folder = tmp_path_factory.mktemp("examples")
    build_cache(folder / "cache", "mlp:256", "digits", views="crop:pad=1", draws=8)
    return folder


@pytest.fixture
def run_example(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Iterator[Run]:
    """`run_example("own_loop")` runs it in this process for a few epochs, and returns the accuracy that it prints."""

    def run(name: str) -> float:
        if name in PACKAGES:
            pytest.importorskip(PACKAGES[name], reason=f"{name} needs {PACKAGES[name]}, of the extra dev")
        out = tmp_path / name
        if name != "own_dataset_and_teacher":
            shutil.copytree(made, out)
        program, epochs = str(ROOT / "examples" / f"{name}.py"), EXAMPLES[name][0]
        monkeypatch.setattr(sys, "argv", [program, "--epochs", str(epochs), "--out", str(out)])
        runpy.run_path(program, run_name="__main__")
        return read_accuracy(capsys.readouterr().out)

    with torch.random.fork_rng():
        yield run


@pytest.fixture(autouse=True)
def lightning_logs_nothing() -> None:
    """Its handler writes to the standard error of the first test that imports it, which is closed in the others."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)


def read_accuracy(output: str) -> float:
    """Read the last line of an example."""
    last = output.splitlines()[-1]
    assert re.fullmatch(r"test accuracy: [01]\.\d{3}", last), output
    return float(last.split()[-1])


def test_every_example_is_run() -> None:
    assert sorted(path.stem for path in (ROOT / "examples").glob("*.py")) == sorted(EXAMPLES)


@pytest.mark.parametrize("name", [name for name in EXAMPLES if name != "lightning_module"])
def test_the_student_of_an_example_learns(name: str, run_example: Run) -> None:
    assert run_example(name) >= EXAMPLES[name][1]


def test_a_student_of_other_rows_targets_misses_the_accuracy(
    run_example: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = CacheLoader.__iter__

    def iterate(loader: CacheLoader) -> Iterator[Batch]:
        for batch in original(loader):
            assert batch.logits is not None
            yield replace(batch, logits=batch.logits.roll(1, 0))

    monkeypatch.setattr(CacheLoader, "__iter__", iterate)
    assert run_example("own_loop") < 0.5


def test_lightning_sees_every_row_once_an_epoch_each_time_in_another_draw(
    run_example: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    iterate, passes = record_passes()
    monkeypatch.setattr(CacheLoader, "__iter__", iterate)
    monkeypatch.setattr(CacheLoader, "set_epoch", lambda loader, epoch: None)  # each pass is the next epoch without it
    epochs, least = EXAMPLES["lightning_module"]
    assert run_example("lightning_module") >= least
    trained = [record for record in passes if record["split"] == "train" and record["rows"]]
    assert [sorted(record["rows"]) for record in trained] == [TRAIN_ROWS] * epochs
    assert len({tuple(record["rows"]) for record in trained}) == epochs
    draws = [set(record["draws"]) for record in trained]
    assert [len(draw) for draw in draws] == [1] * epochs
    assert len(set.union(*draws)) == epochs


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
@pytest.mark.parametrize("steps", [31, 40])
def test_lightning_resumes_in_and_after_an_epoch_to_the_same_weights(steps: int, made: Path, tmp_path: Path) -> None:
    lightning = pytest.importorskip("lightning", reason="lightning_module needs lightning, of the extra dev")
    module_of_example = runpy.run_path(str(ROOT / "examples/lightning_module.py"))["Distillation"]
    cache = Cache(made / "cache")

    def train(folder: Path, checkpoint: Path | None = None) -> list[torch.Tensor]:
        torch.manual_seed(0)
        student = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))
        module = module_of_example(student, DistillationLoss("kd:temperature=4"))
        save = lightning.pytorch.callbacks.ModelCheckpoint(
            folder, filename="{step}", every_n_train_steps=steps, save_top_k=-1
        )
        quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
        trainer = lightning.Trainer(max_epochs=3, accelerator="cpu", callbacks=[save], **quiet)
        loaders = cache.loader("train", batch_size=64), cache.loader("val")
        trainer.fit(module, *loaders, ckpt_path=checkpoint)
        return [parameter.detach() for parameter in module.parameters()]

    with torch.random.fork_rng():
        uninterrupted = train(tmp_path / "first")
        resumed = train(tmp_path / "second", tmp_path / "first" / f"step={steps}.ckpt")
    assert all(torch.equal(a, b) for a, b in zip(uninterrupted, resumed, strict=True))


def test_two_processes_of_accelerate_see_every_row_once_an_epoch_between_them(made: Path, tmp_path: Path) -> None:
    pytest.importorskip("accelerate", reason="accelerate_loop needs accelerate, of the extra dev")
    out = shutil.copytree(made, tmp_path / "out")
    epochs, least = EXAMPLES["accelerate_loop"]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    program = [ROOT / "tests/helpers/record_rows.py", tmp_path, ROOT / "examples/accelerate_loop.py"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [*command, *map(str, program), "--epochs", str(epochs), "--out", str(out)],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert read_accuracy(done.stdout) >= least
    ranks = [json.loads((tmp_path / f"rows-{rank}.json").read_text(encoding="utf-8")) for rank in range(2)]
    splits = [[record["split"] for record in passes] for passes in ranks]
    assert splits == [["train"] * epochs + ["test"]] * 2
    for first, second in zip(*ranks, strict=True):
        assert first["draws"] == second["draws"]
        assert abs(len(first["rows"]) - len(second["rows"])) <= len(first["draws"])
        assert sorted(first["rows"] + second["rows"]) == list(range(360 if first["split"] == "test" else 1257))
