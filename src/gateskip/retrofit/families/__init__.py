"""Architecture families: one declarative file each, registered here and nowhere else."""

from gateskip.registry import Registry
from gateskip.retrofit.families.spec import Experts, FamilySpec

__all__ = ["FAMILIES", "Experts", "FamilySpec"]

FAMILIES: Registry[FamilySpec] = Registry("architecture", "gateskip.families")
for _name in (
    "cohere", "gemma2", "gemma3_text", "gpt2", "gpt_neox", "gpt_oss", "granite", "llama", "mistral",
    "mixtral", "olmo2", "phi3", "qwen2", "qwen3", "qwen3_moe", "smollm3",
):  # fmt: skip
    FAMILIES.register(_name, f"gateskip.retrofit.families.{_name}:FAMILY")
