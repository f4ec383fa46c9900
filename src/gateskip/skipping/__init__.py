"""Who is kept, and what a skipped token leaves behind: one definition for everything above.

Training, calibration and inference all decide through this package. Knows nothing of how tokens
are gathered or of caches' insides.
"""
