"""A student of numbers or of embeddings that learned by a user's own loss alone is evaluated and exported as
others."""

from pathlib import Path

import numpy as np
import pytest

from tests.helpers.commands import Stages

CODE = """
import numpy as np

def numbers(batch):
    return batch[:, :2] * 3 + 1

def vectors(batch):
    return np.concatenate([batch, batch**2], 1)

def own_loss(outputs, batch):
    return (outputs.logits - batch.logits).abs().mean()
"""


@pytest.mark.parametrize(("task", "teacher"), [("numbers", "numbers"), ("embedding", "vectors")])
def test_a_student_of_an_own_loss_is_evaluated_and_exported(
    stages: Stages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, task: str, teacher: str
) -> None:
    monkeypatch.chdir(tmp_path)
    random = np.random.default_rng(0)
    y = random.normal(size=(60, 2)) if task == "numbers" else np.arange(60) % 3
    np.savez("rows.npz", x=random.normal(size=(60, 6)).astype(np.float32), y=y)
    Path(f"own_code_of_{task}.py").write_text(CODE)
    monkeypatch.syspath_prepend(str(tmp_path))
    data = ["--data", "arrays:rows.npz"]
    options = ["--task", task, "--val-fraction", "0.2", "--test-fraction", "0.2"]
    stages("teacher-cache", *data, *options, "--teacher", f"own_code_of_{task}:{teacher}", "--out", "c")
    training = ["--arch", "mlp:8", "--epochs", 2, "--learning-rate", 0.01]
    result = stages(
        "student", *data, "--cache", "c", *training, "--loss", f"own_code_of_{task}:own_loss", "--out", "r"
    )
    assert set(result["student"]["test"]) > {"rows", "labelled"}
    evaluated = stages("evaluate", "r", *data)["0"]
    figure = "rmse_to_teacher" if task == "numbers" else "cosine"
    assert evaluated["test"][figure] == pytest.approx(result["student"]["test"][figure], abs=1e-6)
    stages("export", "r", *data)
    assert Path("r/student.onnx").is_file()
