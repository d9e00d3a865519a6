"""Figures of a model: classification metrics and calibration, significance of differences, statistics of soft targets.

May import base and data. Begin with `classification.py`: its `evaluate` makes the figures of a split in result.json,
and `summarize` those that are shown after an epoch. A metric of classification is one more entry of `evaluate`;
metrics of another kind of task are a module of their own, with these two functions.
"""
