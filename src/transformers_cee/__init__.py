# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Early exits for 🤗 Transformers: train, publish and load models in which every input leaves at its own layer.

Importing the package registers its configs with `AutoConfig` and its exits with PEFT, and imports both; a family's
models follow with the first config that is made.
"""

from transformers_cee import auto
from transformers_cee.lazy import lazy_names


__version__ = "0.1.0"

_PUBLIC = {
    "BertCeeConfig": "models.bert_cee",
    "BertCeeModel": "models.bert_cee",
    "BertForConsistentEE": "models.bert_cee",
    "ConsistentEETrainer": "training.trainer",
    "ConsistentEETrainingArguments": "training.training_args",
    "EarlyExitTextClassificationPipeline": "pipelines",
    "EarlyExitCache": "generation.cache",
    "ExitCausalLMOutput": "exits.outputs",
    "ExitClassifierOutput": "exits.outputs",
    "ExitThresholds": "calibration.thresholds",
    "LlamaCeeConfig": "models.llama_cee",
    "LlamaCeeModel": "models.llama_cee",
    "LlamaForConsistentEECausalLM": "models.llama_cee",
    "OperatingPoint": "evaluation.operating_points",
    "calibrate_agreement": "calibration.agreement",
    "calibrate_budget": "calibration.budget",
    "calibrate_risk": "calibration.risk",
    "exit_lora_config": "lora",
    "fit_estimators": "training.estimators",
    "fit_token_hash": "training.estimators",
    "score_store": "calibration.scores",
}

__all__ = ["__version__", *sorted(_PUBLIC)]

auto.register()

__getattr__, __dir__ = lazy_names(__name__, _PUBLIC)
