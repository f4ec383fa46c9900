"""Decoders: loops around a gated model that decide what every token may cost, one file each.

They share one loop (``loop.py``) that runs inside Hugging Face's ``generate``, and take *policies*
(``policies.py``): a budget, an exit layer, a static mask, the dense model.
"""

from __future__ import annotations

from gateskip.decoding.drafts import LookupDraft
from gateskip.decoding.policies import AtBudget, Dense, ExitLayer, Policy, StaticMask
from gateskip.decoding.scheduled import Moment, by_entropy, by_position, generate_scheduled
from gateskip.decoding.speculative import generate_speculative
from gateskip.decoding.stats import DecodingStats
from gateskip.decoding.stitched import generate_stitched
from gateskip.decoding.synchronised import generate_synchronised
from gateskip.decoding.tuning import TunedDraft, tune_draft
from gateskip.decoding.view import draft_view

__all__ = [
    "AtBudget",
    "DecodingStats",
    "Dense",
    "ExitLayer",
    "LookupDraft",
    "Moment",
    "Policy",
    "StaticMask",
    "TunedDraft",
    "by_entropy",
    "by_position",
    "draft_view",
    "generate_scheduled",
    "generate_speculative",
    "generate_stitched",
    "generate_synchronised",
    "tune_draft",
]
