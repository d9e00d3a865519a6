"""`softcache tune`: a search for loss weights and training options; each trial is a student.

May import everything below the commands, and stages.student, whose training it runs. Begin with `command.py`; which
process trains which trial is in `study.py`, how it is trained in `trials.py`.
"""
