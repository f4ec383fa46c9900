"""The gpt-neox family (Pythia): both branches read the input of the layer."""

from gateskip.retrofit.families.spec import FamilySpec

__all__ = ["FAMILY"]

FAMILY = FamilySpec(
    model_type="gpt_neox",
    decoder="gpt_neox",
    attention="attention",
    norm_kind="layer",
    norm_eps="eps",
    attention_out=("post_attention_dropout",),
    mlp_out=("post_mlp_dropout",),
    parallel="use_parallel_residual",
    sum_first=True,
    kv="interleaved",
    qkv="query_key_value",
    head_dim="head_size",
    mlp_projections=2,
    final_norm="final_layer_norm",
)
