"""`softcache teacher-cache`, stage one: run the teacher once and write its outputs into a cache.

May import everything below the commands, and stages.teacher, which it runs where no weights are named. Begin with
`command.py`; where the teacher comes from is in `teachers/`.
"""
