"""The commands, one package each, and what they share: options, runs, training, several processes.

May import everything; nothing of base, data or pipeline imports it. Begin with `main.py`, the
table of commands. A new command is a package here, its options in `cli/configs.py`, and a function in `main.py`.
"""

if __name__ != "softcache.stages":  # from a checkout's top, a plain `import stages` finds this folder
    raise ImportError("this folder is part of the package softcache: import softcache.stages")
