"""Embeddings of labelled training rows, by which the classes of held-out rows are predicted."""

import warnings
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from softcache.base import rng
from softcache.base.errors import UsageError
from softcache.base.progress import Progress, no_progress

from .arrays import check_finite
from .distances import normalize_rows
from .neighbours import find_nearest, iterate_cosines

Floats = NDArray[np.float64]
Labels = NDArray[np.int64]

NEIGHBOURS, NEIGHBOUR_TEMPERATURE = 20, 0.07
PROBE_STRENGTHS = (0.01, 0.1, 1.0, 10.0, 100.0)  # values of C, of which validation chooses one
PROBE_ITERATIONS = 100  # of L-BFGS, scikit-learn's default; a fit with large C may end before it has converged
_DEFAULT_STRENGTH = 1.0  # without validation labels
_PROBE_ROWS, _PROBE_ENTRIES = 20_000, 2e9  # rows, and rows · D · classes, up to which a probe is fitted
SHOTS, _SHOT_DRAWS = (1, 5), 10
_SHOTS_KEY, _PROBE_KEY = 60, 61  # what a random number is for


@dataclass
class EmbeddingBank:
    """Embeddings of training rows with their classes, and of validation rows, which choose the probe.

    Args:
        outputs: float32 [M, D] of training rows.
        labels: int64 [M], their classes, from 0.
        val_outputs: float32 [V, D] of validation rows; None for none.
        val_labels: int64 [V], -1 where it is unknown.
        available_rows: Labelled training rows that there are, where M are a part of them; 0 for M.

    Raises:
        UsageError: Shapes do not fit, a label is no class, or outputs are not finite.
    """

    outputs: NDArray[np.float32]
    labels: Labels
    val_outputs: NDArray[np.float32] | None = None
    val_labels: Labels | None = None
    available_rows: int = 0
    _directions: Floats = field(init=False, repr=False)
    _probe: Any = field(init=False, repr=False, default=None)

    def __post_init__(self) -> None:
        if self.outputs.ndim != 2 or not len(self.outputs) or self.labels.shape != self.outputs.shape[:1]:
            raise UsageError(
                f"a bank has outputs {list(self.outputs.shape)} and labels {list(self.labels.shape)}: expected [M, D]"
                " and [M] of at least one row"
            )
        if self.labels.min() < 0:
            raise UsageError(f"a bank has the label {self.labels.min()}: expected classes, from 0, of labelled rows")
        check_finite("student", self.outputs, "outputs for training rows")
        self._directions = normalize_rows(self.outputs.astype(np.float64))

    def evaluate(self, outputs: Floats, labels: Labels, progress: Progress = no_progress) -> dict[str, Any]:
        """Compute the accuracies of held-out rows whose classes are predicted from the bank.

        Args:
            outputs: float64 [N, D], of labelled rows.
            labels: int64 [N], their classes.
            progress: Shows how far each figure is that takes long.

        Returns:
            knn: See `predict_by_neighbours`.
            probe: See `predict_by_probe`; None where the bank has one class.
            centroid_1, centroid_5: See `measure_centroids`; absent where a class has fewer rows in the bank.
            bank_rows: M, only where these are not all labelled training rows.
            probe_rows: Rows that the probe is fitted to, only where these are not M.

        Raises:
            UsageError: The outputs have another width than those of the bank.
        """
        if outputs.shape[1:] != self.outputs.shape[1:]:
            raise UsageError(
                f"outputs {list(outputs.shape)} and those of the bank {list(self.outputs.shape)} differ in width"
            )
        figures: dict[str, Any] = {
            "knn": float((self.predict_by_neighbours(outputs, progress) == labels).mean()),
            "probe": None,
        }
        if (predictions := self.predict_by_probe(outputs, progress)) is not None:
            figures["probe"] = float((predictions == labels).mean())
        for shots in SHOTS:
            if (accuracy := self.measure_centroids(outputs, labels, shots)) is not None:
                figures[f"centroid_{shots}"] = accuracy
        if len(self.labels) < self.available_rows:
            figures["bank_rows"] = len(self.labels)
        if figures["probe"] is not None and (rows := self._count_probe_rows()) < len(self.labels):
            figures["probe_rows"] = rows
        return figures

    def predict_by_neighbours(self, outputs: Floats, progress: Progress = no_progress) -> Labels:
        """Predict classes by a vote of the 20 nearest rows of the bank by cosine, or of all where there are fewer.

        A neighbour at the cosine s has the weight exp(s / 0.07). Of equally near rows the first come first, and of
        classes with equal votes the first is predicted.

        Args:
            outputs: float64 [N, D].
            progress: Shows how many rows are done.

        Returns:
            int64 [N].

        Source:
            Caron et al. 2021, "Emerging properties in self-supervised vision transformers", arXiv 2104.14294, and its
            program eval_knn.py.
        """
        classes, numbers = np.unique(self.labels, return_inverse=True)
        k = min(NEIGHBOURS, len(self.labels))
        predictions = np.empty(len(outputs), np.int64)
        for part, cosines in iterate_cosines(normalize_rows(outputs), self._directions, progress, "kNN"):
            values, columns = find_nearest(cosines, k)
            votes = np.zeros((len(values), len(classes)))
            np.add.at(
                votes, (np.arange(len(values))[:, None], numbers[columns]), np.exp(values / NEIGHBOUR_TEMPERATURE)
            )
            predictions[part] = classes[votes.argmax(1)]
        return predictions

    def measure_centroids(self, outputs: Floats, labels: Labels, shots: int) -> float | None:
        """Measure the accuracy of the nearest class centroid by cosine, the mean of 10 draws of labelled rows.

        A centroid is the mean of the drawn rows of a class, each divided by its norm. The draws depend on the number
        and the classes of the bank's rows alone; a draw of 5 rows a class contains that of 1.

        Args:
            outputs: float64 [N, D].
            labels: int64 [N], their classes.
            shots: Rows of each class.

        Returns:
            The accuracy; None where a class of the bank or of the labels has fewer rows in the bank.

        Source:
            Snell et al. 2017, "Prototypical networks for few-shot learning", arXiv 1703.05175, with cosine.
        """
        classes, numbers, counts = np.unique(self.labels, return_inverse=True, return_counts=True)
        if counts.min() < shots or not np.isin(labels, classes).all():
            return None
        queries = normalize_rows(outputs)
        starts = np.concatenate([[0], np.cumsum(counts)[:-1]])
        correct = 0
        for draw in range(_SHOT_DRAWS):
            order = rng.permutation((0, _SHOTS_KEY, draw), len(numbers))
            by_class = order[np.argsort(numbers[order], kind="stable")]
            rows = by_class[starts[:, None] + np.arange(shots)]
            centroids = normalize_rows(self._directions[rows].mean(1))
            for part, cosines in iterate_cosines(queries, centroids):
                nearest = find_nearest(cosines, 1)[1][:, 0]
                correct += int((classes[nearest] == labels[part]).sum())
        return correct / (_SHOT_DRAWS * len(labels))

    def predict_by_probe(self, outputs: Floats, progress: Progress = no_progress) -> Labels | None:
        """Predict classes by logistic regression on the embedding, standardised by the bank's mean and deviation.

        It is scikit-learn's LogisticRegression, of at most 100 iterations each, fitted to at most 20,000 rows in a
        seeded order (fewer where rows · D · classes would exceed 2e9) for each C of 0.01, 0.1, 1, 10 and 100; the C
        with the highest accuracy on validation is used, of equal ones the smallest. Without validation labels C is 1.

        Args:
            outputs: float64 [N, D].
            progress: Shows how many fits are done.

        Returns:
            int64 [N]; None where the bank has one class.
        """
        if len(np.unique(self.labels)) < 2:
            return None
        if self._probe is None:
            self._probe = self._fit_probe(progress)
        return np.asarray(self._probe.predict(outputs), np.int64)

    def _fit_probe(self, progress: Progress) -> Any:
        """Fit the pipeline of scaler and classifier with the C that validation chooses."""
        from sklearn.exceptions import ConvergenceWarning  # not at the top: they take 0.1 s to import
        from sklearn.linear_model import LogisticRegression
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler

        scaler = StandardScaler().fit(self.outputs.astype(np.float64))
        rows = rng.permutation((0, _PROBE_KEY), len(self.labels))[: self._count_probe_rows()]
        if len(np.unique(self.labels[rows])) < 2:
            rows = np.arange(len(self.labels))
        inputs, labels = scaler.transform(self.outputs[rows].astype(np.float64)), self.labels[rows]
        val_labels = np.zeros(0, np.int64) if self.val_labels is None else self.val_labels
        is_labelled = val_labels >= 0
        strengths = PROBE_STRENGTHS if is_labelled.any() else (_DEFAULT_STRENGTH,)
        best, best_accuracy = None, -1.0
        for strength in progress(strengths, len(strengths), "linear probe"):
            model = LogisticRegression(C=strength, max_iter=PROBE_ITERATIONS)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", ConvergenceWarning)
                model.fit(inputs, labels)
            accuracy = 0.0
            if is_labelled.any():
                assert self.val_outputs is not None
                val_inputs = scaler.transform(self.val_outputs[is_labelled].astype(np.float64))
                accuracy = float((model.predict(val_inputs) == val_labels[is_labelled]).mean())
            if accuracy > best_accuracy:
                best, best_accuracy = model, accuracy
        return make_pipeline(scaler, best)

    def _count_probe_rows(self) -> int:
        """Return how many rows of the bank the probe is fitted to."""
        classes, width = len(np.unique(self.labels)), self.outputs.shape[1]
        return min(len(self.labels), _PROBE_ROWS, max(1, int(_PROBE_ENTRIES / (width * classes))))
