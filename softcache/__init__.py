"""softcache: offline knowledge distillation in PyTorch.

A teacher runs once over a transfer set, its outputs are stored in HDF5 shards, and any number of students are trained
from them. The packages, from the lowest: base, data, pipeline, stages.
"""

__version__ = "0.1.0"
