"""The qwen3-moe family: qwen3 with mixtures of experts in most layers."""

from gateskip.retrofit.families.spec import Experts, FamilySpec

__all__ = ["FAMILY"]

FAMILY = FamilySpec(
    model_type="qwen3_moe",
    q_norm="q_norm",
    k_norm="k_norm",
    experts=Experts(
        count="num_experts",
        inner="moe_intermediate_size",
        dense="mlp_only_layers",
        step="decoder_sparse_step",
    ),
)
