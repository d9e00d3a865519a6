"""Views: the pixels, or the numbers of a row, that teacher and student see for (index, draw).

May import `data.images`, not `sources` and `transfer_set`. Begin with `policy.py`, then `render.py`.
"""
