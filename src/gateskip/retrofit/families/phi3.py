"""The phi3 family: one projection for queries, keys and values, one for gate and up."""

from gateskip.retrofit.families.spec import FamilySpec

__all__ = ["FAMILY"]

FAMILY = FamilySpec(
    model_type="phi3",
    attention_out=("resid_attn_dropout",),
    mlp_out=("resid_mlp_dropout",),
    kv="fused",
)
