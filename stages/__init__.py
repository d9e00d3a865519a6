"""The commands; the only floor that knows the order of things."""

if __name__ != "softcache.stages":  # from a checkout's top, a plain `import stages` finds this folder
    raise ImportError("this folder is part of the package softcache: import softcache.stages")
