"""Several processes as one command, as torchrun starts them.

May import base. Begin with `ranks.py`.
"""
