"""The teacher of a cache, wherever it comes from: weights, a run, a published network, a file, code of the user.

May import what `stages.teacher_cache` may, but not the modules beside this folder. Begin with `teacher_source.py`; a
teacher in a file of its own begins in `file_teachers.py`.
"""
