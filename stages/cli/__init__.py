"""The command line: options as dataclasses, defaults per data set, what is printed, commands to copy from a message.

May import base, data and pipeline. Begin with `configs.py`: the options of every command.
"""
