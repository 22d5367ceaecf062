# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""What every family can do, whatever leaves and when: loading and saving, learning, adapters, precision, pipelines."""

from __future__ import annotations

import json
import warnings

import families
import pytest
import torch
from accelerate import Accelerator
from datasets import Dataset
from peft import PeftModel, get_peft_model
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as LORA_TARGETS
from PIL import Image
from tiny import training_arguments
from transformers import AutoConfig, AutoModel, PreTrainedTokenizerFast, ViTImageProcessor, pipeline
from transformers.models.auto import modeling_auto

from transformers_cee import ConsistentEETrainer, collect_exits, exit_lora_config
from transformers_cee.families import MODELS
from transformers_cee.files import REMOTE_CODE_FILE


FAMILIES = list(MODELS)
TASKS = {"encoder": "SEQ_CLS", "decoder": "CAUSAL_LM", "image": None}
PROBLEM = "single_label_classification"


def learnable(model_type, count=6):
    """Rows with labels, as data sets hold them, and a collator for them."""
    made = families.rows(model_type, count, seed=4, lengths=(5,) * count)
    rows = [{name: value[0].tolist() for name, value in row.items()} for row in made]
    decoder = families.kind_of(model_type) == "decoder"
    for number, row in enumerate(rows):
        row["labels"] = row["input_ids"] if decoder else number % 3

    def collate(given):
        return {name: torch.tensor([row[name] for row in given]) for name in given[0]}

    return Dataset.from_list(rows), collate


def labelled(model_type, count=6):
    """A batch with labels."""
    dataset, collate = learnable(model_type, count)
    return collate(list(dataset))


def everything(model_type, model, inputs):
    """What a model makes of a batch: results of every way to leave."""
    with torch.no_grad():
        outputs = [model(**inputs), model(**inputs, exit_threshold=0.5), model(**inputs, exit_threshold=0.0)]
    return [tensor for output in outputs for tensor in (output.logits, output.exit_layers)]


@pytest.mark.parametrize("model_type", FAMILIES)
def test_entry(model_type):
    assert model_type in families.FAMILIES, "a family needs an entry in tests/common/families.py"
    config, stock = families.config(model_type), families.stock_config(model_type)
    assert config.model_type == model_type and config.exit_threshold is None
    assert isinstance(config, type(stock)) and stock.model_type == MODELS[model_type].stock
    assert families.model(model_type).layer_numbers == [1, 2, 3, 4]


@pytest.mark.parametrize("model_type", FAMILIES)
def test_saved_and_loaded(model_type, tmp_path):
    model = families.model(model_type, exit_layers=[1, 3], exit_threshold=[0.2, 0.3, 1.0])
    model.save_pretrained(tmp_path)
    entry, weights = MODELS[model_type], model.state_dict()
    autos = [AutoModel, *(getattr(modeling_auto, name) for name in entry.auto_classes)]
    for load in (type(model), *autos):
        again, info = load.from_pretrained(tmp_path, output_loading_info=True)
        assert type(again) is type(model)
        assert not any(info[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        assert again.state_dict().keys() == weights.keys()
        assert all(torch.equal(value, weights[name]) for name, value in again.state_dict().items())
    config = AutoConfig.from_pretrained(tmp_path)
    assert type(config) is type(model.config) and config.exit_layer_numbers == [1, 3, 4]
    assert config.exit_threshold == [0.2, 0.3, 1.0]
    assert type(autos[1].from_config(config)) is type(model)
    inputs = labelled(model_type)
    for mine, theirs in zip(
        everything(model_type, again.eval(), inputs), everything(model_type, model, inputs), strict=True
    ):
        # Equal weights that lie elsewhere in memory may be multiplied by other instructions.
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("model_type", FAMILIES)
@torch.no_grad()
def test_our_checkpoint_is_the_stock_models(model_type, tmp_path):
    """The layers and the last head keep the names of the stock model."""
    model, config = families.model(model_type), families.stock_config(model_type)
    model.save_pretrained(tmp_path)
    stock, info = type(families.stock_model(model_type)).from_pretrained(
        tmp_path, config=config, output_loading_info=True
    )
    assert not info["missing_keys"] and all(name.startswith("exit_") for name in info["unexpected_keys"])
    inputs = families.rows(model_type, 1)[0]
    torch.testing.assert_close(stock.eval()(**inputs).logits, model(**inputs).logits, rtol=0, atol=1e-6)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_new_exits_of_a_stock_checkpoint_are_drawn(model_type, tmp_path):
    families.stock_model(model_type).save_pretrained(tmp_path)
    drawn = []
    for _ in range(2):
        torch.manual_seed(5)
        model = families.classes(model_type)[1].from_pretrained(tmp_path)
        drawn.append({name: one for name, one in model.named_parameters() if name.startswith("exit_")})
    for name, one in drawn[0].items():
        assert torch.equal(one, drawn[1][name]), f"{name} is not initialised"
        if "norms" in name:
            assert one.isfinite().all() and one.any()
        elif one.ndim > 1:
            assert 0.001 < float(one.detach().std()) < 1, name
        elif families.kind_of(model_type) != "image":
            # Convolutional families of transformers draw the biases of linear layers.
            assert not one.any(), name
    first, second = (drawn[0][f"exit_policies.networks.layer_{layer}.0.weight"] for layer in (1, 2))
    assert not torch.equal(first, second)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_the_saved_file_hands_out_the_classes(model_type, tmp_path):
    """What `trust_remote_code` runs, run here."""
    config_class, model_class = families.classes(model_type)
    families.model(model_type).save_pretrained(tmp_path)
    auto_map = json.loads((tmp_path / "config.json").read_text())["auto_map"]
    found: dict = {}
    exec((tmp_path / REMOTE_CODE_FILE).read_text(), found)
    assert set(auto_map) == {"AutoConfig", "AutoModel", *MODELS[model_type].auto_classes}
    for auto, reference in auto_map.items():
        assert reference.startswith(REMOTE_CODE_FILE.removesuffix("py"))
        assert found[reference.rpartition(".")[2]] is (config_class if auto == "AutoConfig" else model_class)


@pytest.mark.parametrize("model_type", families.of_kind("encoder", "decoder"))
@torch.no_grad()
def test_the_first_layers_of_a_checkpoint(model_type, tmp_path):
    stock, row = families.stock_model(model_type), families.rows(model_type, 1, lengths=(9,))[0]
    stock.save_pretrained(tmp_path / "deep")
    load = families.classes(model_type)[1].from_pretrained
    load(tmp_path / "deep", num_hidden_layers=2).save_pretrained(tmp_path / "two")
    model = load(tmp_path / "two").eval()
    assert model.layer_numbers == [1, 2] and len(families.layers(model)) == 2
    states, expected = (one(**row, output_hidden_states=True).hidden_states for one in (model, stock))
    torch.testing.assert_close(states[:2], expected[:2])


REFUSED = {
    "exit_layers": (9, r"`exit_layers`=9 as a stride must lie in 1\.\.4"),
    "exit_threshold": (1.5, r"`exit_threshold`=1.5"),
    "exit_criterion": ("hope", r"`exit_criterion`='hope'"),
    "policy_inputs": ("all", r"`policy_inputs`='all'"),
    "policy_hidden_size": (0, r"`policy_hidden_size`=0"),
    "exit_budget": (2.0, r"`exit_budget`=2.0"),
}


@pytest.mark.parametrize("model_type", FAMILIES)
def test_fields_out_of_range_are_refused(model_type):
    config = families.config(model_type)
    for name, (value, message) in REFUSED.items():
        with pytest.raises(ValueError, match=message):
            families.config(model_type, **{name: value})
        changed = families.config(model_type)
        setattr(changed, name, value)
        with pytest.raises(ValueError, match=message):
            families.classes(model_type)[1](changed)
    with pytest.raises(ValueError, match="`exit_threshold` has 2 values"):
        families.classes(model_type)[1](config)(**families.rows(model_type, 1)[0], exit_threshold=[0.5, 0.5])


@pytest.mark.parametrize("model_type", FAMILIES)
def test_checkpoints_of_other_architectures_are_refused(model_type, tmp_path):
    kinds = [one for one in FAMILIES if MODELS[one].stock != MODELS[model_type].stock]
    other = next((one for one in kinds if families.kind_of(one) == families.kind_of(model_type)), kinds[0])
    families.stock_config(other).save_pretrained(tmp_path / "stock")
    families.config(other).save_pretrained(tmp_path / "ours")
    config_class, model_class = families.classes(model_type)
    own = rf"accepted are '{model_type}', '{MODELS[model_type].stock}'"
    for folder, name in (("stock", MODELS[other].stock), ("ours", other)):
        for load in (model_class, config_class):
            there = rf"\. For '{name}' there is {MODELS[other].class_name} \("
            with pytest.raises(ValueError, match=rf"`model_type`='{name}'.*{own}{there}"):
                load.from_pretrained(tmp_path / folder)
    with pytest.raises(TypeError, match=config_class.__name__):
        model_class(families.stock_config(model_type))


@pytest.mark.parametrize("model_type", FAMILIES)
def test_a_step_of_training_reaches_every_exit(model_type):
    model, batch = families.model(model_type).train(), labelled(model_type)
    output = model(**batch)
    assert output.exit_layers.unique().tolist() == [model.config.num_hidden_layers]
    output.loss.backward()
    exits = [name for name, _ in model.named_parameters() if name.startswith(("exit_heads", "exit_norms"))]
    layers = {name.split("layer_")[1].split(".")[0] for name in exits}
    assert {"1", "2", "3"} <= layers
    trained = {name: one.grad for name, one in model.named_parameters() if one.grad is not None}
    for name in exits:
        assert trained[name].abs().max() > 0, name
    lacking = [name for name, _ in model.named_parameters() if name not in trained]
    assert all("exit_policies" in name or "pooler" in name for name in lacking), lacking
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in trained:
                parameter -= 1e-3 * trained[name]
    assert model(**batch).loss < output.loss


@pytest.mark.parametrize("model_type", FAMILIES)
def test_trainer_runs_its_phases(model_type, tmp_path):
    dataset, collate = learnable(model_type)
    model = families.model(model_type)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    arguments = training_arguments(tmp_path, policy_num_train_epochs=1, phases=["heads", "policy"])
    ConsistentEETrainer(model, arguments, train_dataset=dataset, data_collator=collate).train()
    changed = {name for name, value in model.state_dict().items() if not torch.equal(before[name].to(value), value)}
    for layer in (1, 2, 3):
        mine = {name for name in before if f"layer_{layer}." in name and name.startswith("exit_")}
        for part in ("exit_heads" if families.kind_of(model_type) != "decoder" else "exit_norms", "exit_policies"):
            assert any(name.startswith(part) for name in mine & changed), (layer, part)


@pytest.mark.parametrize("model_type", FAMILIES)
@torch.no_grad()
def test_stored_exits_are_what_the_model_says(model_type):
    model, (dataset, collate) = families.model(model_type), learnable(model_type)
    store = collect_exits(model, dataset, collate, Accelerator(cpu=True), problem_type=PROBLEM, batch_size=4)
    output = model(**collate(list(dataset)), output_all_exits=True)
    assert store.layers.tolist() == [1, 2, 3, 4]
    torch.testing.assert_close(store.states, output.all_exit_states, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(store.losses, output.all_exit_losses, rtol=1e-5, atol=1e-5)
    # Five tokens predict four.
    count = 4 if families.kind_of(model_type) == "decoder" else 1
    assert store.rows.tolist() == [row for row in range(6) for _ in range(count)]


@pytest.mark.parametrize("model_type", FAMILIES)
def test_lora(model_type):
    task = TASKS[families.kind_of(model_type)]
    adapted, plain = families.model(model_type), families.model(model_type)
    own = list(families.FAMILIES[model_type].lora_targets or ())
    assert LORA_TARGETS[model_type] == LORA_TARGETS.get(MODELS[model_type].stock, own) != []
    with warnings.catch_warnings():
        # PEFT asks for what newer versions of transformers call something else.
        warnings.simplefilter("ignore", FutureWarning)
        adapted = get_peft_model(adapted, exit_lora_config(task, r=2)).eval()
    inputs = labelled(model_type)
    same = everything(model_type, adapted, inputs), everything(model_type, plain, inputs)
    for ours, theirs in zip(*same, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.normal_(0.0, 0.1)
    expected = everything(model_type, adapted, inputs)
    assert not torch.allclose(expected[0], same[0][0], atol=1e-3)
    merged = adapted.merge_and_unload()
    assert type(merged) is type(plain) and not any("lora" in name for name in merged.state_dict())
    for ours, theirs in zip(everything(model_type, merged, inputs), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("model_type", families.of_kind("encoder", "image"))
@torch.no_grad()
def test_adapters_hold_the_head_that_their_base_lacks(model_type, tmp_path):
    """What a checkpoint of the body alone leaves untrained is drawn anew whenever it is loaded."""
    families.stock_model(model_type).base_model.save_pretrained(tmp_path / "body")
    load, inputs = families.classes(model_type)[1].from_pretrained, labelled(model_type)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        torch.manual_seed(1)
        task = TASKS[families.kind_of(model_type)]
        adapted = get_peft_model(load(tmp_path / "body"), exit_lora_config(task, r=2)).eval()
        expected = everything(model_type, adapted, inputs)
        adapted.save_pretrained(tmp_path / "adapter")
        torch.manual_seed(2)
        again = PeftModel.from_pretrained(load(tmp_path / "body"), tmp_path / "adapter").eval()
    for ours, theirs in zip(everything(model_type, again, inputs), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("model_type", FAMILIES)
@torch.no_grad()
def test_half_precision(model_type):
    dtype = torch.bfloat16
    model, rows = families.model(model_type).to(dtype), families.rows(model_type, 6)
    inputs = families.batch(model_type, rows)
    if "pixel_values" in inputs:
        inputs["pixel_values"] = inputs["pixel_values"].to(dtype)
    for criterion in ("policy", "max_probability"):
        output = model(**inputs, exit_criterion=criterion, exit_threshold=0.5)
        assert output.logits.dtype == dtype and output.logits.isfinite().all()
        assert output.exit_layers.shape == output.logits.shape[:-1]
        assert output.exit_probabilities.dtype == torch.float32
    full = families.model(model_type)(**families.batch(model_type, rows)).logits
    close = model(**inputs).logits.float()
    assert float((close - full).abs().mean() / full.abs().mean()) < 0.1
    if families.kind_of(model_type) == "decoder":
        for skipped_kv in ("copy", "deferred"):
            text = families.batch(model_type, rows, "left")
            tokens = model.generate(**text, max_new_tokens=4, exit_threshold=0.5, skipped_kv=skipped_kv)
            assert tokens.shape[0] == 6


@pytest.mark.parametrize("model_type", FAMILIES)
@torch.no_grad()
def test_autocast(model_type):
    """Some results are of full precision then, others are not."""
    model, rows = families.model(model_type), families.rows(model_type, 6)
    inputs, found = families.batch(model_type, rows), []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            found.append(model(**inputs).logits.float())
            first = model(**inputs, exit_threshold=0.5).exit_probabilities[..., 0]
            output = model(**inputs, exit_threshold=[float(first.nanmedian()), 0.5, 0.5, 1.0])
            assert output.logits.isfinite().all() and len(output.exit_layers.unique()) > 1
    assert 0 < float((found[0] - found[1]).abs().mean() / found[0].abs().mean()) < 0.1
    if families.kind_of(model_type) == "decoder":
        text = families.batch(model_type, rows, "left")
        for skipped_kv in ("copy", "deferred"):
            options = {"max_new_tokens": 4, "eos_token_id": None, "exit_threshold": 0.5, "skipped_kv": skipped_kv}
            with torch.autocast("cpu", torch.bfloat16):
                output = model.generate(**text, **options, return_dict_in_generate=True)
            assert len(output.exit_layers.unique()) > 1


@pytest.mark.parametrize("model_type", FAMILIES)
@torch.no_grad()
def test_eager_attention_leaves_alike(model_type):
    """Masks are other tensors there: they are added, and there may be none with the other."""
    if not families.stock_model(model_type)._supports_sdpa:
        pytest.skip("the stock model has one attention only")
    rows = families.rows(model_type, 6, lengths=(9, 4, 12, 7, 2, 9))
    for side in ("right", "left"):
        model, inputs, found = families.model(model_type), families.batch(model_type, rows, side), []
        for implementation in ("sdpa", "eager"):
            model.set_attn_implementation(implementation)
            outputs = everything(model_type, model, inputs)
            if families.kind_of(model_type) == "decoder" and side == "left":
                options = {"max_new_tokens": 5, "eos_token_id": None, "exit_threshold": 0.3}
                outputs += [model.generate(**inputs, skipped_kv=kind, **options) for kind in ("copy", "deferred")]
            found.append(outputs)
        # What stands at padding is nobody's.
        real = inputs.get("attention_mask", torch.ones(6)).bool()
        for one, other in zip(*found, strict=True):
            picked = [x[real] if x.shape[:2] == real.shape[:2] and real.ndim == 2 else x for x in (one, other)]
            torch.testing.assert_close(*picked, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("model_type", families.of_kind("encoder", "decoder"))
@torch.no_grad()
def test_more_tokens_leave_the_old_ones_alone(model_type):
    model, inputs = families.model(model_type), labelled(model_type)
    before = everything(model_type, model, inputs)
    model.resize_token_embeddings(families.VOCABULARY + 8, mean_resizing=False)
    assert model.config.vocab_size == families.VOCABULARY + 8
    for ours, theirs in zip(everything(model_type, model, inputs), before, strict=True):
        torch.testing.assert_close(ours[..., : theirs.shape[-1]], theirs)
    new = {name: value.clone() for name, value in inputs.items()}
    new["input_ids"][:, 1] = families.VOCABULARY + 7
    assert model(**new, output_all_exits=True).loss.isfinite()


@pytest.mark.parametrize("model_type", FAMILIES)
def test_gradient_checkpointing_changes_no_gradient(model_type):
    supported = families.stock_model(model_type).supports_gradient_checkpointing
    assert supported is families.FAMILIES[model_type].checkpoints
    plain, saving = families.model(model_type).train(), families.model(model_type).train()
    # `gradient_checkpointing_enable` is its name in older versions of transformers.
    enable = getattr(saving, "activation_checkpointing_enable", None) or saving.gradient_checkpointing_enable
    if not supported:
        with pytest.raises(ValueError, match="does not support"):
            enable()
        return
    enable({"use_reentrant": False})
    batch, runs = labelled(model_type), []
    for model in (plain, saving):
        calls = []
        norms = [one for name, one in model.named_modules() if "norm" in name.lower() and not name.startswith("exit_")]
        handles = [one.register_forward_hook(lambda *_, calls=calls: calls.append(1)) for one in norms]
        model(**batch).loss.backward()
        for handle in handles:
            handle.remove()
        runs.append(len(calls))
    assert runs[1] > runs[0], "layers must be computed again"
    for (name, one), (_, other) in zip(plain.named_parameters(), saving.named_parameters(), strict=True):
        assert (one.grad is None) == (other.grad is None), name
        if one.grad is not None:
            torch.testing.assert_close(one.grad, other.grad, rtol=1e-5, atol=1e-6, msg=name)


def words():
    """A tokenizer of as many words as the tiny models know."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    names = ["[PAD]", "[BOS]", "[EOS]", *(f"w{number}" for number in range(3, families.VOCABULARY))]
    made = Tokenizer(models.WordLevel({name: index for index, name in enumerate(names)}, unk_token="w7"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="[PAD]", bos_token="[BOS]", eos_token="[EOS]", unk_token="w7",
        model_input_names=["input_ids", "attention_mask"], padding_side="left",
    )  # fmt: skip


TEXTS = ["w3 w9 w20 w41", "w5 w6", "w11 w12 w50 w33 w21 w7"]


@pytest.mark.parametrize("model_type", families.of_kind("encoder"))
@torch.no_grad()
def test_pipelines_of_texts(model_type):
    model, tokenizer = families.model(model_type), words()
    tokenizer.padding_side = "right"
    for task in ("early-exit-text-classification", "text-classification"):
        classify = pipeline(task, model=model, tokenizer=tokenizer, device="cpu")
        given = classify(TEXTS, exit_threshold=0.5, exit_criterion="max_probability", batch_size=3)
        for text, result in zip(TEXTS, given, strict=True):
            inputs = tokenizer(text, return_tensors="pt")
            output = model(**inputs, exit_threshold=0.5, exit_criterion="max_probability")
            assert result["label"] == model.config.id2label[int(output.logits.argmax())]
            assert abs(result["score"] - float(output.logits.softmax(-1).max())) < 1e-4
            assert task == "text-classification" or result["exit_layer"] == int(output.exit_layers)


@pytest.mark.parametrize("model_type", families.of_kind("decoder"))
def test_pipelines_of_generation(model_type):
    model, tokenizer = families.model(model_type, eos_token_id=None), words()
    write = pipeline("text-generation", model=model, tokenizer=tokenizer, device="cpu")
    # What pads, a pipeline takes out of the text.
    special = {"suppress_tokens": [0, 1, 2, families.FAMILIES[model_type].padding]}
    options = {"max_new_tokens": 4, "do_sample": False, "exit_threshold": 0.3, **special}
    for text, result in zip(TEXTS, write(TEXTS, batch_size=3, return_full_text=False, **options), strict=True):
        inputs = tokenizer(text, return_tensors="pt")
        tokens = model.generate(**inputs, **options)[0, inputs["input_ids"].shape[1] :]
        assert result[0]["generated_text"].split() == tokenizer.decode(tokens).split() != []


@pytest.mark.parametrize("model_type", families.of_kind("image"))
@torch.no_grad()
def test_pipelines_of_images(model_type, tmp_path):
    model = families.model(model_type, id2label={0: "cat", 1: "dog", 2: "owl"})
    model.save_pretrained(tmp_path)
    processor = ViTImageProcessor(size={"height": 32, "width": 32})
    processor.save_pretrained(tmp_path)
    drawn = torch.randint(0, 256, (3, 32, 32, 3), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    images = [Image.fromarray(one.numpy()) for one in drawn]
    options = {"exit_threshold": 0.5, "exit_criterion": "max_probability"}
    for given in ({"model": str(tmp_path)}, {"model": model, "image_processor": processor}):
        classify = pipeline("image-classification", device="cpu", **given)
        for image, results in zip(images, classify(images, batch_size=3, **options), strict=True):
            logits = model(**processor(image, return_tensors="pt"), **options).logits
            assert results[0]["label"] == model.config.id2label[int(logits.argmax())]
            assert abs(results[0]["score"] - float(logits.softmax(-1).max())) < 1e-4
        deep = classify(images[0], exit_threshold=1.0)[0]["score"]
        assert abs(deep - float(model(**processor(images[0], return_tensors="pt")).logits.softmax(-1).max())) < 1e-4
    with pytest.raises(TypeError, match=r"`exit_treshold`=0\.5 is no argument"):
        classify(images[0], exit_treshold=0.5)
    extract = pipeline("image-feature-extraction", model=str(tmp_path), device="cpu")
    features = extract(images[0], return_tensors=True)
    stock = families.twin(model).base_model(**processor(images[0], return_tensors="pt")).last_hidden_state
    torch.testing.assert_close(features, stock, rtol=1e-5, atol=1e-5)
    with pytest.raises(TypeError, match=r"`exit_threshold`=0\.5 is no argument of feature extraction"):
        extract(images[0], exit_threshold=0.5)
