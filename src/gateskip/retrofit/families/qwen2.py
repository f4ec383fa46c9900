"""The qwen2 family."""

from gateskip.retrofit.families.spec import FamilySpec

__all__ = ["FAMILY"]

FAMILY = FamilySpec(model_type="qwen2", fused_attention=True, fused_mlp=True)
