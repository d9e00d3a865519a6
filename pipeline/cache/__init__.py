"""The cache on disk, format 1: writing it, reading it, verifying it, and moving it as one file.

May import base, data, pipeline.batch and pipeline.models. Begin with `folder.py` (which files a cache has), then read
`manifest.py` (what it records of them), `writer.py` and `reader.py`.

    folder           names of the files, and which of them exist
    identity         what makes two caches the same; its fingerprint. The reader compares it with the data of a student
                     (`CacheReader.check_transfer_set`), the writer with a cache in the folder (`check_same_identity`)
    manifest         the record of a cache and of its shards; manifest_reader validates one. The writer writes it last
                     (`CacheWriter.publish_manifest`), and the repair of a cache writes it anew
    shards           HDF5 in and out
    codecs           logits as bytes
    plan             what a cache is to hold, and the shards that it is cut into
    existing         which state a folder is in; recovery finds shards whose manifest is lost
    writer           writes, continues and extends a cache
    reader, rows     opens a cache, reads targets; reads rows by position from verified shards
    verification     verifies shards; renders views again
    archive          a cache as one tar file
"""
