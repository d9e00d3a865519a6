"""`softcache student`, stage two, and the commands that build on it: born-again, methods, evaluate, blend, losses.

May import everything below the commands; born-again makes caches with stages.teacher_cache, and several students end
with the table of stages.compare. Begin with `command.py`; what a student is trained from is in `setup.py`.
"""
