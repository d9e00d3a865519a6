"""Figures of a model: classification metrics and calibration, significance of differences, statistics of soft targets.

May import base and data. Begin with `classification.py`.
"""
