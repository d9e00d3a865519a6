"""`softcache teacher`: train a teacher from hard targets.

May import everything below the commands. Begin with `command.py`.
"""
