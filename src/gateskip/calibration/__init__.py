"""Thresholds for every budget at once, fitted with skipping on."""
