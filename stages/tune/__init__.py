"""`softcache tune`: a search for loss weights and training settings; each trial is a student.

May import everything below the commands, and stages.student, which it runs. Begin with `command.py`.
"""
