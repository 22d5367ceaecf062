# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""The card that the trainer writes."""

from __future__ import annotations

import inspect

import pytest
from huggingface_hub import ModelCard
from tiny import tiny_text_trainer, tiny_trainer
from transformers import Trainer

from transformers_cee.training.early_exit_trainer import EarlyExitTrainer


class TestCard:
    def test_arguments_are_those_of_trainer(self):
        ours, stock = (inspect.signature(kind.create_model_card).parameters for kind in (EarlyExitTrainer, Trainer))
        assert list(ours) == list(stock)

    @pytest.mark.parametrize("listed", [True, False])
    def test_what_is_given_is_written(self, tmp_path, listed):
        given = {"tags": "mine", "tasks": "sentence-similarity", "dataset_tags": "owner/data", "dataset_args": "one"}
        trainer = tiny_trainer(tmp_path, eval_exit_thresholds=[])
        trainer.evaluate()
        trainer.create_model_card(**{name: [value] if listed else value for name, value in given.items()})
        data = ModelCard.load(tmp_path / "README.md").data
        assert {"mine", "early-exit"} <= {*data.tags} and data.pipeline_tag == "sentence-similarity"
        assert data.datasets == ["owner/data"]

    def test_task_of_the_model(self, tmp_path):
        for kind, task in ((tiny_trainer, "text-classification"), (tiny_text_trainer, "text-generation")):
            trainer = kind(tmp_path / task, eval_exit_thresholds=[])
            trainer.evaluate()
            trainer.create_model_card()
            data = ModelCard.load(tmp_path / task / "README.md").data
            assert data.pipeline_tag == task and data.tags == ["early-exit", "transformers-cee", "consistentee"]
