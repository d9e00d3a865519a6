"""`softcache inspect`: which layers, channels, classes and temperatures of a cached teacher matter.

May import everything below the commands. Begin with `command.py`.
"""
