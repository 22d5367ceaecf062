# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""What stored exits say, and what their files hold."""

from __future__ import annotations

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import save_file
from tiny import collate, task, tiny_model

from transformers_cee.stores.filling import collect_exits
from transformers_cee.stores.store import ExitStore


class TestStore:
    def test_losses_errors_correct(self):
        logits = torch.tensor([[[2.0, 1.0], [0.0, 3.0]], [[1.0, 0.0], [4.0, 0.0]]])
        store = ExitStore(
            torch.zeros(2, 2, 1), logits, torch.tensor([1, 0]), torch.tensor([1, 2]), "single_label_classification"
        )
        assert store.correct.tolist() == [[False, True], [True, True]]
        assert store.errors.tolist() == [[1.0, 0.0], [0.0, 0.0]]
        expected = -torch.stack([logits[0].log_softmax(-1)[:, 1], logits[1].log_softmax(-1)[:, 0]])
        torch.testing.assert_close(store.losses, expected)

    @pytest.mark.parametrize(
        "logits,labels,problem_type,expected",
        [
            ([[1.0, 0.0], [2.0, 0.0], [0.0, 1.0]], 0, "single_label_classification", [1.0, 1.0, 0.0]),
            ([[1.0, 1.0], [-2.0, 3.0], [1.0, -1.0]], [0.0, 0.0], "multi_label_classification", [0.5, 1.0, 0.0]),
            ([[1.0], [2.5], [3.0]], 9.0, "regression", [2.0, 0.5, 0.0]),
        ],
    )
    def test_disagreements_know_no_label(self, logits, labels, problem_type, expected):
        layers = torch.tensor([1, 2, 3])
        store = ExitStore(torch.zeros(1, 3, 1), torch.tensor([logits]), torch.tensor([labels]), layers, problem_type)
        assert store.disagreements.tolist() == [expected]

    def test_multi_label_needs_every_label(self):
        logits = torch.tensor([[[2.0, -1.0], [2.0, 1.0]]])
        store = ExitStore(
            torch.zeros(1, 2, 1),
            logits,
            torch.tensor([[1.0, 1.0]]),
            torch.tensor([1, 2]),
            "multi_label_classification",
        )
        assert store.correct.tolist() == [[False, True]]

    @pytest.mark.parametrize("tolerance,expected", [(0.0, [0, 0]), (0.5, [0, 1]), (2.0, [1, 1])])
    def test_regression_has_a_tolerance(self, tolerance, expected):
        logits = torch.tensor([[[2.0], [1.25]]])
        store = ExitStore(
            torch.zeros(1, 2, 1), logits, torch.tensor([1.0]), torch.tensor([1, 2]), "regression", tolerance
        )
        assert store.correct.int().tolist() == [expected]

    def test_select(self):
        store = ExitStore(
            torch.arange(8.0).view(4, 2, 1),
            torch.arange(8.0).view(4, 2, 1),
            torch.arange(4),
            torch.tensor([1, 2]),
            "regression",
            0.1,
        )
        some = store.select(torch.tensor([3, 1]))
        assert some.states[:, 0, 0].tolist() == [6.0, 2.0] and some.labels.tolist() == [3, 1] and some.tolerance == 0.1
        assert len(some) == 2
        torch.testing.assert_close(some.losses[:, 0], store.losses[[3, 1], 0])

    def test_without_what_tokens_need(self):
        store = ExitStore(torch.zeros(1, 2, 1), None, torch.tensor([1]), torch.tensor([1, 2]), "regression")
        with pytest.raises(ValueError, match=r"token_losses"):
            store.losses  # noqa: B018


class TestDamage:
    @pytest.mark.parametrize("damage", ["cut", "empty", "other", "field"])
    def test_the_file_is_named(self, tmp_path, damage):
        path = tmp_path / "exits.safetensors"
        kind = "single_label_classification"
        collect_exits(tiny_model(), task(4, seed=1), collate, Accelerator(cpu=True), problem_type=kind).save(path)
        content = path.read_bytes()
        if damage in ("other", "field"):
            save_file({"weight": torch.ones(2)}, path, None if damage == "other" else {"problem_type": "regression"})
        else:
            path.write_bytes(content[:-5] if damage == "cut" else b"")
        with pytest.raises(ValueError, match=r"exits\.safetensors is damaged, or no store .* store the exits again"):
            ExitStore.load(path)

    def test_a_missing_file_is_missing(self, tmp_path):
        with pytest.raises(FileNotFoundError, match="none"):
            ExitStore.load(tmp_path / "none.safetensors")


class TestWhatDoesNotFit:
    def made(self, **fields):
        parts = {
            "states": torch.zeros(3, 4, 8),
            "logits": torch.zeros(3, 4, 2),
            "labels": torch.zeros(3, dtype=torch.long),
            "layers": torch.arange(1, 5),
            "problem_type": "single_label_classification",
        }
        return ExitStore(**{**parts, **fields})

    @pytest.mark.parametrize(
        "name,shape", [("states", (2, 4, 8)), ("states", (3, 3, 8)), ("logits", (3, 5, 2)), ("features", (2, 3, 5))]
    )
    def test_shapes(self, name, shape):
        assert len(self.made()) == 3
        with pytest.raises(ValueError, match=rf"`{name}` of shape \({shape[0]}, .* must begin with \(3,"):
            self.made(**{name: torch.zeros(shape)})

    def test_an_unknown_loss(self):
        with pytest.raises(ValueError, match=r"`name`='mse' is unknown; accepted are ce, error, disagreement"):
            self.made().reward_losses("mse")
