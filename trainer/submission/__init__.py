"""From finished runs to a folder that can be submitted, and the one script in it."""
