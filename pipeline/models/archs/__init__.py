"""One file per family of networks, each with a function that the table in `pipeline/models` names.

May import base, pipeline.batch and pipeline.taps. Begin with `cnn.py`; a new arch is a file here and
a row of that table.
"""
