"""Several caches as one teacher: how their logits are combined, and a fitted map of the teacher's distribution.

May import base, data, pipeline.cache and pipeline.batch. Begin with `ensemble.py`.
"""
