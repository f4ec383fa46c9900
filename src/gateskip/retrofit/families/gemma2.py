"""The gemma2 family: norms around both branches, capped logits, windows in every second layer."""

from gateskip.retrofit.families.spec import FamilySpec

__all__ = ["FAMILY"]

FAMILY = FamilySpec(
    model_type="gemma2",
    mlp_norm="pre_feedforward_layernorm",
    norm_kind="rms_offset",
    norm_eps="eps",
    attention_out=("post_attention_layernorm",),
    mlp_out=("post_feedforward_layernorm",),
    layer_kind="layer_type",
    logit_softcap="final_logit_softcapping",
)
