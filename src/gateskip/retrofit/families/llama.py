"""The llama family."""

from gateskip.retrofit.families.spec import FamilySpec

__all__ = ["FAMILY"]

FAMILY = FamilySpec(model_type="llama", fused_attention=True, fused_mlp=True)
