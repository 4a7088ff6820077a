"""Step-time and kernel profiles."""
