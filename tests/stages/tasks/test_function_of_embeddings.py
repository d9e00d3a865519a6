"""A function of a batch is a teacher of embeddings, whatever the number of classes of the data; a classifier is
none."""

from pathlib import Path

import numpy as np
import pytest

from softcache.pipeline.cache.reader import CacheReader
from tests.helpers.commands import Stages

CODE = """
import numpy as np
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression

data = np.load("rows.npz")
pca = PCA(5, random_state=0).fit(data["x"])
classifier = LogisticRegression().fit(data["x"], data["y"])

def embed(batch):
    return pca.transform(batch)
"""


def test_a_function_of_a_batch_is_a_teacher_of_embeddings(
    stages: Stages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    random = np.random.default_rng(0)
    np.savez("rows.npz", x=random.normal(size=(60, 8)).astype(np.float32), y=np.arange(60) % 3)
    Path("function_of_embeddings.py").write_text(CODE)
    monkeypatch.syspath_prepend(str(tmp_path))
    command = ["teacher-cache", "--data", "arrays:rows.npz", "--task", "embedding", "--val-fraction", "0.2"]
    stages(*command, "--teacher", "function_of_embeddings:embed", "--codec", "float32", "--out", "c")
    cache = CacheReader(Path("c"))
    assert cache.classes == 5
    transfer_set = cache.load_transfer_set("arrays:rows.npz", Path(), lambda items, total, text: items)
    rows = np.load("rows.npz")["x"][transfer_set.splits["train"].source_rows]
    import function_of_embeddings  # type: ignore[import-not-found]

    stored = cache.read_targets("train", 0, np.arange(48))[0].numpy()
    index = cache.row_order("train")
    np.testing.assert_allclose(stored, function_of_embeddings.embed(rows)[index], atol=1e-5)
    error = stages.fails(2, *command, "--teacher", "function_of_embeddings:classifier", "--out", "d")
    assert "is a classifier" in error
    assert "give a function of a batch that returns vectors [B, D]" in error
