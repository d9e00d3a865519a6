"""Outputs of named layers: forward hooks that capture them, and statistics of them that are small enough to store.

May import base. Begin with `hooks.py`.
"""
