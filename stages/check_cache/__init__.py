"""`softcache check-cache`, `cache-pack` and `cache-unpack`: verify, repair and move a cache.

May import everything below the commands, and stages.teacher_cache, which repair runs for damaged shards. Begin with
`command.py`.
"""
