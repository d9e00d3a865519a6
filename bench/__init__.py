"""Figures: every promise about speed and size as a ratio that is measured here. `python -m bench [ROW …]`."""
