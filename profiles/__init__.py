"""Where the milliseconds of a training step go."""
