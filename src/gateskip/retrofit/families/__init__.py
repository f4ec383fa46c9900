"""Architecture families: one declarative file each, registered here and nowhere else."""

from gateskip.registry import Registry
from gateskip.retrofit.families.spec import FamilySpec

__all__ = ["FAMILIES", "FamilySpec"]

FAMILIES: Registry[FamilySpec] = Registry("architecture", "gateskip.families")
for _name in ("llama", "mistral", "qwen2", "qwen3"):
    FAMILIES.register(_name, f"gateskip.retrofit.families.{_name}:FAMILY")
