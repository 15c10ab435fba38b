"""Which layers of the base get an adapter, and how peft puts it there."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from loramux_adapters.errors import RecipeError
from loramux_adapters.training.recipe import Recipe


def target_names(base: Any, recipe: Recipe) -> list[str]:
    """Last path components of the layers to adapt, sorted: those of the recipe, or all linear ones but the output head.

    Raises:
        RecipeError: the recipe names a layer that the base does not have, or one that is not linear.
    """
    head = base.get_output_embeddings()
    linears = {
        path.rpartition(".")[2]: module for path, module in base.named_modules() if isinstance(module, nn.Linear)
    }
    known = sorted(name for name, module in linears.items() if module is not head)
    unknown = sorted(set(recipe.target_modules) - set(known))
    if unknown:
        raise RecipeError(
            f"target_modules: no layer that can be trained is called {', '.join(unknown)}; those of this base are "
            f"{', '.join(known)}"
        )
    return sorted(set(recipe.target_modules)) or known


def add_lora(base: Any, recipe: Recipe) -> Any:
    """The base, changed in place, with fresh LoRA layers: A random from the recipe's seed, B zero, both fp32.

    Raises:
        RecipeError: see `target_names`.
    """
    alpha: Any = int(recipe.alpha) if float(recipe.alpha).is_integer() else recipe.alpha
    config = LoraConfig(
        r=recipe.rank,
        lora_alpha=alpha,
        lora_dropout=recipe.dropout,
        use_rslora=recipe.rslora,
        target_modules=target_names(base, recipe),
        bias="none",
        task_type="CAUSAL_LM",
    )
    with torch.random.fork_rng(), warnings.catch_warnings():
        # peft 0.21 asks transformers for a property by its old name
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
        torch.manual_seed(recipe.seed)
        return get_peft_model(base, config)
