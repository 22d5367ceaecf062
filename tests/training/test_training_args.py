# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
from __future__ import annotations

import pytest
from tiny import training_arguments
from transformers import HfArgumentParser

from transformers_cee import ConsistentEETrainingArguments
from transformers_cee.exits.token_losses import CrossEntropy, FinalArgmax, FinalDistributionKL
from transformers_cee.training.heads_objectives import CoSEE


def test_defaults():
    args = ConsistentEETrainingArguments(report_to="none", use_cpu=True)
    assert args.phases == ["heads", "hardness", "policy", "consistent"]
    assert (args.heads_objective, args.policy_gradient, args.reward_loss) == ("layer_weighted", "exact", "ce")
    assert args.reward == "hardness_guided"
    assert (args.policy_holdout, args.policy_exploration, args.policy_entropy_bonus) == (0.0, 0.0, 0.0)
    assert (args.consistent_objective, args.consistent_num_rounds) == ("expected", 1)
    assert args.eval_exit_thresholds == [0.1, 0.3, 0.5, 0.7, 0.9]
    assert (args.trainable, args.token_loss, args.policy_max_tokens) == ("all", "ce", None)


@pytest.mark.parametrize(
    "fields,message",
    [
        ({"phases": ["heads", "sleep"]}, "phases.*sleep.*consistent"),
        ({"phases": []}, "phases.*heads"),
        ({"heads_objective": "first"}, "heads_objective.*first.*layer_weighted"),
        ({"policy_gradient": "guess"}, "policy_gradient.*guess.*reinforce"),
        ({"reward": "none"}, "`reward`='none' is unknown; accepted are hardness_guided, per_layer"),
        ({"reward_loss": "mse"}, "reward_loss.*mse.*error.*disagreement"),
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
        ({"trainable": "heads"}, "trainable.*heads.*exits"),
        ({"trainable": "exits", "heads_objective": "last"}, "heads_objective.*last.*trainable"),
        ({"trainable": "exits", "heads_objective": "two_stage"}, "heads_objective.*two_stage.*trainable"),
        ({"trainable": "exits", "heads_objective": "alternate"}, "heads_objective.*alternate.*trainable"),
        ({"heads_objective": "cosee", "heads_objective_options": {"beta": -1}}, "heads_objective_options.*beta.*-1"),
        ({"heads_objective_options": {"beta": 1}}, "heads_objective_options.*beta.*layer_weighted"),
        ({"heads_objective_options": "beta"}, "heads_objective_options.*beta.*dictionary"),
        ({"token_loss": "mse"}, "token_loss.*mse.*kl"),
        ({"token_loss": "kl", "token_loss_options": {"temperature": 0}}, "token_loss_options.*kl.*temperature.*0"),
        ({"token_loss": "kl", "token_loss_options": {"top_k": -1}}, "token_loss_options.*kl.*top_k.*-1"),
        ({"token_loss": "kl", "token_loss_options": {"top_k": 2.5}}, r"token_loss_options.*kl.*top_k.*2\.5"),
        ({"token_loss": "kl", "token_loss_options": {"top": 1}}, "token_loss_options.*top.*temperature, top_k"),
        ({"token_loss": "argmax", "token_loss_options": {"entropy_weight": 1.5}}, r"options.*entropy_weight.*1\.5"),
        ({"policy_max_tokens": 0}, "policy_max_tokens.*0"),
        ({"phases": ["heads", "heads"]}, "phases.*heads.*twice"),
        ({"policy_batch_size": 2.5}, r"`policy_batch_size`=2\.5 must be a whole number of at least 1"),
        ({"policy_samples": True}, r"`policy_samples`=True must be a whole number"),
        ({"policy_learning_rate": "a"}, r"`policy_learning_rate`='a' must be a number of at least 0"),
        ({"policy_learning_rate": None}, r"`policy_learning_rate`=None must be a number"),
        ({"exit_learning_rate": -1.0}, r"`exit_learning_rate`=-1\.0 must be a number of at least 0, or None"),
        ({"policy_entropy_bonus": float("nan")}, r"`policy_entropy_bonus`=nan must be a number that is finite"),
        ({"policy_num_train_epochs": float("inf")}, r"`policy_num_train_epochs`=inf must be a number"),
        ({"hardness_tolerance": -1}, r"`hardness_tolerance`=-1 must be a number of at least 0"),
        ({"store_memory_limit_mb": -1}, r"`store_memory_limit_mb`=-1 must be a whole number of at least 0"),
        ({"eval_timing_rows": -1}, r"`eval_timing_rows`=-1 must be a whole number of at least 0"),
        ({"eval_exit_thresholds": 0.5}, r"`eval_exit_thresholds`=0\.5 must be a list"),
        ({"eval_exit_thresholds": ["a"]}, r"`eval_exit_thresholds`='a' must be a number in \[0, 1\]"),
    ],
)
def test_wrong_values(tmp_path, fields, message):
    with pytest.raises(ValueError, match=message):
        training_arguments(tmp_path, **fields)


@pytest.mark.parametrize(
    "fields,expected",
    [
        ({}, CrossEntropy()),
        ({"token_loss": "kl", "token_loss_options": {"temperature": 2.0, "top_k": 5}}, FinalDistributionKL(2.0, 5)),
        ({"token_loss": "argmax", "token_loss_options": {"entropy_weight": 0.25}}, FinalArgmax(0.25)),
    ],
)
def test_token_loss(tmp_path, fields, expected):
    assert training_arguments(tmp_path, **fields).make_token_loss() == expected


def test_from_a_command_line(tmp_path):
    line = f"--output_dir {tmp_path} --use_cpu --report_to none --phases heads policy --policy_gradient reinforce "
    line += "--eval_exit_thresholds 0.2 0.8 --heads_num_train_epochs 2.5 --exit_learning_rate 0.01 "
    line += '--token_loss kl --token_loss_options {"top_k":20} '
    line += "--policy_max_tokens 5000 --trainable exits "
    line += '--heads_objective cosee --heads_objective_options {"samples":3,"beta":2.5}'
    (args,) = HfArgumentParser(ConsistentEETrainingArguments).parse_args_into_dataclasses(line.split())
    assert args.phases == ["heads", "policy"] and args.policy_gradient == "reinforce"
    assert args.eval_exit_thresholds == [0.2, 0.8] and args.heads_num_train_epochs == 2.5
    assert args.exit_learning_rate == 0.01 and args.heads_learning_rate is None
    assert args.make_token_loss() == FinalDistributionKL(top_k=20) and args.policy_max_tokens == 5000
    assert args.trainable == "exits"
    assert args.make_heads_objective() == CoSEE(samples=3, beta=2.5)
