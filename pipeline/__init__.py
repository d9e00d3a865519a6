"""What both stages share: the cache, loading, taps, teachers, losses, models and metrics.

May import base and data. Begin with `batch.py`, the records that cross packages, then `cache/`.
"""

if __name__ != "softcache.pipeline":  # from a checkout's top, a plain `import pipeline` finds this folder
    raise ImportError("this folder is part of the package softcache: import softcache.pipeline")
