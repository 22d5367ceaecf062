# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""The card of a folder with exits alone: what they are, what they belong to, and how to load them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from huggingface_hub import ModelCardData

from transformers_cee.exits.config_loading import spoken_exits
from transformers_cee.families import MODELS


def exits_card(model: Any, record: Mapping[str, Any], name: str) -> str:
    """A card in Markdown.

    Args:
        model (`PreTrainedModel`): the model that has the exits.
        record (mapping): what the folder says of them, see `ExitsFolder`.
        name (`str`): where the exits are loaded from.
    """
    config, base = model.config, record["base"]
    auto_class = MODELS[config.model_type].auto_classes[0]
    data = ModelCardData(
        base_model=base,
        base_model_relation="adapter",
        library_name="transformers",
        pipeline_tag=MODELS[config.model_type].task,
        tags=["early-exit", "transformers-cee", "exits"],
    )
    at = f" at revision `{record['revision']}`" if record["revision"] else ""
    along = " and ".join(f"`{task}`" for task in record["task_modules"])
    parts = f"heads, policies and thresholds{f', with {along} of the last exit' if along else ''}"
    is_text = str(MODELS[config.model_type].task).startswith("text")
    auto_classes = f"{auto_class}, AutoTokenizer" if is_text else auto_class
    tokenizer = f"\ntokenizer = AutoTokenizer.from_pretrained({base!r})" if is_text else ""
    points = ", ".join(f"`{point}`" for point in config.exit_operating_points)
    speeds = f"\nOperating points, for `exit_threshold=`: {points}.\n" if points else ""
    return f"""---
{data.to_yaml()}
---

# Exits for {base}

Early exits without their base: {parts}. They belong to `{base}`{at}, which stays as it is,
and to no other weights. The model has {config.num_hidden_layers} layers and {spoken_exits(record["layers"])}.
{speeds}
```bash
pip install transformers-cee
```

```python
import transformers_cee  # makes the Auto classes know these models
from transformers import {auto_classes}

model = {auto_class}.from_pretrained({name!r})  # loads the base, too{tokenizer}
```

Around a base that is loaded already, or as one of several sets of exits:

```python
from transformers_cee import load_exits

model = load_exits(base, {name!r})
```
"""


__all__ = ["exits_card"]
