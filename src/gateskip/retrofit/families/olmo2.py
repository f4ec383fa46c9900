"""The olmo2 family: norms after the branches instead of before, and on queries and keys."""

from gateskip.retrofit.families.spec import FamilySpec

__all__ = ["FAMILY"]

FAMILY = FamilySpec(
    model_type="olmo2",
    attention_norm=None,
    mlp_norm=None,
    attention_out=("post_attention_layernorm",),
    mlp_out=("post_feedforward_layernorm",),
    q_norm="q_norm",
    k_norm="k_norm",
)
