"""Benchmarks and the gate that compares them with stored baselines."""
