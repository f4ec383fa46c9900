"""The mixtral family: mistral with mixtures of experts."""

from gateskip.retrofit.families.spec import Experts, FamilySpec

__all__ = ["FAMILY"]

FAMILY = FamilySpec(
    model_type="mixtral",
    experts=Experts(),
)
