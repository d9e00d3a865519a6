"""The folder of a run: settings, results, kept logits, cost, and the machine that made them.

May import base, data, pipeline, stages.cli and stages.distributed. Begin with `folder.py`.
"""
