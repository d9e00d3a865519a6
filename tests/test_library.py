"""softcache as a library: its public names, what importing it costs, and that it changes nothing of its caller."""

import json
from pathlib import Path

import pytest

import softcache
from softcache import losses
from softcache.pipeline.losses import LOSSES
from tests.helpers.commands import run_python
from tests.helpers.paths import ROOT


def test_the_public_names_are_a_contract() -> None:
    expected = {
        "Batch", "Cache", "CacheError", "CacheLoader", "DistillationLoss", "ModelOutputs", "UsageError",
        "build_cache", "distill", "evaluate", "losses", "train_student",
    }  # fmt: skip
    assert set(softcache.__all__) == expected
    for name in expected:
        assert getattr(softcache, name) is not None
        assert name in dir(softcache)
    with pytest.raises(AttributeError, match="no attribute 'Caches'"):
        _ = softcache.Caches  # type: ignore[attr-defined]


def test_every_loss_of_the_table_is_a_class_of_the_public_module() -> None:
    classes = {type(loss) for loss in LOSSES.values()}
    assert {cls.__name__ for cls in classes} <= set(losses.__all__)
    assert {"Custom", "Loss", "Ramp"} <= set(losses.__all__)


def test_importing_it_loads_no_library_that_is_slow_to_load(tmp_path: Path) -> None:
    code = (
        "import softcache, sys; print(sorted({'torch', 'numpy', 'h5py', 'click', 'tqdm', 'PIL'} & set(sys.modules)))"
    )
    assert run_python("-c", code, cwd=tmp_path).stdout == "[]\n"


def test_it_changes_nothing_of_the_process_that_uses_it(tmp_path: Path) -> None:
    done = run_python("-W", "error", str(ROOT / "tests/helpers/use_library.py"), str(tmp_path), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {}
    assert done.stderr == ""
