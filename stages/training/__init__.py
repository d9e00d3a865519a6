"""The one training loop: a step, checkpoints, validation, progress; vectorised and data-parallel training.

May import base, data, pipeline, stages.cli, stages.distributed and stages.runs. Begin with `loop.py`, then `step.py`.
"""
