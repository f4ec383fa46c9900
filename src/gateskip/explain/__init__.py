"""Where a gated model spends compute: usage per token and branch, as numbers, text and picture.

Knows decisions only through the trace; knows nothing of how thresholds were found.
"""
