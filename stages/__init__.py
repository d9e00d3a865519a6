"""The commands, one package each, and what they share: options, runs, training, several processes.

May import everything; nothing of base, data or pipeline imports it. Begin with `main.py`, the table of commands.
"""

if __name__ != "softcache.stages":  # from a checkout's top, a plain `import stages` finds this folder
    raise ImportError("this folder is part of the package softcache: import softcache.stages")
