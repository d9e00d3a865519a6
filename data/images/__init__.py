"""Images, and rows of numbers, as views are rendered from them: in memory, in files, inside of files, of a dataset.

May import the modules beside this folder, but not `sources` and `transfer_set`. Begin with `image_arrays.py`.
"""
