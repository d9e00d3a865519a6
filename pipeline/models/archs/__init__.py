"""The archs, one file per family, each with a function for a row of the table MODELS in `pipeline/models`.

May import base, pipeline.batch and pipeline.taps. Begin with `cnn.py`. A new arch is a file here and a row of that
table.
"""
