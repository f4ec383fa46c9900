"""Other methods on the contract of the gates: one file each, naming its paper.

A method turns a plain or a gated model into one that skips by its rule, with thresholds for every
budget: ``gateskip.budget``, ``generate``, ``trace`` and the evaluation work as with gates.
"""

from typing import Any

from torch import nn

from gateskip.execution.api import detach
from gateskip.methods.base import Method, is_gated
from gateskip.registry import Registry
from gateskip.skipping.state import state_of

__all__ = ["METHODS", "Method", "apply"]

METHODS: Registry[type[Method]] = Registry("method", "gateskip.methods")
_BUILT_IN = {
    "calm": "calm:Calm",
    "every_second": "static:EverySecond",
    "fixed_layers": "fixed_layers:FixedLayers",
    "flexidepth": "flexidepth:FlexiDepth",
    "free": "free:Free",
    "gate_norm": "gate_norm:GateNorm",
    "gate_norm_linear": "linear:GateNormLinear",
    "layerskip": "layerskip:LayerSkip",
    "llm_drop": "llm_drop:LLMDrop",
    "llm_drop_linear": "linear:LLMDropLinear",
    "mixture_of_depths": "mixture_of_depths:MixtureOfDepths",
    "position": "position:Position",
    "random": "random:Random",
    "router_tuning": "routers:RouterTuning",
    "shortgpt": "shortgpt:ShortGPT",
    "shortgpt_linear": "linear:ShortGPTLinear",
    "skipgpt": "routers:SkipGPT",
    "token_identity": "token_identity:TokenIdentity",
}
for _name, _target in _BUILT_IN.items():
    METHODS.register(_name, f"gateskip.methods.{_target}")


def apply(
    name: str, model: nn.Module, data: Any, tokenizer: Any = None, **options: Any
) -> nn.Module:
    """Make a model skip by a method; the same object.

    Args:
        name: registered name, such as ``"shortgpt"``. model: a plain or gated causal LM.
        data: texts, rows or id tensors (see ``gateskip.data``); at least 1,000 tokens.
        options: fields of the method, such as ``seed=3`` of ``"random"``.

    Raises:
        ConfigError: an unknown name or option, or a model that a method cannot take.
        DataError: too little text.
    """
    method = METHODS.get(name).of(name, options)
    gated = is_gated(model)
    try:
        model = method.apply(model, data, tokenizer)
    except Exception:
        if not gated and is_gated(model):
            detach(model)  # as it was given
        raise
    state_of(model).method = name
    return model
