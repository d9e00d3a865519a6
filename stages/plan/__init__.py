"""`softcache plan`: what a cache will take, before anything is written.

May import everything below the commands, and stages.teacher_cache, whose teacher it times. Begin with `command.py`.
"""
