"""The gpt2 family: learned positions, layer norms, one transposed projection."""

from gateskip.retrofit.families.spec import FamilySpec

__all__ = ["FAMILY"]

FAMILY = FamilySpec(
    model_type="gpt2",
    decoder="transformer",
    layers="h",
    attention="attn",
    attention_norm="ln_1",
    mlp_norm="ln_2",
    norm_kind="layer",
    norm_eps="eps",
    kv="fused",
    qkv="c_attn",
    rotary=None,
    mlp_projections=2,
    final_norm="ln_f",
)
