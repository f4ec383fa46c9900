"""Putting gates into a Hugging Face model and taking them out again; checkpoints; families.

Knows where the parts of a layer are. Knows nothing of budgets or of how skipping is executed.
"""
