# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""What a user adds from a file of their own, by public names alone, and then asks for by name: in calls, configs,
training arguments and on command lines. Each is compared with plain loops that know nothing of the package."""

from __future__ import annotations

import copy
import importlib.util
import math
from types import ModuleType

import pytest
import torch
from tiny import (
    collate,
    instructions,
    pad,
    random_rows,
    task,
    tiny_llama,
    tiny_model,
    tiny_text_trainer,
    tiny_trainer,
    weights,
)
from torch.nn import functional as F
from transformers import (
    AutoModelForSequenceClassification,
    HfArgumentParser,
    LlamaConfig,
    LlamaForCausalLM,
)

from transformers_cee import (
    BertForConsistentEE,
    ConsistentEETrainingArguments,
    LlamaForConsistentEECausalLM,
    exit_costs,
    score_exits,
)
from transformers_cee.engines import ENGINES, Engine, register_engine
from transformers_cee.engines.graphs import exit_graphs, exit_name, layer_graphs
from transformers_cee.exits.criteria import CRITERIA
from transformers_cee.exits.lm_heads import LM_EXIT_HEADS
from transformers_cee.exits.token_losses import TOKEN_LOSSES
from transformers_cee.training.heads_objectives import HEADS_OBJECTIVES
from transformers_cee.training.rewards import REWARDS


MODULE = '''
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn
from torch.nn import functional as F

from transformers_cee import (
    ExitCriterion,
    HeadsObjective,
    LMExitHead,
    register_criterion,
    register_exit_head,
    register_heads_objective,
    register_reward,
    register_token_loss,
)


@register_criterion
class TwiceSure(ExitCriterion):
    """The smaller of the largest class probabilities of this exit and the one before it."""

    name = "twice_sure"
    needs_classes = True
    has_memory = True
    looks_at = frozenset({"confidence"})

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.before = None

    def score(self, step):
        now = step.confidence(self.problem_type)[0]
        both = torch.zeros_like(now) if self.before is None else torch.minimum(now, self.before)
        self.before = now
        return both

    def select(self, kept):
        if self.before is not None:
            self.before = self.before[kept]


@register_heads_objective
@dataclass
class Growing(HeadsObjective):
    """Losses weighted by a power of the exit's number."""

    name = "growing"
    power: float = 1.0

    def summary(self, losses):
        weights = torch.arange(1, losses.shape[1] + 1).to(losses) ** self.power
        return (losses * weights / weights.sum()).sum(1).mean()


@register_reward
def root_price(step):
    """Deep layers cost less than the first ones."""
    return -step.losses - step.alpha * step.layers.to(step.losses).sqrt()


@register_token_loss
@dataclass(frozen=True)
class Focal:
    """Sure tokens count less (Lin et al. 2017)."""

    name: ClassVar[str] = "focal"
    gamma: float = 2.0

    def __call__(self, exit_logits, final_logits, labels):
        loss = F.cross_entropy(exit_logits.float(), labels, reduction="none")
        return (1 - (-loss).exp()) ** self.gamma * loss


class Residual(nn.Module):
    def __init__(self, size):
        super().__init__()
        self.linear = nn.Linear(size, size, bias=False)

    def forward(self, state):
        return state + self.linear(state).tanh()


@register_exit_head
class Bent(LMExitHead):
    """A residual layer before the model's own LM head, which starts as nothing."""

    name = "bent"

    @staticmethod
    def head(config):
        return Residual(config.hidden_size)

    @staticmethod
    def start(layer, head, weight):
        if layer is head.linear:
            nn.init.zeros_(layer.weight)


@register_exit_head
class Deep(LMExitHead):
    """Two layers that give logits of their own."""

    name = "deep"
    shares_lm_head = False

    @staticmethod
    def head(config):
        return nn.Sequential(nn.Linear(config.hidden_size, 5), nn.ReLU(), nn.Linear(5, config.vocab_size))
'''
ADDED = {
    "twice_sure": CRITERIA,
    "growing": HEADS_OBJECTIVES,
    "root_price": REWARDS,
    "focal": TOKEN_LOSSES,
    "bent": LM_EXIT_HEADS,
    "deep": LM_EXIT_HEADS,
}
# Plain steps on all rows at once, whose weights tell the gradients.
STEPS = {
    "optim": "sgd",
    "lr_scheduler_type": "constant",
    "max_grad_norm": 0.0,
    "weight_decay": 0.0,
    "per_device_train_batch_size": 8,
}
ROWS = 8


@pytest.fixture(autouse=True)
def mine(tmp_path) -> ModuleType:
    path = tmp_path / "mine.py"
    path.write_text(MODULE)
    spec = importlib.util.spec_from_file_location("mine", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    for name, registry in ADDED.items():
        registry.pop(name, None)


def twice_sure(logits: list[torch.Tensor], threshold: float) -> int:
    """Exit (0-based) of one row or token by the logits (exits, classes) of all exits."""
    sure = [max(math.exp(one) for one in row.log_softmax(-1).tolist()) for row in logits]
    for index in range(1, len(sure) - 1):
        if min(sure[index], sure[index - 1]) > threshold:
            return index
    return len(sure) - 1


def manual_steps(model, loss_of, learning_rate: float, steps: int) -> dict[str, torch.Tensor]:
    """Weights after some steps of plain gradient descent."""
    model = copy.deepcopy(model).train()
    for _ in range(steps):
        model.zero_grad()
        loss_of(model).backward()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.grad is not None:
                    parameter -= learning_rate * parameter.grad
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def compare(model, before, expected, atol=1e-5):
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.detach(), expected[name], rtol=0, atol=atol, msg=name)
    moved = max(float((one - before[name]).abs().max()) for name, one in expected.items())
    assert moved > 100 * atol, "otherwise the comparison says nothing"


class TestCriterion:
    @torch.no_grad()
    def test_rows(self):
        model, batch = tiny_model(num_hidden_layers=4), pad(random_rows(12, seed=3))
        all_logits = model(**batch, output_all_exits=True).all_exit_logits
        threshold = float(all_logits.softmax(-1).amax(-1)[:, 1:3].median())
        output = model(**batch, exit_criterion="twice_sure", exit_threshold=threshold)
        expected = [twice_sure(list(logits), threshold) for logits in all_logits]
        assert output.exit_layers.tolist() == [index + 1 for index in expected] and len(set(expected)) > 1
        wanted = all_logits[torch.arange(12), torch.tensor(expected)]
        torch.testing.assert_close(output.logits, wanted, rtol=0, atol=1e-5)

    def test_generation(self):
        """With exact keys and values every state is that of a run over the whole text."""
        model = tiny_llama(exit_head="shared")
        prompt, arguments = torch.tensor([[5, 9, 11, 7]]), {"max_new_tokens": 10, "eos_token_id": None}
        output = model.generate(
            prompt,
            exit_criterion="twice_sure",
            exit_threshold=0.1,
            skipped_kv="deferred",
            do_sample=False,
            return_dict_in_generate=True,
            **arguments,
        )
        with torch.no_grad():
            hidden = model(output.sequences, output_hidden_states=True).hidden_states
            states = [model.model.norm(one)[0] for one in hidden[1:-1]] + [hidden[-1][0]]
            logits = [model.lm_head(one) for one in states]
        found, taken = [], output.exit_layers[0].tolist()
        for number in range(10):
            at = prompt.shape[1] - 1 + number
            # A prompt runs at full depth.
            index = 3 if number == 0 else twice_sure([one[at] for one in logits], 0.1)
            found.append(index + 1)
            assert int(logits[index][at].argmax()) == int(output.sequences[0, at + 1])
        assert taken == found and len(set(found[1:])) > 1

    def test_stored_exits(self, tmp_path):
        trainer = tiny_trainer(tmp_path, rows=ROWS)
        store = trainer.collect_exits(trainer.train_dataset)
        scores = score_exits("twice_sure", store)
        for row, logits in zip(scores.tolist(), store.logits, strict=True):
            sure = logits.softmax(-1).amax(-1).tolist()
            assert row == pytest.approx([0.0, min(sure[:2]), min(sure[1:3])], abs=1e-6)

    def test_saved_with_a_model(self, tmp_path, mine):
        model = tiny_model(num_hidden_layers=4, exit_criterion="twice_sure", exit_threshold=0.4)
        model.save_pretrained(tmp_path)
        again, batch = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval(), pad(random_rows(6, seed=1))
        assert (again.config.exit_criterion, again.config.exit_threshold) == ("twice_sure", 0.4)
        with torch.no_grad():
            assert torch.equal(again(**batch).exit_layers, model(**batch).exit_layers)
        del CRITERIA["twice_sure"]
        message = (
            "`exit_criterion`='twice_sure' is unknown; accepted are calibrated.*, and what `register_criterion` adds"
        )
        with pytest.raises(ValueError, match=message):
            BertForConsistentEE.from_pretrained(tmp_path)

    def test_names_of_the_package_are_taken(self, mine):
        with pytest.raises(
            ValueError, match=r"`exit_criterion`='margin' is transformers_cee.*Margin already; give mine"
        ):
            mine.register_criterion(type("Own", (mine.ExitCriterion,), {"name": "margin", "__module__": "mine"}))


@pytest.mark.parametrize("power", [1.0, 2.0])
def test_heads_objective(tmp_path, power):
    model, rows = tiny_model(num_hidden_layers=4), task(ROWS, seed=1)
    batch = collate(list(rows))

    def loss(twin):
        logits = twin(**batch, output_all_exits=True).all_exit_logits
        total = sum(number**power for number in range(1, 5))
        return sum(
            number**power / total * F.cross_entropy(logits[:, number - 1], batch["labels"]) for number in range(1, 5)
        )

    before = weights(model)
    expected = manual_steps(model, loss, 0.1, steps=3)
    options = {"heads_objective": "growing", "heads_objective_options": {"power": power}, "learning_rate": 0.1}
    trainer = tiny_trainer(tmp_path, model, rows=ROWS, phases=["heads"], num_train_epochs=3, **options, **STEPS)
    trainer.train()
    compare(model, before, expected)


def test_reward(tmp_path):
    model, rows = tiny_model(num_hidden_layers=4, reward_alpha=0.3), task(ROWS, seed=1)
    batch = collate(list(rows))
    with torch.no_grad():
        output = model(**batch, output_all_exits=True)

    def loss(twin):
        total = 0.0
        for row in range(ROWS):
            reached = 1.0
            for index in range(4):
                p = 1.0
                if index < 3:
                    p = twin.exit_policies.networks[index](output.all_exit_states[row, index]).sigmoid()[0]
                ce = F.cross_entropy(output.all_exit_logits[row, index], batch["labels"][row])
                total = total + reached * p * (-ce - 0.3 * math.sqrt(index + 1))
                reached = reached * (1 - p)
        return -total / ROWS

    before = weights(model)
    expected = manual_steps(model, loss, 0.5, steps=3)
    options = {"policy_learning_rate": 0.5, "policy_batch_size": ROWS, "policy_num_train_epochs": 3}
    trainer = tiny_trainer(tmp_path, model, rows=ROWS, reward="root_price", **options, **STEPS)
    trainer.train_policy()
    compare(model, before, expected)


def test_token_loss(tmp_path):
    model, rows = tiny_llama(exit_head="shared"), instructions(ROWS, seed=1)

    def loss(twin):
        total, count = 0.0, 0
        for row in rows:
            ids = torch.tensor([row["input_ids"]])
            hidden = twin(ids, output_hidden_states=True, use_cache=False).hidden_states
            states = [twin.model.norm(one)[0] for one in hidden[1:-1]] + [hidden[-1][0]]
            for at, label in enumerate(row["labels"][1:]):
                if label == -100:
                    continue
                count += 1
                for number, one in enumerate(states, start=1):
                    p = twin.lm_head(one[at]).softmax(-1)[label]
                    total = total + number / 10 * (1 - p) ** 3 * -p.log()
        return total / count

    before = weights(model)
    expected = manual_steps(model, loss, 0.1, steps=3)
    options = {"token_loss": "focal", "token_loss_options": {"gamma": 3}, "learning_rate": 0.1}
    trainer = tiny_text_trainer(tmp_path, model, rows=ROWS, phases=["heads"], num_train_epochs=3, **options, **STEPS)
    trainer.train()
    compare(model, before, expected)


def by_hand(model, kind: str, states: list[torch.Tensor]) -> list[torch.Tensor]:
    """Logits of all exits from hidden states behind each layer, the last of which is normed."""
    found = []
    for index, state in enumerate(states[:-1]):
        head, normed = model.exit_heads.heads[index], model.exit_norms.norms[index](state)
        if kind == "bent":
            found.append(model.lm_head(normed + torch.tanh(normed @ head.linear.weight.T)))
        else:
            hidden = (normed @ head[0].weight.T + head[0].bias).clamp_min(0)
            found.append(hidden @ head[2].weight.T + head[2].bias)
    return [*found, model.lm_head(states[-1])]


class TestExitHead:
    @pytest.mark.parametrize("kind", ["bent", "deep"])
    def test_training(self, tmp_path, kind):
        model, rows = tiny_llama(exit_head=kind), instructions(ROWS, seed=1)

        def loss(twin):
            total, count = 0.0, 0
            for row in rows:
                ids = torch.tensor([row["input_ids"]])
                hidden = twin(ids, output_hidden_states=True, use_cache=False).hidden_states
                logits = by_hand(twin, kind, [one[0] for one in hidden[1:]])
                for at, label in enumerate(row["labels"][1:]):
                    if label == -100:
                        continue
                    count += 1
                    for number, one in enumerate(logits, start=1):
                        total = total - number / 10 * one[at].log_softmax(-1)[label]
            return total / count

        before, expected = weights(model), manual_steps(model, loss, 0.1, steps=3)
        options = {"phases": ["heads"], "num_train_epochs": 3, "learning_rate": 0.1, **STEPS}
        tiny_text_trainer(tmp_path, model, rows=ROWS, **options).train()
        compare(model, before, expected)
        learnt = {name for name in expected if not torch.equal(expected[name], before[name])}
        assert sum("exit_heads" in name for name in learnt) == (3 if kind == "bent" else 12)

    @pytest.mark.parametrize("kind", ["bent", "deep"])
    @torch.no_grad()
    def test_saved_with_a_model(self, tmp_path, kind):
        model, prompt = tiny_llama(exit_head=kind), torch.tensor([[5, 9, 11, 7]])
        model.save_pretrained(tmp_path)
        again = LlamaForConsistentEECausalLM.from_pretrained(tmp_path).eval()
        assert again.config.exit_head == kind
        arguments = {"exit_threshold": 0.5, "max_new_tokens": 8, "eos_token_id": None, "return_dict_in_generate": True}
        wanted, found = model.generate(prompt, **arguments), again.generate(prompt, **arguments)
        assert found.sequences.tolist() == wanted.sequences.tolist()
        assert (
            found.exit_layers.tolist() == wanted.exit_layers.tolist() and len(set(found.exit_layers[0].tolist())) > 1
        )

    @torch.no_grad()
    def test_starts_as_it_says(self, tmp_path):
        """On a stock checkpoint: the residual layers are zero."""
        torch.manual_seed(0)
        fields = {name: getattr(tiny_llama().config, name) for name in LlamaConfig().to_dict()}
        LlamaForCausalLM(LlamaConfig(**{**fields, "model_type": "llama"})).save_pretrained(tmp_path)
        own, norm = (
            LlamaForConsistentEECausalLM.from_pretrained(tmp_path, exit_head=kind).eval() for kind in ("bent", "norm")
        )
        ids = torch.tensor([[5, 9, 11, 7]])
        wanted, found = (one(ids, labels=ids, output_all_exits=True).all_exit_losses for one in (norm, own))
        assert torch.equal(found, wanted) and len(own.exit_heads.heads) == 3

    def test_costs(self):
        own, norm, deep = (exit_costs(tiny_llama(exit_head=kind), 5) for kind in ("bent", "norm", "deep"))
        assert own[0] - norm[0] == pytest.approx(2 * 32 * 32)
        assert deep[0] - norm[0] == pytest.approx(2 * (32 * 5 + 5 * 60) - 2 * 32 * 60)

    def test_another_vocabulary(self):
        assert tiny_llama(exit_head="bent").resize_token_embeddings(70).weight.shape[0] == 70
        with pytest.raises(ValueError, match="`exit_head`='deep': heads that are Sequential cannot be resized"):
            tiny_llama(exit_head="deep").resize_token_embeddings(70)

    def test_unknown(self):
        with pytest.raises(ValueError, match="`exit_head`='odd' is unknown; accepted are bent, deep, lay"):
            tiny_llama(exit_head="odd")


def test_command_lines(tmp_path, mine):
    line = f"--output_dir {tmp_path} --report_to none --use_cpu --reward root_price "
    line += '--heads_objective growing --heads_objective_options {"power":2} '
    line += '--token_loss focal --token_loss_options {"gamma":1.5}'
    (args,) = HfArgumentParser(ConsistentEETrainingArguments).parse_args_into_dataclasses(line.split())
    assert args.make_heads_objective() == mine.Growing(2) and args.make_token_loss() == mine.Focal(1.5)
    again = ConsistentEETrainingArguments(
        **{name: getattr(args, name) for name in ("output_dir", "reward", "use_cpu")}
    )
    assert again.reward == "root_price"
    with pytest.raises(
        ValueError, match="`heads_objective_options`: 'gamma' is unknown to 'growing'; accepted are po"
    ):
        ConsistentEETrainingArguments(str(tmp_path), heads_objective="growing", heads_objective_options={"gamma": 1})


def test_engine(tmp_path):
    """One that runs the graphs of layers and exits as they are, from one file."""

    @register_engine
    class Plain(Engine):
        name = "plain"
        precisions = ("float32",)

        @classmethod
        def write(cls, written, folder):
            written.model.save_pretrained(folder / "model")
            for path in (folder / "model").iterdir():
                path.rename(folder / path.name)
            (folder / "model").rmdir()

        def block(self, cut):
            model = BertForConsistentEE.from_pretrained(self.folder).eval()
            layers, exits = layer_graphs(model), exit_graphs(model, self.config.exit_engine["criterion"])
            graphs = [*layers[cut.start + 1 if cut.start else 0 : cut.stop + 1], exits[exit_name(cut)]]

            @torch.no_grad()
            def run(given):
                known = dict(given)
                for graph in graphs:
                    found = graph(*(known[name] for name in graph.inputs))
                    known |= dict(zip(graph.outputs, found, strict=True))
                return {name: known[name] for name in cut.gives}

            return run

    try:
        model, batch = tiny_model(num_hidden_layers=4), pad(random_rows(12, seed=3))
        model.export(tmp_path / "out", engine="plain", precision="float32")
        again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
        with torch.no_grad():
            threshold = float(model(**batch, exit_threshold=0.9999).exit_probabilities[:, 0].median())
            mine, theirs = (one(**batch, exit_threshold=threshold) for one in (again, model))
        assert mine.exit_layers.tolist() == theirs.exit_layers.tolist() and len(mine.exit_layers.unique()) > 1
        torch.testing.assert_close(mine.logits, theirs.logits, rtol=1e-5, atol=1e-5)
    finally:
        ENGINES.pop("plain")
