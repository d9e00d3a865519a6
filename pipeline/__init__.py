"""What the stages share: cache format, stream, taps, losses, models, metrics."""
