"""The folder of a run: settings, results, logits, cost; the device a command uses, and a description of the machine.

May import base, data, pipeline, stages.cli and stages.distributed. Begin with `folder.py`.
"""
