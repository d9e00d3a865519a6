"""What goes in: transfer sets (one file per source), images, decoding, augmented views, long tails.

May import base. The only package that knows torchvision's data sets. Begin with `transfer_set.py`, then `views.py`.
"""

if __name__ != "softcache.data":  # from a checkout's top, a plain `import data` finds this folder
    raise ImportError("this folder is part of the package softcache: import softcache.data")
