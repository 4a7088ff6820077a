"""The record's ablations: one change at a time against one base run, at equal steps."""
