"""The mistral family."""

from gateskip.retrofit.families.spec import FamilySpec

__all__ = ["FAMILY"]

FAMILY = FamilySpec(model_type="mistral")
