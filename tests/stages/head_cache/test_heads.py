"""Heads against scikit-learn and independent formulas in float64."""

from pathlib import Path

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from softcache.base.errors import CacheError, UsageError
from softcache.stages.head_cache.head_file import read_head_file
from softcache.stages.head_cache.heads import SCALES, STRENGTHS, check_every_class, fit_centroids, fit_probe

D = 5


def draw_rows(n: int, classes: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    labels = np.arange(n) % classes
    return random.normal(size=(n, D)) * [1, 10, 0.1, 1, 3] + 2.0 * random.normal(size=(classes, D))[labels], labels


def softmax(z: np.ndarray) -> np.ndarray:
    p = np.exp(z - z.max(1, keepdims=True))
    return np.asarray(p / p.sum(1, keepdims=True))


@pytest.mark.parametrize("classes", [2, 4])
def test_a_probe_has_the_probabilities_of_scikit_learn(classes: int) -> None:
    (rows, labels), (others, _) = draw_rows(40, classes), draw_rows(9, classes, seed=1)
    head, how = fit_probe(rows, labels, classes, seed=0)
    strength = float(how.split()[1])
    assert strength in STRENGTHS
    assert "5-fold cross-validation" in how
    model = make_pipeline(StandardScaler(), LogisticRegression(C=strength, max_iter=1000)).fit(rows, labels)
    np.testing.assert_allclose(softmax(head(others).astype(np.float64)), model.predict_proba(others), atol=1e-6)


def test_a_probe_of_one_row_a_class_has_no_cross_validation() -> None:
    rows, labels = draw_rows(3, 3)
    head, how = fit_probe(rows, labels, 3, seed=0)
    assert how == "C 1, as a class has one labelled row"
    assert head(rows).argmax(1).tolist() == [0, 1, 2]


def test_centroids_are_cosines_to_the_means_of_unit_rows_at_the_best_scale() -> None:
    rows, labels = draw_rows(30, 3)
    head, how = fit_centroids(rows, labels, 3)
    unit = rows / np.linalg.norm(rows, axis=1)[:, None]
    means = np.stack([unit[labels == c].mean(0) for c in range(3)])
    expected = head.scale * np.array([[x @ m / np.linalg.norm(m) for m in means] for x in unit])
    np.testing.assert_allclose(head(rows), expected, rtol=1e-5, atol=1e-6)

    def nll(scale: float) -> float:
        total = 0.0
        for i, (x, y) in enumerate(zip(unit, labels, strict=True)):
            own = np.stack([unit[(labels == c) & (np.arange(30) != i)].mean(0) for c in range(3)])
            z = scale * (own @ x / np.linalg.norm(own, axis=1))
            total -= z[y] - z.max() - np.log(np.exp(z - z.max()).sum())
        return total

    assert head.scale == min(SCALES, key=nll)
    assert how == f"scale {head.scale:.4g} by leave-one-out on these rows"


def test_centroids_of_one_row_a_class_have_the_usual_scale() -> None:
    rows, labels = draw_rows(3, 3)
    assert fit_centroids(rows, labels, 3)[0].scale == pytest.approx(1 / 0.07)


def test_a_class_without_a_labelled_row_is_named() -> None:
    with pytest.raises(UsageError, match="none of the 4 labelled rows is of class 'dog'"):
        check_every_class(np.array([0, 0, 2, 2]), ("cat", "dog", "eel"), 4)


def test_a_head_of_a_file_is_linear_or_of_cosines_in_the_order_of_the_data(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    weight, bias, x = random.normal(size=(3, D)), random.normal(size=3), random.normal(size=(4, D))
    names = np.array(["eel", "cat", "dog"])
    order = [1, 2, 0]
    np.savez(tmp_path / "linear.npz", weight=weight.astype("f4"), bias=bias, classes=names)
    head = read_head_file(tmp_path / "linear.npz", D, ("cat", "dog", "eel"))
    np.testing.assert_allclose(head(x), x @ weight.astype("f4")[order].T + bias[order], rtol=1e-6, atol=1e-6)
    np.savez(tmp_path / "cosine.npz", weight=weight, normalize=True)
    head = read_head_file(tmp_path / "cosine.npz", D, ())
    cosines = [[a @ b / np.linalg.norm(a) / np.linalg.norm(b) for b in weight] for a in x]
    np.testing.assert_allclose(head(x), 100 * np.array(cosines), rtol=1e-6, atol=1e-5)
    np.savez(tmp_path / "scaled.npz", weight=weight, normalize=np.array(1), scale=7.5)
    assert read_head_file(tmp_path / "scaled.npz", D, ()).scale == 7.5


W = np.ones((3, D))
WRONG: list[tuple[dict[str, np.ndarray], str]] = [
    ({"weights": W}, "has no array 'weight' [K, 5]: it has weights"),
    ({"weight": W, "mean": W[0]}, "has the array 'mean': a head has weight, bias, classes, scale, normalize"),
    ({"weight": W[:, :4]}, "weight has the shape [3, 4], the embedding has 5 numbers"),
    ({"weight": W[0]}, "weight has the shape [5], the embedding has 5 numbers"),
    ({"weight": W[:1]}, "weight has 1 rows: a classifier has two classes or more"),
    ({"weight": W[:2]}, "weight has 2 rows, the data have 3 classes"),
    ({"weight": W * np.nan}, "weight has values that are not finite"),
    ({"weight": W.astype(str)}, "weight is <U32, not numbers"),
    ({"weight": W, "bias": W[0]}, "bias has the shape [5], weight has 3 rows"),
    ({"weight": W, "scale": np.array(0.0)}, "scale is [0.0], not one number above 0"),
    ({"weight": W, "scale": W}, "not one number above 0"),
    ({"weight": W, "normalize": np.array("yes")}, "normalize is <U3 [], not true or false"),
    ({"weight": 0 * W, "normalize": np.array(True)}, "a row of weight is 0"),
    ({"weight": W, "classes": np.arange(3)}, "classes is int64 [3], not 3 names"),
    ({"weight": W, "classes": np.array(["a", "b", "b"])}, "classes names a class twice"),
    ({"weight": W, "classes": np.array(["a", "b", "d"])}, "classes does not have 'c' of the data, it has 'd'"),
]


@pytest.mark.parametrize(("arrays", "message"), WRONG, ids=[message[:30] for _, message in WRONG])
def test_a_file_that_is_no_head_is_refused(arrays: dict[str, np.ndarray], message: str, tmp_path: Path) -> None:
    np.savez(tmp_path / "h.npz", **arrays)
    with pytest.raises(CacheError) as error:
        read_head_file(tmp_path / "h.npz", D, ("a", "b", "c"))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_file_of_python_objects_or_without_arrays_is_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "h.npz", weight=np.array([None, 1], dtype=object))
    with pytest.raises(UsageError, match="holds Python objects"):
        read_head_file(tmp_path / "h.npz", D, ())
    (tmp_path / "text.npz").write_text("no archive")
    with pytest.raises(CacheError, match="is damaged or cut off"):
        read_head_file(tmp_path / "text.npz", D, ())
    with pytest.raises(UsageError, match="there is no file"):
        read_head_file(tmp_path / "nowhere.npz", D, ())
