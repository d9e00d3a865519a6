"""Teachers of diabetes.npz for task_figures.sh, fitted to all training rows: three functions that return one."""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from sklearn.ensemble import GradientBoostingRegressor
from sklearn.linear_model import RidgeCV
from sklearn.neural_network import MLPRegressor
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler


def read() -> tuple[NDArray[np.float32], NDArray[np.float64]]:
    with np.load("diabetes.npz") as file:
        rows = file["split"] == "train"
        return file["x"][rows], file["y"][rows]


def boosting() -> GradientBoostingRegressor:
    return GradientBoostingRegressor(
        n_estimators=100, learning_rate=0.05, max_depth=2, subsample=0.7, random_state=0
    ).fit(*read())


def ridge() -> Pipeline:
    return make_pipeline(StandardScaler(), RidgeCV(np.logspace(-2, 4, 25))).fit(*read())


def networks() -> Callable[[NDArray[np.float32]], NDArray[np.float64]]:
    """Return the mean of ten networks, a function of a batch."""
    x, y = read()
    mean, std = y.mean(), y.std()
    fitted = [
        make_pipeline(
            StandardScaler(),
            MLPRegressor(hidden_layer_sizes=(64, 64), alpha=10.0, early_stopping=True, random_state=k, max_iter=500),
        ).fit(x, (y - mean) / std)
        for k in range(10)
    ]
    return lambda batch: np.mean([each.predict(batch) for each in fitted], 0) * std + mean
