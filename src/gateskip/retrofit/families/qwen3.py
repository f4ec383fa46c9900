"""The qwen3 family: llama with RMS norms on each head's queries and keys."""

from gateskip.retrofit.families.spec import FamilySpec

__all__ = ["FAMILY"]

FAMILY = FamilySpec(
    model_type="qwen3", q_norm="q_norm", k_norm="k_norm", fused_attention=True, fused_mlp=True
)
