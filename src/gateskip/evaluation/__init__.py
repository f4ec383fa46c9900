"""Quality and speed against the dense model of the same weights.

Knows the public surface of gated models; knows nothing of the command line.
"""
