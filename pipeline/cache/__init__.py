"""The cache on disk, format 1: writing it, reading it, verifying it, and moving it as one file.

May import base, data, pipeline.batch and pipeline.models. Begin with `folder.py` (which files a cache has), then read
`manifest.py` (what it records of them), `writer.py` and `reader.py`.

    folder           names of the files, and which of them are there
    identity         what makes two caches the same; its fingerprint
    manifest         the record of a cache and of its shards; manifest_reader validates one
    shards           HDF5 in and out
    codecs           logits as bytes
    plan, existing   what a cache is to hold, and what is in its folder already; recovery finds shards without a manifest
    writer           writes, continues and extends a cache
    reader, rows     opens a cache, reads targets; reads rows by position from verified shards
    verification     verifies shards; renders views again
    archive          a cache as one tar file
"""
