"""The mistral family."""

from gateskip.retrofit.families.spec import FamilySpec

__all__ = ["FAMILY"]

FAMILY = FamilySpec(model_type="mistral", fused_attention=True, fused_mlp=True)
