"""Checks: every kernel and every claim."""
