"""The cache on disk, format 1: what it is (manifest, identity), its shards, writing, reading, recovery, archives.

May import base and data. Begin with `manifest.py` (what a cache claims to be), then `reader.py` and `writer.py`.
"""
