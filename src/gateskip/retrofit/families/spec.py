"""What a family file declares: where the parts of a decoder layer are and how they are joined."""

from __future__ import annotations

import dataclasses

from torch import nn

from gateskip.costs import ModelShape

__all__ = ["FamilySpec"]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class FamilySpec:
    """A pre-norm, sequential decoder layer with RMS norms and separate q, k, v projections.

    Attributes:
        model_type: the Hugging Face ``config.model_type`` it stands for, also its registry name.
        decoder: path from the causal LM to the module that owns the layers.
        layers: the decoder's list of layers.
        attention, mlp: branch modules of a layer.
        attention_norm, mlp_norm: RMS norms before the branches.
        norm_eps: attribute of the norms with the epsilon.
        q_norm, k_norm: attributes of the attention with RMS norms on each head, or None.
        fused_attention: rotary embedding turns the whole head by halves and nothing else happens
            between projections and attention, so the CPU kernels may do it.
        fused_mlp: the MLP is down_proj(act_fn(gate_proj(u)) ⊙ up_proj(u)), likewise.
    """

    model_type: str
    decoder: str = "model"
    layers: str = "layers"
    attention: str = "self_attn"
    mlp: str = "mlp"
    attention_norm: str = "input_layernorm"
    mlp_norm: str = "post_attention_layernorm"
    norm_eps: str = "variance_epsilon"
    q_norm: str | None = None
    k_norm: str | None = None
    fused_attention: bool = False
    fused_mlp: bool = False

    def shape(self, model: nn.Module) -> ModelShape:
        """Sizes for the cost formulas, read from the model's config."""
        return self.shape_of_config(model.config, next(model.parameters()).element_size())

    def shape_of_config(self, config: object, weight_bytes: int) -> ModelShape:
        """Sizes for the cost formulas from a Hugging Face config alone."""

        def size(name: str, default: int | None = None) -> int:
            value = getattr(config, name, None)
            return int(default if value is None else value)  # type: ignore[arg-type]

        heads, hidden = size("num_attention_heads"), size("hidden_size")
        return ModelShape(
            layers=size("num_hidden_layers"),
            hidden=hidden,
            heads=heads,
            kv_heads=size("num_key_value_heads", heads),
            head_dim=size("head_dim", hidden // heads),
            intermediate=size("intermediate_size"),
            vocab=size("vocab_size"),
            weight_bytes=weight_bytes,
        )
