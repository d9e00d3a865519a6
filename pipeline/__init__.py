"""What the stages share: cache format, stream, taps, losses, models, metrics."""

if __name__ != "softcache.pipeline":  # from a checkout's top, a plain `import pipeline` finds this folder
    raise ImportError("this folder is part of the package softcache: import softcache.pipeline")
