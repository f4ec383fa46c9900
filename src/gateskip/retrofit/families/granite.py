"""The granite family: llama with factors on what branches add and on logits."""

from gateskip.retrofit.families.spec import FamilySpec

__all__ = ["FAMILY"]

FAMILY = FamilySpec(
    model_type="granite",
    multiplier="residual_multiplier",
    logit_divisor="logits_scaling",
)
