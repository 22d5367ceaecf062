# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
from __future__ import annotations

import pytest
from tiny import training_arguments
from transformers import HfArgumentParser

from transformers_cee import ConsistentEETrainingArguments


def test_defaults():
    args = ConsistentEETrainingArguments(report_to="none", use_cpu=True)
    assert args.phases == ["heads", "hardness", "policy", "consistent"]
    assert (args.heads_objective, args.policy_gradient, args.reward_loss) == ("layer_weighted", "exact", "ce")
    assert (args.policy_holdout, args.policy_exploration, args.policy_entropy_bonus) == (0.0, 0.0, 0.0)
    assert (args.consistent_objective, args.consistent_num_rounds) == ("expected", 1)
    assert args.eval_exit_thresholds == [0.1, 0.3, 0.5, 0.7, 0.9]


@pytest.mark.parametrize(
    "fields,message",
    [
        ({"phases": ["heads", "sleep"]}, "phases.*sleep.*consistent"),
        ({"phases": []}, "phases.*heads"),
        ({"heads_objective": "first"}, "heads_objective.*first.*layer_weighted"),
        ({"policy_gradient": "guess"}, "policy_gradient.*guess.*reinforce"),
        ({"reward_loss": "mse"}, "reward_loss.*mse.*error"),
        ({"consistent_objective": "all"}, "consistent_objective.*all.*sampled"),
        ({"policy_holdout": 1.0}, r"policy_holdout.*1\.0"),
        ({"policy_holdout": -0.1}, r"policy_holdout.*-0\.1"),
        ({"policy_exploration": 1.0}, r"policy_exploration.*1\.0"),
        ({"policy_batch_size": 0}, "policy_batch_size.*0"),
        ({"policy_samples": 0}, "policy_samples.*0"),
        ({"consistent_samples": 0}, "consistent_samples.*0"),
        ({"consistent_num_rounds": 0}, "consistent_num_rounds.*0"),
        ({"eval_exit_thresholds": [0.5, 1.2]}, r"eval_exit_thresholds.*1\.2"),
        ({"label_smoothing_factor": 0.1}, r"label_smoothing_factor.*0\.1"),
    ],
)
def test_wrong_values(tmp_path, fields, message):
    with pytest.raises(ValueError, match=message):
        training_arguments(tmp_path, **fields)


def test_from_a_command_line(tmp_path):
    line = f"--output_dir {tmp_path} --use_cpu --report_to none --phases heads policy --policy_gradient reinforce "
    line += "--eval_exit_thresholds 0.2 0.8 --heads_num_train_epochs 2.5 --exit_learning_rate 0.01"
    (args,) = HfArgumentParser(ConsistentEETrainingArguments).parse_args_into_dataclasses(line.split())
    assert args.phases == ["heads", "policy"] and args.policy_gradient == "reinforce"
    assert args.eval_exit_thresholds == [0.2, 0.8] and args.heads_num_train_epochs == 2.5
    assert args.exit_learning_rate == 0.01 and args.heads_learning_rate is None
