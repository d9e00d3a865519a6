"""The data: transfer sets, their sources, images in memory, in files and of a dataset, augmented views, long tails.

May import base. The only package that knows torchvision's data sets. Begin with `transfer_set.py`, then `views/`;
where data come from is in `sources/`, and what views are made of in `images/`.
"""

if __name__ != "softcache.data":  # imported as `data` from a checkout, where this folder is at the top
    raise ImportError("this folder is part of the package softcache: import softcache.data")
