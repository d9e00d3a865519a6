"""What goes in: transfer sets and views. The only floor that knows the data part of torchvision."""

if __name__ != "softcache.data":  # from a checkout's top, a plain `import data` finds this folder
    raise ImportError("this folder is part of the package softcache: import softcache.data")
