"""General tools that know nothing of networks or images: errors, random numbers, files, locks, threads, schemas.

It imports nothing of ours; everything else may import it. Begin with `errors.py`: which error ends a command, and how.
"""
