"""Both stages as functions for a caller in Python: `softcache.build_cache`, `train_student` and `distill`.

May import every package below: they do what the commands do, with objects in place of names. Begin with
`train_student.py`.
"""
