"""From a transfer set and a cache to batches: the order of rows, rendering of views, reading of targets, prefetch.

May import base, data and the packages of pipeline below it. Begin with `stream.py`, whose docstring draws how an epoch
is divided; `order.py`, `groups.py` and `rendering.py` are its parts.
"""
