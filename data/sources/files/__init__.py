"""Images inside of larger files: tar shards, parquet files, and data sets of the `datasets` library.

May import the modules beside this folder, but not its siblings. Begin with `webdataset.py`.
"""
