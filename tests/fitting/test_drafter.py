# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""A drafter learns the model's own words, and drafts in use as it drafted when it learned."""

from __future__ import annotations

import json

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file, save_file
from tiny import tiny_llama, training_arguments, with_adapters
from transformers import EarlyStoppingCallback, TrainerCallback, default_data_collator
from transformers.cache_utils import DynamicCache

from transformers_cee import ConsistentEETrainer, LlamaForConsistentEECausalLM
from transformers_cee.exits.cache_name import CACHE_NAME
from transformers_cee.exits.training_options import ExitTraining
from transformers_cee.fitting.drafter import _Regression, fit_drafter
from transformers_cee.generation.cache import EarlyExitCache
from transformers_cee.generation.slots import SlotPass
from transformers_cee.modeling.roll_outs import draft_figures, read_text, roll_outs


LAYER, TIME = 3, 12


def model_with_drafter(seed=0, **fields):
    model = tiny_llama(seed, drafter_layer=LAYER, drafter_vocab_size=40, **fields)
    torch.manual_seed(seed)
    for weight in model.exit_drafter.parameters():
        torch.nn.init.normal_(weight, 0.0, 0.2)
    return model


def texts(model, rows=4, time=TIME, seed=0):
    """What the model itself goes on to say."""
    torch.manual_seed(seed)
    ids = model.generate(
        torch.randint(3, 60, (rows, 3)), max_new_tokens=time - 3, do_sample=True, eos_token_id=None, pad_token_id=0
    )
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@torch.no_grad()
def test_roll_outs_are_drafts_in_use(attention):
    model = model_with_drafter().eval()
    model.set_attn_implementation(attention)
    batch, drafter = texts(model), model.exit_drafter
    read = read_text(model, **batch)
    learned, ids, seen = [], batch["input_ids"], []
    handle = drafter.readout.register_forward_hook(lambda _, given, out: learned.append(given[0]))
    list(roll_outs(model, read, 3))
    for start in (1, 4, 7):
        cache = DynamicCache()
        hidden = model.model(
            input_ids=ids[:, :start], output_hidden_states=True, use_cache=True, **{CACHE_NAME: cache}
        ).hidden_states
        held = EarlyExitCache.from_cache(cache, 4)
        state = hidden[LAYER][:, -1:]
        for step in range(3):
            column = start + step
            first = torch.full((4,), column)
            run = SlotPass(model.as_decoder, held, first, 1, None, torch.zeros(4, dtype=torch.long), state[:0, 0])
            embedded = model.get_input_embeddings()(ids[:, column : column + 1])
            state = run.run_layer(drafter.layer, LAYER - 1, drafter.jump(state, embedded))
            of_roll_out = learned[step].view(4, TIME - 3, -1)[:, start - 1]
            seen.append((state[:, 0] - of_roll_out).abs().max())
    handle.remove()
    assert max(seen) < 1e-5 and len(learned) == 3


def trainer_of(model, folder, rows=24, **options):
    ids = texts(model, rows, 16)["input_ids"]
    made = Dataset.from_dict({"input_ids": ids.tolist(), "labels": ids.tolist()})
    args = training_arguments(
        folder, phases=["drafter"], per_device_train_batch_size=4, drafter_learning_rate=1e-2, drafter_fit_tokens=100,
        drafter_roll_outs=2, logging_steps=1, **options,
    )  # fmt: skip
    return ConsistentEETrainer(
        model=model, args=args, train_dataset=made, eval_dataset=made, data_collator=default_data_collator
    )


def test_it_learns_and_nothing_else_does(tmp_path):
    model = tiny_llama(1, drafter_layer=LAYER, drafter_vocab_size=40)
    before = {name: value.clone() for name, value in model.state_dict().items() if "drafter" not in name}
    learns = {name for name, weight in model.named_parameters() if weight.requires_grad}
    trainer = trainer_of(model, tmp_path, drafter_num_train_epochs=8)
    held_out = read_text(model, **texts(model, 16, 16, seed=9))
    with torch.no_grad():
        fit_drafter(model, [texts(model, 8, 16)], 100)
        solved = sum(float(one.kl) for one in roll_outs(model, held_out, 2))
    result = trainer.train()
    assert list(result.phases) == ["drafter"]
    with torch.no_grad():
        learned = sum(float(one.kl) for one in roll_outs(model, held_out, 2))
    assert learned < 0.8 * solved
    after = model.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert {name for name, weight in model.named_parameters() if weight.requires_grad} == learns
    assert len(model.exit_drafter.token_ids.unique()) == 40


def test_resumed_runs_are_whole_ones(tmp_path):
    weights = []
    for stops in (False, True):
        folder = tmp_path / str(stops)
        options = {"drafter_num_train_epochs": 2, "save_strategy": "epoch"}
        model = tiny_llama(1, drafter_layer=LAYER, drafter_vocab_size=40)
        trainer = trainer_of(model, folder, **options)
        if stops:
            trainer.add_callback(Stops())
            with pytest.raises(KeyboardInterrupt):
                trainer.train()
            trainer = trainer_of(tiny_llama(1, drafter_layer=LAYER, drafter_vocab_size=40), folder, **options)
        trainer.train(resume_from_checkpoint=stops)
        weights.append(trainer.model.exit_drafter.state_dict())
    for name, value in weights[0].items():
        torch.testing.assert_close(value, weights[1][name], rtol=1e-5, atol=1e-6)


class Stops(TrainerCallback):
    def on_epoch_end(self, args, state, control, **kwargs):
        if state.epoch > 1:
            raise KeyboardInterrupt


def test_a_phase_without_a_drafter_is_refused_first(tmp_path):
    with pytest.raises(ValueError, match="has 'drafter', and the model has none"):
        trainer_of(tiny_llama(), tmp_path).check_phases(["drafter"])


@torch.no_grad()
def test_padding_on_either_side_changes_nothing():
    model, batch = model_with_drafter(), texts(tiny_llama())
    ids, found = batch["input_ids"][:2], []
    for left, right in ((0, 0), (0, 3), (3, 0), (2, 1)):
        padded = torch.nn.functional.pad(ids, (left, right), value=9)
        mask = torch.nn.functional.pad(torch.ones_like(ids), (left, right))
        # Of the last tokens the same ones count: padding lets shorter roll-outs begin later, too.
        *_, last = roll_outs(model, read_text(model, padded, mask), 3)
        found.append(float(last.kl))
    assert found == pytest.approx([found[0]] * 4, rel=1e-4)


@pytest.mark.parametrize("time", [1, 2, 3])
def test_short_texts(time):
    model = model_with_drafter()
    output = model(torch.full((2, time), 5), exit_training=ExitTraining(roll_outs=3))
    assert output.loss.isfinite() and output.judged_drafts.shape == (2, 3, 4)
    counts = [max(0, time - min(3, time - 1)) if step < time - 1 else 0 for step in range(3)]
    assert output.judged_drafts[..., 3].tolist() == [counts, counts]


@torch.no_grad()
def test_judged_as_drafted_token_by_token():
    """Figures of an evaluation are those of a slow loop over rows, starts and steps; prompts are not judged."""
    model = tiny_llama(0, drafter_layer=LAYER, drafter_vocab_size=50).eval()
    fit_drafter(model, [texts(model, 16, 16)], 100)
    batch, drafter = texts(model, 5), model.exit_drafter
    ids = batch["input_ids"]
    labels, found = ids.clone(), []
    for row, prompt in enumerate((1, 3, 5, 8, 12)):
        labels[row, :prompt] = -100
        for start in range(1, TIME - 2):
            cache = DynamicCache()
            hidden = model.model(
                input_ids=ids[row : row + 1, :start], output_hidden_states=True, use_cache=True, **{CACHE_NAME: cache}
            ).hidden_states
            run_cache, state = EarlyExitCache.from_cache(cache, 4), hidden[LAYER][:, -1:]
            stands = []
            for column in range(start, start + 3):
                first, none = torch.tensor([column]), torch.zeros(1, dtype=torch.long)
                run = SlotPass(model.as_decoder, run_cache, first, 1, None, none, state[:0, 0])
                embedded = model.get_input_embeddings()(ids[row : row + 1, column : column + 1])
                state = run.run_layer(drafter.layer, LAYER - 1, drafter.jump(state, embedded))
                logits = model.lm_head(model.model.norm(drafter.read(state[0])))[:, drafter.token_ids]
                says = model(ids[row : row + 1, : column + 1]).logits[0, -1].argmax()
                if column + 1 == TIME or labels[row, column + 1] == -100:
                    break
                stands.append(bool(drafter.token_ids[logits.argmax()] == says))
            found.append(stands)
    judged = model(**batch, labels=labels, exit_training=ExitTraining(roll_outs=3)).judged_drafts
    assert not judged[-1].any()
    figures, per_pass = draft_figures(judged), 1.0
    for step in range(3):
        had_turn = [stands[: step + 1] for stands in found if len(stands) > step]
        reached = [stands[step] for stands in had_turn if all(stands[:step])]
        assert 0 < len(reached) < len(had_turn) or step == 0
        assert figures[f"accepted_{step + 1}"] == pytest.approx(sum(reached) / len(reached))
        per_pass += sum(map(all, had_turn)) / len(had_turn)
    assert figures["tokens_per_pass"] == pytest.approx(per_pass) and draft_figures(judged[-1:]) == {}


def test_evaluations_say_what_is_accepted(tmp_path):
    """Of several sets each, and their mean; the best checkpoint is the one with the most tokens per pass."""
    model = tiny_llama(1, drafter_layer=LAYER, drafter_vocab_size=40)
    options = {"eval_strategy": "epoch", "save_strategy": "epoch", "load_best_model_at_end": True}
    trainer = trainer_of(model, tmp_path, drafter_num_train_epochs=4, **options)
    rows = trainer.eval_dataset
    trainer.eval_dataset = {"few": rows.select(range(5)), "many": rows}
    trainer.train()
    log = [entry for entry in trainer.state.log_history if "eval_many_accepted_1" in entry]
    assert len(log) == 4 and 0 < log[-1]["eval_many_accepted_1"] <= 1
    assert log[-1]["eval_many_loss"] < log[0]["eval_many_loss"]
    last = tmp_path / "phases" / "drafter"
    state = json.loads((max(last.glob("checkpoint-*"), key=checkpoint_number) / "trainer_state.json").read_text())
    best = max(
        (entry for entry in state["log_history"] if "eval_many_tokens_per_pass" in entry),
        key=lambda entry: entry["eval_many_tokens_per_pass"] + few_of(state, entry["step"]),
    )
    assert state["best_global_step"] == best["step"]


def few_of(state, step):
    entries = (one for one in state["log_history"] if one["step"] == step)
    return next(one["eval_few_tokens_per_pass"] for one in entries if "eval_few_tokens_per_pass" in one)


def checkpoint_number(path):
    return int(path.name.rpartition("-")[2])


def test_short_texts_behind_padding():
    """Texts that are over before all drafts have a token leave no NaN."""
    model = model_with_drafter()
    ids, mask = torch.full((2, 9), 5), torch.zeros(2, 9, dtype=torch.long)
    mask[:, :2] = 1
    output = model(ids, attention_mask=mask, exit_training=ExitTraining(roll_outs=3))
    assert output.loss.isfinite() and output.judged_drafts[..., 3].tolist() == [[1, 0, 0]] * 2
    mask[:, 1] = 0
    assert float(model(ids, attention_mask=mask, exit_training=ExitTraining(roll_outs=3)).loss) == 0


def test_with_gradient_checkpointing(tmp_path):
    """The same steps as without."""
    weights = []
    for checkpointing in (False, True):
        model = tiny_llama(1, drafter_layer=LAYER, drafter_vocab_size=40)
        trainer = trainer_of(model, tmp_path / str(checkpointing), drafter_num_train_epochs=1)
        if checkpointing:
            # `gradient_checkpointing_enable` is its name in older versions of transformers.
            enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
            enable({"use_reentrant": False})
        trainer.train()
        weights.append(model.exit_drafter.state_dict())
    for name, value in weights[0].items():
        torch.testing.assert_close(value, weights[1][name])


def test_nothing_to_be_judged_by(tmp_path):
    model = tiny_llama(1, drafter_layer=LAYER, drafter_vocab_size=40)
    trainer = trainer_of(model, tmp_path, eval_strategy="epoch", drafter_num_train_epochs=1)
    trainer.eval_dataset = trainer.eval_dataset.map(lambda row: {"labels": [-100] * len(row["labels"])})
    with pytest.raises(ValueError, match="`eval_dataset` has nothing that the phase 'drafter' could be judged by"):
        trainer.train()


def test_schedules_go_up_by_tokens_per_pass(tmp_path):
    model = tiny_llama(1, drafter_layer=LAYER, drafter_vocab_size=40)
    options = {"lr_scheduler_type": "reduce_lr_on_plateau", "lr_scheduler_kwargs": {"patience": 1}}
    trainer = trainer_of(
        model, tmp_path, eval_strategy="epoch", metric_for_best_model="loss", drafter_num_train_epochs=1, **options
    )
    modes = []

    class Looks(TrainerCallback):
        def on_train_begin(self, args, state, control, lr_scheduler=None, **kwargs):
            modes.append((lr_scheduler.mode, lr_scheduler.patience, args.metric_for_best_model))

    trainer.add_callback(Looks())
    trainer.train()
    assert modes == [("max", 1, "tokens_per_pass")] and trainer.args.lr_scheduler_kwargs == {"patience": 1}


def test_adapters_hold_no_drafter(tmp_path):
    model = with_adapters(tiny_llama(1, drafter_layer=LAYER, drafter_vocab_size=40))
    with pytest.raises(ValueError, match="has 'drafter', and `model` has adapters around it"):
        trainer_of(model, tmp_path).train()


def test_sums_of_half_precision_are_not_rounded():
    """Inputs whose mean is large against what tells them apart."""
    torch.manual_seed(0)
    given = (torch.randn(4000, 48) / torch.arange(1, 49) + 1).bfloat16()
    wanted = (given.float() @ torch.randn(48, 5)).bfloat16()
    left = []
    for cast in (torch.bfloat16, torch.float32):
        found = _Regression(48, 5)
        for some in torch.arange(4000).chunk(10):
            found.add(given[some].to(cast), wanted[some].to(cast))
        weight, bias = found.solve()
        left.append(float((given.float() @ weight.T + bias - wanted.float()).pow(2).mean()))
    assert left[0] == pytest.approx(left[1], rel=1e-3)


def test_it_stops_when_no_more_is_accepted(tmp_path):
    model = tiny_llama(1, drafter_layer=LAYER, drafter_vocab_size=40)
    options = {
        "eval_strategy": "epoch", "save_strategy": "epoch", "load_best_model_at_end": True,
        "metric_for_best_model": "loss", "drafter_num_train_epochs": 6,
    }  # fmt: skip
    trainer = trainer_of(model, tmp_path, **options)
    # Nothing gets better by so much.
    trainer.add_callback(EarlyStoppingCallback(1, early_stopping_threshold=9.0))
    assert trainer.train().phases["drafter"].global_step == 12


@torch.no_grad()
def test_what_came_of_drafts_is_kept(tmp_path):
    """By kind, after the closed form and while it trains; of the answer alone, where labels say so."""
    model = model_with_drafter()
    drafter, batch = model.exit_drafter, texts(model, 8)
    # Solved on other texts.
    fit_drafter(model, [texts(model, 16, seed=1), batch], 100)
    read = read_text(model, **batch)
    head = model.lm_head.weight[drafter.token_ids]
    says = model(**batch).logits.argmax(-1)
    for labelled in (False, True):
        labels = batch["input_ids"].clone()
        labels[:, :6] = -100
        wanted = torch.zeros(2, 10, dtype=torch.long)
        for row in range(8):
            for place in range(1, TIME):
                if labelled and (place + 1 == TIME or labels[row, place + 1] == -100):
                    continue
                cache = DynamicCache()
                seen = batch["input_ids"][row : row + 1, :place]
                hidden = model.model(
                    input_ids=seen, output_hidden_states=True, use_cache=True, **{CACHE_NAME: cache}
                ).hidden_states
                run_cache, first = EarlyExitCache.from_cache(cache, 4), torch.tensor([place])
                run = SlotPass(
                    model.as_decoder, run_cache, first, 1, None, torch.zeros(1, dtype=torch.long), hidden[0][:0, 0]
                )
                jumped = drafter.jump(hidden[LAYER][:, -1:], read.embedded[row : row + 1, place : place + 1])
                state = run.run_layer(drafter.layer, LAYER - 1, jumped)[0]
                said = (model.model.norm(drafter.read(state)) @ head.T).softmax(-1)[0]
                kind = min(9, int(said.max() * 10))
                wanted[0, kind] += 1
                wanted[1, kind] += bool(drafter.token_ids[said.argmax()] == says[row, place])
        if labelled:
            drafter.judged.zero_()
            model.train()
            model(**batch, labels=labels, exit_training=ExitTraining(roll_outs=2))
            model.eval()
            counted = drafter.judged.clone()
            model(**batch, labels=labels, exit_training=ExitTraining(roll_outs=2))
            assert torch.equal(counted, drafter.judged)
            assert torch.equal(counted, wanted)
        else:
            assert torch.equal(drafter.judged, wanted) and wanted[1].sum() > 0
    model.save_pretrained(tmp_path)
    again = LlamaForConsistentEECausalLM.from_pretrained(tmp_path).exit_drafter.judged
    assert again.dtype == torch.long and torch.equal(again, drafter.judged)
    assert torch.equal(model.to(torch.bfloat16).exit_drafter.judged, again)


def test_a_fit_without_further_text_tells_nothing():
    """Of text that it was solved on a drafter would say too much."""
    model = model_with_drafter()
    model.exit_drafter.judged[:] = 7
    fit_drafter(model, [texts(model, 16)], 1000)
    assert not model.exit_drafter.judged.any()


def test_attention_without_masks_is_refused_first(tmp_path):
    model = model_with_drafter()
    trainer = trainer_of(model, tmp_path)
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(
        ValueError, match=r"`attn_implementation`='flash_attention_2' has no masks for the phase drafter"
    ):
        trainer.check_phases(["drafter"])


def test_drafts_of_long_ago_count_less():
    drafter = model_with_drafter().exit_drafter
    drafter.judged.zero_()
    kinds = torch.zeros(8_000, dtype=torch.long)
    for stands in (True, True, True, False):
        drafter.judge(kinds, torch.full((8_000,), stands))
    assert drafter.judged[:, 0].tolist() == [20_000, 12_000]


def test_words_are_those_said_most():
    model = tiny_llama(1, drafter_layer=2, drafter_vocab_size=5)
    batch = texts(model, 8, 16)
    fit_drafter(model, [batch], 10)
    with torch.no_grad():
        said = model(**batch).logits.argmax(-1)
    counts = torch.bincount(torch.cat((said, batch["input_ids"])).flatten(), minlength=60)
    assert counts[model.exit_drafter.token_ids].sum() == counts.topk(5).values.sum()


def test_words_are_counted_on_more_than_is_solved_on():
    """Padding aside; of what was never seen, the first ones are taken."""
    model = tiny_llama(1, drafter_layer=2, drafter_vocab_size=30)
    solved, ran = texts(model, 1, 5), []
    handle = model.model.layers[0].register_forward_pre_hook(lambda *given: ran.append(1))
    more = {"input_ids": torch.tensor([[59, 58, 57, 0]] * 99), "attention_mask": torch.tensor([[1, 1, 1, 0]] * 99)}
    seen = fit_drafter(model, [solved, more, more], 3)
    handle.remove()
    # Once to solve, and for texts whose drafts are judged, four rows at a time.
    assert seen == 4 and len(ran) == 1 + 25
    words = model.exit_drafter.token_ids
    assert torch.isin(torch.tensor([57, 58, 59]), words).all()
    with torch.no_grad():
        said = model(**solved).logits.argmax(-1)
    known = torch.cat((said.flatten(), solved["input_ids"].flatten(), torch.tensor([57, 58, 59]))).unique()
    unseen = [number for number in range(60) if number not in known.tolist()]
    assert len(known) < 30
    assert torch.equal(words, torch.cat((known, torch.tensor(unseen[: 30 - len(known)]))).sort().values)


def test_the_solved_readout_is_the_last_state_where_it_can_be():
    """A layer behind which nothing happens is read without error."""
    model = tiny_llama(2, drafter_layer=LAYER)
    with torch.no_grad():
        for part in (model.model.layers[3].self_attn.o_proj, model.model.layers[3].mlp.down_proj):
            part.weight.zero_()
    batch = texts(model, 8, 16)
    fit_drafter(model, [batch], 10)
    read = read_text(model, **batch)
    found = model.model.norm(model.exit_drafter.read(read.behind))
    torch.testing.assert_close(found, read.last, rtol=1e-2, atol=1e-2)


def test_saved_and_loaded(tmp_path):
    model = model_with_drafter()
    model.save_pretrained(tmp_path / "whole")
    loaded, info = LlamaForConsistentEECausalLM.from_pretrained(tmp_path / "whole", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    for name, value in model.exit_drafter.state_dict().items():
        assert torch.equal(value, loaded.exit_drafter.state_dict()[name]), name
    without = LlamaForConsistentEECausalLM.from_pretrained(tmp_path / "whole", drafter_layer=None)
    assert without.exit_drafter is None
    base = tiny_llama()
    base.save_pretrained(tmp_path / "base")
    model = LlamaForConsistentEECausalLM.from_pretrained(tmp_path / "base", drafter_layer=LAYER)
    own = dict(model.model.layers[LAYER - 1].named_parameters())
    assert all(torch.equal(value, own[name]) for name, value in model.exit_drafter.layer.named_parameters())
    assert not any(value.any() for value in model.exit_drafter.predictor.parameters())
    assert torch.equal(model.exit_drafter.token_ids, torch.arange(60))
    torch.nn.init.normal_(model.exit_drafter.readout.weight)
    model.save_exits(tmp_path / "exits", base=str(tmp_path / "base"))
    again = LlamaForConsistentEECausalLM.from_pretrained(tmp_path / "exits")
    assert torch.equal(again.exit_drafter.readout.weight, model.exit_drafter.readout.weight)


def test_a_checkpoint_without_the_record_is_not_called_untrained(tmp_path, caplog):
    model_with_drafter().save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    for missing, said in (("exit_drafter.judged", False), ("exit_drafter.predictor.bias", True)):
        del tensors[missing]
        save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
        caplog.clear()
        assert not LlamaForConsistentEECausalLM.from_pretrained(tmp_path).exit_drafter.judged.any()
        assert ("weights of the drafter" in caplog.text) == said


def test_nothing_to_fit():
    with pytest.raises(ValueError, match=r"`drafter_layer`=None of the config: the model has no drafter"):
        fit_drafter(tiny_llama(), [texts(tiny_llama())])


@pytest.mark.parametrize("layer", [1, 4, 5, 1.5, "last"])
def test_layers_that_there_are(layer):
    with pytest.raises(ValueError, match="`drafter_layer`"):
        tiny_llama(drafter_layer=layer)
