"""The commands; the only floor that knows the order of things."""

__version__ = "0.1.0"
