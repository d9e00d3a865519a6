"""`softcache student`, stage two, and the commands that are made of it: born-again, methods, evaluate, blend, losses.

May import everything below the commands; born-again makes caches with stages.teacher_cache, and several students end
with the table of stages.compare. Begin with `command.py`.
"""
