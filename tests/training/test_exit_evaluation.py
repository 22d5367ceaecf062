# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""What an evaluation found of exits comes with its result."""

from __future__ import annotations

from tiny import tiny_llama, tiny_text_trainer, tiny_trainer


def test_what_an_evaluation_found_comes_with_it(tmp_path):
    """Rows at the exits asked for, counted tokens that may leave; the trainer itself keeps none of it."""
    encoder = tiny_trainer(tmp_path)
    loader = encoder.get_eval_dataloader()
    before = set(vars(encoder))
    first = encoder.run_exits(loader, "first", exit_arguments={"exit_threshold": 0.0})
    last = encoder.run_exits(loader, "last", exit_arguments={"exit_threshold": 1.0})
    assert first.items.exit_layers.tolist() == [1] * 24 and last.items.exit_layers.tolist() == [4] * 24
    every = encoder.run_exits(loader, "all", exit_arguments={"output_all_exits": True})
    assert every.items.losses.shape == (24, 4) and every.predictions.shape == (24, 3)
    assert {one for one in vars(encoder) if one not in before} <= {"model_preparation_time"}

    decoder = tiny_text_trainer(tmp_path, tiny_llama(exit_threshold=0.5))
    loader = decoder.get_eval_dataloader()
    full = decoder.run_exits(loader, "full", exit_arguments={"exit_threshold": 1.0})
    text = full.items.known_text
    assert len(text.labels) == sum(label != -100 for row in decoder.eval_dataset["labels"] for label in row[1:])
    assert len(full.items.exit_layers) == int(text.may_exit.sum()) < len(text.labels)
    assert "eval_agreement" not in full.metrics
    same = decoder.run_exits(loader, "again", exit_arguments={"exit_threshold": 1.0}, full_depth=text)
    assert same.metrics["eval_agreement"] == 1.0


def test_an_evaluation_without_rows(tmp_path):
    trainer = tiny_trainer(tmp_path)
    output = trainer.run_exits(trainer.get_eval_dataloader(trainer.eval_dataset.select([])), "none")
    assert output.items is None and output.num_samples == 0
