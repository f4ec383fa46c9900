"""The gemma3 family (text): gemma2 with norms on heads; windows turn at another rotary base."""

from gateskip.retrofit.families.spec import FamilySpec

__all__ = ["FAMILY"]

FAMILY = FamilySpec(
    model_type="gemma3_text",
    mlp_norm="pre_feedforward_layernorm",
    norm_kind="rms_offset",
    norm_eps="eps",
    attention_out=("post_attention_layernorm",),
    mlp_out=("post_feedforward_layernorm",),
    q_norm="q_norm",
    k_norm="k_norm",
    layer_kind="layer_type",
    logit_softcap="final_logit_softcapping",
)
