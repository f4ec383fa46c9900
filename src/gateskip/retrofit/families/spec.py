"""What a family file declares: where the parts of a decoder layer are and how they are joined."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

from torch import nn
from transformers.pytorch_utils import Conv1D

from gateskip.costs import ModelShape
from gateskip.retrofit.devices import comes_and_goes

__all__ = ["Experts", "FamilySpec", "sliceable"]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Experts:
    """Names of the config's fields on mixtures of experts.

    Attributes:
        count: experts of a layer. per_token: experts that a token uses. inner: width of one.
        dense: list of layers with a plain MLP, or None. step: every how many layers has experts.
    """

    count: str = "num_local_experts"
    per_token: str = "num_experts_per_tok"
    inner: str = "intermediate_size"
    dense: str | None = None
    step: str | None = None


def sliceable(projection: nn.Module) -> bool:
    """Whether some outputs of a projection can be computed alone: it is plain, and unhooked."""
    hooked = bool(projection._forward_hooks or projection._forward_pre_hooks)
    hooked = hooked or comes_and_goes(projection)
    return type(projection) in (nn.Linear, Conv1D) and not hooked


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class FamilySpec:
    """One decoder layer: residual + out(attention(norm(residual))), then the MLP alike.

    Names are attributes: of the layer for modules and norms, of the attention below them.

    Attributes:
        model_type: the Hugging Face ``config.model_type`` it stands for, also its registry name.
        decoder: path from the causal LM to the module that owns the layers. layers: their list.
        attention, mlp: branch modules of a layer.
        attention_norm, mlp_norm: norms before the branches; None: the branch reads the residual.
        norm_kind: ``"rms"``, ``"rms_offset"`` (weight + 1) or ``"layer"``.
        norm_eps: attribute of the norms with the epsilon.
        attention_out, mlp_out: modules that a branch's output passes, in turn, before it is added.
        multiplier: attribute with a factor on what is added.
        parallel: attribute that says whether both branches read the layer's input (True: always).
        sum_first: in a parallel layer the outputs are added before the residual (rounding).
        kv: ``"separate"`` k_proj and v_proj, ``"fused"`` queries, keys and values one after the
            other, or ``"interleaved"`` head by head.
        qkv: the one projection of the last two.
        head_dim: attribute with the width of a head.
        q_norm, k_norm: norms of queries and keys, of each head or of all heads together.
        rotary: the function of the family's module that turns queries and keys, or None.
        rotates: attribute that says whether this layer turns them (None: all do).
        layer_kind: attribute that tells kinds of attention apart; ``previous`` copies keys and
            values of the last layer of the same kind.
        experts: mixtures of experts. mlp_projections: matrices of a plain MLP.
        final_norm: the decoder's norm after the last layer.
        logit_scale, logit_divisor, logit_softcap: config fields on what follows the LM head.
        fused_attention: rotary embedding turns the whole head by halves and nothing else happens
            between projections and attention, so the CPU kernels may do it.
        fused_mlp: the MLP is down_proj(act_fn(gate_proj(u)) ⊙ up_proj(u)), likewise.
    """

    model_type: str
    decoder: str = "model"
    layers: str = "layers"
    attention: str = "self_attn"
    mlp: str = "mlp"
    attention_norm: str | None = "input_layernorm"
    mlp_norm: str | None = "post_attention_layernorm"
    norm_kind: Literal["rms", "rms_offset", "layer"] = "rms"
    norm_eps: str = "variance_epsilon"
    attention_out: tuple[str, ...] = ()
    mlp_out: tuple[str, ...] = ()
    multiplier: str | None = None
    parallel: str | bool = False
    sum_first: bool = False
    kv: Literal["separate", "fused", "interleaved"] = "separate"
    qkv: str = "qkv_proj"
    head_dim: str = "head_dim"
    q_norm: str | None = None
    k_norm: str | None = None
    rotary: str | None = "apply_rotary_pos_emb"
    rotates: str | None = None
    layer_kind: str | None = None
    experts: Experts | None = None
    mlp_projections: int = 3
    final_norm: str = "norm"
    logit_scale: str | None = None
    logit_divisor: str | None = None
    logit_softcap: str | None = None
    fused_attention: bool = False
    fused_mlp: bool = False

    def is_parallel(self, layer: nn.Module) -> bool:
        """Whether both branches of ``layer`` read its input."""
        if isinstance(self.parallel, bool):
            return self.parallel
        return bool(getattr(layer, self.parallel))

    def sources(self, layers: list[nn.Module]) -> tuple[int | None, ...]:
        """For each layer the last one before whose attention is of the same kind."""
        last: dict[Any, int] = {}
        found: list[int | None] = []
        for index, layer in enumerate(layers):
            attention = getattr(layer, self.attention)
            kind = None if self.layer_kind is None else getattr(attention, self.layer_kind)
            found.append(last.get(kind))
            last[kind] = index
        return tuple(found)

    def shape(self, model: nn.Module) -> ModelShape:
        """Sizes for the cost formulas, read from the model's config."""
        shape = self.shape_of_config(model.config, next(model.parameters()).element_size())
        if self.kv != "fused":
            return shape
        first = getattr(model.get_submodule(self.decoder), self.layers)[0]
        whole = not sliceable(getattr(getattr(first, self.attention), self.qkv))
        return dataclasses.replace(shape, whole_qkv=whole)

    def shape_of_config(self, config: Any, weight_bytes: int) -> ModelShape:
        """Sizes for the cost formulas from a Hugging Face config alone."""

        def size(name: str, default: int | None = None) -> int:
            value = getattr(config, name, None)
            return int(default if value is None else value)  # type: ignore[arg-type]

        heads, hidden, layers = (
            size(n) for n in ("num_attention_heads", "hidden_size", "num_hidden_layers")
        )
        experts: dict[str, Any] = {}
        if self.experts is not None and size(self.experts.count, 0):
            names = self.experts
            dense = (getattr(config, names.dense, None) or ()) if names.dense else ()
            step = size(names.step, 1) if names.step else 1
            experts = {
                "experts": size(names.count),
                "experts_per_token": size(names.per_token),
                "expert_intermediate": size(names.inner),
                "dense_layers": frozenset(
                    i for i in range(layers) if i in dense or (i + 1) % step != 0
                ),
            }
        return ModelShape(
            layers=layers,
            hidden=hidden,
            heads=heads,
            kv_heads=size("num_key_value_heads", heads),
            head_dim=size("head_dim", hidden // heads),
            # GPT-2 calls it n_inner, and means four times the width by None.
            intermediate=size("intermediate_size", size("n_inner", 4 * hidden)),
            vocab=size("vocab_size"),
            mlp_projections=self.mlp_projections,
            weight_bytes=weight_bytes,
            whole_qkv=self.kv == "interleaved",
            **experts,
        )
