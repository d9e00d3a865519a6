"""What goes in: transfer sets and views. The only floor that knows the data part of torchvision."""
