"""`softcache compare`: finished runs side by side, and whether they differ significantly.

May import everything below the commands. Begin with `command.py`.
"""
