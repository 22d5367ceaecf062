# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Early exits for 🤗 Transformers: train, publish and load models in which every input leaves at its own layer.

Importing the package registers its configs with `AutoConfig` and its exits with PEFT, and imports both; a family's
models follow with the first config that is made.
"""

from contextlib import suppress
from importlib import import_module

from transformers_cee import auto
from transformers_cee.families import MODELS
from transformers_cee.lazy import lazy_names


__version__ = "0.1.0"

_PUBLIC = {
    # The classes of every family.
    **{
        name.rpartition(".")[2]: name.rpartition(".")[0].removeprefix(f"{__name__}.")
        for entry in MODELS.values()
        for name in entry.classes
    },
    "AddedExits": "adding.report",
    "BodyWithoutExits": "modeling.body",
    "BulkSummary": "bulk.classifying",
    "CalibratedPoint": "calibration.points",
    "ClassifierExitConfigMixin": "exits.configuration",
    "ConsistentEETrainer": "training.trainer",
    "ConsistentEETrainingArguments": "training.training_args",
    "CertifiedSpeed": "adding.report",
    "CostTable": "calibration.cost_table",
    "DecoderExitConfigMixin": "exits.configuration",
    "EarlyExitCache": "generation.cache",
    "EarlyExitCausalLM": "modeling.causal_lm",
    "EarlyExitImageClassifier": "modeling.image_classification",
    "EarlyExitSequenceClassifier": "modeling.sequence_classification",
    "EarlyExitTextClassificationPipeline": "pipelines",
    "EncoderExitConfigMixin": "exits.configuration",
    "ExitCausalLMOutput": "exits.outputs",
    "ExitClassifierOutput": "exits.outputs",
    "ExitChoice": "calibration.exit_choice",
    "ExitCriterion": "exits.criteria",
    "ExitPlan": "calibration.exit_plans",
    "ExitRates": "calibration.exit_plans",
    "ExitStep": "exits.criteria",
    "ExitStore": "stores.store",
    "HeadsObjective": "training.heads_objectives",
    "HeadsStep": "training.heads_objectives",
    "JumpDrafter": "exits.jump_drafter",
    "LMExitHead": "exits.lm_heads",
    "MeasuredBatch": "calibration.cost_table",
    "ModelEntry": "families",
    "OperatingPoint": "evaluation.operating_points",
    "RemoteCodeConfigMixin": "modeling.remote_code",
    "RewardStep": "training.rewards",
    "Timer": "evaluation.timing",
    "add_exits": "adding.run",
    "area_under_curve": "evaluation.curves",
    "bootstrap_interval": "evaluation.statistics",
    "calibrate_agreement": "calibration.agreement",
    "calibrate_budget": "calibration.budget",
    "calibrate_price": "calibration.prices",
    "calibrate_risk": "calibration.risk",
    "choose_exits": "calibration.exit_choice",
    "classify": "bulk.classifying",
    "classify_on_ray": "bulk.ray_data",
    "collect_exits": "stores.filling",
    "compare_at_depth": "evaluation.statistics",
    "elue_score": "evaluation.curves",
    "exit_costs": "evaluation.costs",
    "exit_lora_config": "lora",
    "exit_points": "evaluation.comparison",
    "exit_reliability": "evaluation.reliability",
    "exits_taken": "stores.scoring",
    "fit_drafter": "fitting.drafter",
    "fit_estimators": "training.estimators",
    "fit_exit_budgets": "evaluation.exit_budget",
    "fit_token_hash": "training.estimators",
    "load_exits": "modeling.exit_sets",
    "fixed_sequence": "calibration.risk",
    "hindsight_curve": "evaluation.operating_points",
    "load_metric": "evaluation.exit_metrics",
    "measured_exit_costs": "evaluation.costs",
    "metric_at_speedup": "evaluation.curves",
    "metric_path": "evaluation.exit_metrics",
    "overthinking": "evaluation.overthinking",
    "packed_linears": "generation.packed",
    "paired_bootstrap": "evaluation.statistics",
    "paired_differences": "evaluation.statistics",
    "plan_exits": "calibration.exit_plans",
    "plot_reliability": "evaluation.plots",
    "plot_seeds": "evaluation.plots",
    "register_criterion": "exits.criteria",
    "register_exit_head": "exits.lm_heads",
    "register_heads_objective": "training.heads_objectives",
    "register_model": "auto",
    "register_reward": "training.rewards",
    "register_token_loss": "exits.token_losses",
    "score_exits": "stores.scoring",
    "score_store": "calibration.scores",
    "spread_table": "evaluation.report",
    "thresholds_for_depths": "stores.scoring",
    "with_rejection": "calibration.budget",
}

__all__ = ["__version__", *sorted(_PUBLIC)]

auto.register_configs()

# An adapter may be loaded on a stock model, before there is a config of ours. A PEFT that does not fit the packages
# beside it says so to whoever uses it.
with suppress(ImportError):
    import_module("transformers_cee.lora")

__getattr__, __dir__ = lazy_names(__name__, _PUBLIC)
