"""The commands; the only floor that knows the order of things."""
