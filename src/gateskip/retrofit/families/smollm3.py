"""The smollm3 family: llama with layers that do not turn queries and keys."""

from gateskip.retrofit.families.spec import FamilySpec

__all__ = ["FAMILY"]

FAMILY = FamilySpec(
    model_type="smollm3",
    rotates="use_rope",
    layer_kind="use_rope",
)
