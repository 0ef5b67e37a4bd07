"""Models that run on the ops."""
