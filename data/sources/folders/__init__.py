"""Folders of images: which layout a folder has, its files, the rows of each split, and tables of labels.

May import the modules beside this folder, but not its siblings. Begin with `folder.py`.
"""
