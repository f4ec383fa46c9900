"""The gpt-oss family: mixtures of experts, attention sinks, windows in every second layer."""

from gateskip.retrofit.families.spec import Experts, FamilySpec

__all__ = ["FAMILY"]

FAMILY = FamilySpec(
    model_type="gpt_oss",
    layer_kind="layer_type",
    experts=Experts(),
)
