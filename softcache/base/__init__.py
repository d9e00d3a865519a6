"""General tools that know nothing of networks or images: errors, random numbers, files, locks, threads, schemas.

May import nothing of ours; every other package may import it. Begin with `errors.py`: the errors that end a command.
"""
