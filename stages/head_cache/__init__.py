"""`softcache head-cache`: a cache of embeddings becomes the cache of a classifier. The teacher does not run again.

May import everything below the commands, and stages.teacher_cache, whose shards it writes. Begin with `command.py`.
"""
