"""The cohere family: one layer norm, and both branches read it."""

from gateskip.retrofit.families.spec import FamilySpec

__all__ = ["FAMILY"]

FAMILY = FamilySpec(
    model_type="cohere",
    mlp_norm="input_layernorm",
    norm_kind="layer",
    parallel=True,
    q_norm="q_norm",
    k_norm="k_norm",
    logit_scale="logit_scale",
)
