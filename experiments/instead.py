"""What a user would do instead of skipping: 8-bit weights, or a smaller model, tuned alike.

Both compute everything of what they are. The third, a model with layers removed, is what static
methods leave (``shortgpt``, ``llm_drop``).
"""

from __future__ import annotations

import importlib
import tempfile
import warnings
from typing import Any

from transformers import AutoModelForCausalLM, TorchAoConfig

import gateskip
from gateskip.evaluation.runs import INSTEAD
from gateskip.skipping.state import state_of

__all__ = ["INT8", "SMALLER", "macs_saved", "quantised"]

INT8, SMALLER = INSTEAD


def macs_saved(model: Any, dense: Any, keys: float) -> float:
    """Share of the dense model's decoder MACs that a gated, smaller one does not need.

    Args:
        keys: that a token sees on average.
    """
    state = state_of(model)
    whole = state.family.shape_of_config(dense.config, state.shape.weight_bytes)
    return 1.0 - state.shape.dense_macs(keys) / whole.dense_macs(keys)


def quantised(model: Any) -> Any:
    """A plain model with 8-bit weights, made from a gated one as a user would make it."""
    dtype = next(model.parameters()).dtype
    kind = importlib.import_module("torchao.quantization").Int8WeightOnlyConfig()
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        gateskip.detach(model).save_pretrained(folder)
        return AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, quantization_config=TorchAoConfig(kind)
        ).eval()
