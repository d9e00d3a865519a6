"""`softcache report`: runs as one HTML page, and as Markdown for a pull request.

May import everything below the commands, and stages.student. Begin with `command.py`.
"""
