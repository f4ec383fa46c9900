"""Closed-form gates and compensation: forward passes and linear algebra, no training.

Streaming: memory does not grow with the number of tokens.
"""
