"""An interrupt while a checkpoint is written is raised as KeyboardInterrupt, and leaves the file unchanged."""

import io
from pathlib import Path
from typing import Any

import pytest
import torch

from softcache.stages.training import checkpoint


def test_an_interrupt_at_any_write_is_an_interrupt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch turns an interrupt between two parts of its zip file into a RuntimeError."""
    path, record = tmp_path / "c.pt", {"model": {"w": torch.ones(300)}, "lines": "x" * 100}
    checkpoint.save_tensors(path, {"old": torch.zeros(1)})
    old = path.read_bytes()
    failing_write, interrupts = [0], 0

    class Stopping(io.FileIO):
        writes = 0

        def write(self, content: Any, /) -> int:
            self.writes += 1
            if self.writes == failing_write[0]:
                raise KeyboardInterrupt
            return super().write(content)

    monkeypatch.setattr(checkpoint, "open", lambda name, _: Stopping(name, "w"), raising=False)
    for number in range(1, 200):
        failing_write[0] = number
        try:
            checkpoint.save_tensors(path, record)
        except KeyboardInterrupt:
            interrupts += 1
            assert path.read_bytes() == old
            assert list(tmp_path.iterdir()) == [path]
        else:
            break
    assert interrupts > 10
    assert torch.equal(torch.load(path, weights_only=True)["model"]["w"], torch.ones(300))
