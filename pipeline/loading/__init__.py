"""From a cache and its transfer set to batches: the public `Cache` and `CacheLoader`, and what they are made of.

May import base, data and the packages of pipeline below it. Begin with `cache.py`, then read `loader.py` (epochs, for
anybody's training loop) and `stream.py`, whose docstring draws how an epoch is divided; `order.py`, `groups.py` and
`rendering.py` are its parts.
"""
