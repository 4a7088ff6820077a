"""Fused MLP kernels for Hopper, their plain meaning, and the glue that calls them."""
