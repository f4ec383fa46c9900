"""Running a gated model: masked and compacted layers, and the public attach, detach, save, load.

Knows decisions only through ``skipping``; knows nothing of fitting, calibration or training.
"""
