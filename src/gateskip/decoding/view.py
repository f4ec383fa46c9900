"""A gated model as its own assistant in Hugging Face's assisted generation."""

from __future__ import annotations

import copy
from typing import Any, TypeVar

from torch import nn

from gateskip.decoding.policies import as_policy, check_policy
from gateskip.retrofit.attach import inner_model
from gateskip.skipping.state import state_of

__all__ = ["draft_view"]

M = TypeVar("M", bound=nn.Module)


def draft_view(model: M, draft: Any = 0.5) -> M:
    """The same weights under a cheaper policy, for ``model.generate(assistant_model=view)``.

    The view has a cache and a generation config of its own, and nothing else: no memory, and what
    changes in the model changes in it. Prefer :func:`~gateskip.generate_speculative`, which drafts
    in the model's own cache and need not run the prompt twice.

    Args:
        draft: a share kept, a budget, ``"dense"`` or a policy of :mod:`gateskip.decoding`.

    Returns:
        An object of the model's class, whose ``generate`` and calls run under the policy.

    Raises:
        ConfigError, BudgetError: a policy that the model cannot run.
    """
    policy = as_policy("draft", draft)
    check_policy("draft", policy, model)
    inner: Any = inner_model(model)
    state = state_of(inner)
    view = copy.copy(inner)
    view.generation_config = copy.deepcopy(inner.generation_config)
    own = vars(view)

    def under(function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            with policy.on(state):
                return function(*args, **kwargs)

        return call

    generate = vars(inner)["generate"].__func__
    own["generate"] = under(generate.__get__(view))
    own["forward"] = under(type(inner).forward.__get__(view))
    return view
