# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Exits without their base: what was saved comes back bit for bit on the right base, and on no other."""

from __future__ import annotations

import hashlib
import json

import pytest
import torch
from exits_alone import AUTO, FIELDS, IDS, LABELS, OTHER_FIELDS, OURS, SIZES, STOCK, same, stock, trained
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    LlamaForCausalLM,
    LlamaModel,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from transformers_cee import BertForConsistentEE, load_exits
from transformers_cee.modeling.fingerprints import fingerprints


@pytest.fixture(params=list(OURS))
def kind(request):
    return request.param


@pytest.fixture
def base(kind, tmp_path):
    """Folder of a stock checkpoint with its head."""
    stock(kind).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def saved(kind, base, tmp_path):
    """A trained model and the folder of its exits."""
    model = trained(kind, base, exit_threshold=0.5, **FIELDS[kind])
    model.config.exit_operating_points = {"quick": {"criterion": "policy", "thresholds": [0.6, 0.4, 1.0]}}
    model.config.exit_budgets = [[0.5, 0.01, 0.5], [0.9, 0.001, 0.5]]
    model.save_exits(tmp_path / "exits")
    return model, tmp_path / "exits"


def edit(folder, **fields):
    """Changes what a folder's config says of its exits."""
    path = folder / "config.json"
    values = json.loads(path.read_text())
    values["exits_of"] |= fields
    path.write_text(json.dumps(values))


def rewrite(folder, change):
    """Changes the weights of a folder as whoever writes such folders by other means would."""
    tensors = load_file(folder / "exits.safetensors")
    change(tensors)
    save_file(tensors, folder / "exits.safetensors")
    edit(folder, weights=hashlib.sha256((folder / "exits.safetensors").read_bytes()).hexdigest())


class TestTheSameAgain:
    def test_by_name(self, kind, base, saved):
        model, folder = saved
        for auto in (AUTO[kind], AutoModel, OURS[kind]):
            again = auto.from_pretrained(folder).eval()
            assert type(again) is OURS[kind]
            same(model, again)
            assert again.name_or_path == str(base)
        same(model, again, exit_threshold="quick")

    def test_around_a_base(self, kind, base, saved):
        model, folder = saved
        loaded = STOCK[kind].from_pretrained(base)
        again = load_exits(loaded, folder)
        same(model, again)
        assert getattr(again, again.base_model_prefix) is getattr(loaded, loaded.base_model_prefix)
        same(model, load_exits(base, folder).eval())
        own = OURS[kind].from_pretrained(base).eval()
        assert load_exits(own, folder) is own
        same(model, own)

    def test_estimators_decide(self, kind, saved):
        model, folder = saved
        criterion = FIELDS[kind]["exit_estimators"][0]
        same(model, AUTO[kind].from_pretrained(folder).eval(), exit_criterion=criterion)

    def test_what_the_folder_holds(self, kind, base, saved):
        model, folder = saved
        names = sorted(path.name for path in folder.iterdir())
        assert names == ["README.md", "config.json", "exits.safetensors", "modeling_cee.py"]
        own = {name for name in model.state_dict() if name.startswith("exit_")}
        assert set(load_file(folder / "exits.safetensors")) == own
        values = json.loads((folder / "config.json").read_text())
        assert values["model_type"] == model.config.model_type
        assert values["exits_of"]["base"] == str(base) and values["exits_of"]["task_modules"] == []
        card = (folder / "README.md").read_text()
        assert f"base_model: {base}" in card and "early-exit" in card and f"from_pretrained({str(folder)!r})" in card

    def test_whole_models_are_saved_whole(self, kind, saved, tmp_path):
        model, folder = saved
        AUTO[kind].from_pretrained(folder).save_pretrained(tmp_path / "whole")
        OURS[kind](AutoConfig.from_pretrained(folder)).save_pretrained(tmp_path / "made")
        for whole in ("whole", "made"):
            assert "exits_of" not in json.loads((tmp_path / whole / "config.json").read_text())
        same(model, AUTO[kind].from_pretrained(tmp_path / "whole").eval())

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_in_another_dtype(self, kind, base, saved, dtype, tmp_path):
        """As the whole model would be."""
        model, folder = saved
        model.save_pretrained(tmp_path / "whole")
        model = AUTO[kind].from_pretrained(tmp_path / "whole", dtype=dtype).eval()
        again = AUTO[kind].from_pretrained(folder, dtype=dtype, device_map="cpu").eval()
        assert {value.dtype for value in again.parameters()} == {dtype}
        same(model, again)
        same(model, load_exits(STOCK[kind].from_pretrained(base, dtype=dtype), folder))

    def test_of_a_base_in_half_precision(self, kind, tmp_path):
        stock(kind).half().save_pretrained(tmp_path / "base")
        model = trained(kind, tmp_path / "base", dtype=torch.float32, **FIELDS[kind])
        model.save_exits(tmp_path / "exits")
        same(model, AUTO[kind].from_pretrained(tmp_path / "exits").eval())
        again = AUTO[kind].from_pretrained(tmp_path / "exits", dtype=torch.float16)
        assert {value.dtype for value in again.parameters()} == {torch.float16}

    def test_trained_in_half_precision(self, kind, base, tmp_path):
        """Of which wider weights are found by rounding them, and those of another kind are not."""
        model = trained(kind, base, dtype=torch.bfloat16, **FIELDS[kind])
        model.save_exits(tmp_path / "exits")
        same(model, AUTO[kind].from_pretrained(tmp_path / "exits").eval())
        again = AUTO[kind].from_pretrained(tmp_path / "exits", dtype=torch.float32).eval()
        assert torch.equal(
            again.exit_policies.networks[0][0].weight.bfloat16(), model.exit_policies.networks[0][0].weight
        )
        other = stock(kind)
        with torch.no_grad():
            next(other.base_model.parameters())[0, 0] += 0.1
        with pytest.raises(ValueError, match="fingerprints differ"):
            load_exits(other, tmp_path / "exits")
        with pytest.raises(ValueError, match=r"trained in bfloat16.*with that `dtype`"):
            AUTO[kind].from_pretrained(tmp_path / "exits", dtype=torch.float16)

    def test_generation_defaults(self, tmp_path):
        stock("decoder").save_pretrained(tmp_path / "base")
        model = trained("decoder", tmp_path / "base", **FIELDS["decoder"])
        model.generation_config.exit_threshold = 0.4
        model.generation_config.skipped_kv = "deferred"
        model.save_exits(tmp_path / "exits")
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "exits").eval()
        assert (again.generation_config.exit_threshold, again.generation_config.skipped_kv) == (0.4, "deferred")
        options = {"max_new_tokens": 5, "do_sample": False, "return_dict_in_generate": True}
        first, second = model.generate(IDS, **options), again.generate(IDS, **options)
        assert torch.equal(first.sequences, second.sequences) and torch.equal(first.exit_layers, second.exit_layers)

    def test_keywords_are_of_the_config(self, kind, saved):
        _, folder = saved
        again = OURS[kind].from_pretrained(folder, exit_threshold=0.25, dtype=torch.bfloat16)
        assert again.config.exit_threshold == 0.25 and again.dtype == torch.bfloat16
        config = AutoConfig.from_pretrained(folder, exit_threshold=0.35)
        assert AUTO[kind].from_pretrained(folder, config=config).config.exit_threshold == 0.35
        _, info = OURS[kind].from_pretrained(folder, output_loading_info=True)
        assert not info["missing_keys"]
        with pytest.raises(ValueError, match=r"`exit_layers`=\[2\].*holds exits after layers 1, 3 and 4"):
            OURS[kind].from_pretrained(folder, exit_layers=[2])


class TestTheTasksModules:
    """Of the last exit: left to the base, or saved along."""

    def test_a_base_without_them(self, tmp_path):
        torch.manual_seed(0)
        BertModel(BertConfig(**SIZES), add_pooling_layer=False).save_pretrained(tmp_path / "base")
        model = trained("encoder", tmp_path / "base", **LABELS, **FIELDS["encoder"])
        model.save_exits(tmp_path / "exits")
        assert {"classifier.weight", "bert.pooler.dense.bias"} <= set(load_file(tmp_path / "exits/exits.safetensors"))
        same(model, AutoModelForSequenceClassification.from_pretrained(tmp_path / "exits").eval())
        same(
            model,
            load_exits(BertModel.from_pretrained(tmp_path / "base", add_pooling_layer=False), tmp_path / "exits"),
        )
        same(model, load_exits(BertModel.from_pretrained(tmp_path / "base"), tmp_path / "exits"))

    def test_a_head_that_learned(self, tmp_path):
        """With the layers frozen; the base has one of other labels."""
        stock("encoder").save_pretrained(tmp_path / "base")
        model = (
            OURS["encoder"]
            .from_pretrained(tmp_path / "base", num_labels=2, ignore_mismatched_sizes=True, **FIELDS["encoder"])
            .eval()
        )
        model.save_exits(tmp_path / "exits")
        tensors = load_file(tmp_path / "exits/exits.safetensors")
        assert "classifier.weight" in tensors and "bert.pooler.dense.weight" not in tensors
        again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "exits").eval()
        assert again.num_labels == 2 and torch.equal(again.classifier.weight, model.classifier.weight)
        loaded = BertForSequenceClassification.from_pretrained(tmp_path / "base")
        kept = loaded.classifier.weight.clone()
        again = load_exits(loaded, tmp_path / "exits")
        assert torch.equal(again.classifier.weight, model.classifier.weight)
        assert torch.equal(loaded.classifier.weight, kept)

    def test_a_head_of_the_same_labels(self, tmp_path):
        """It learned, and stands beside that of the stock model, which stays as it is."""
        stock("encoder").save_pretrained(tmp_path / "base")
        model = trained("encoder", tmp_path / "base", **FIELDS["encoder"])
        with torch.no_grad():
            model.classifier.weight += 1
        model.save_exits(tmp_path / "exits")
        loaded = BertForSequenceClassification.from_pretrained(tmp_path / "base")
        kept = loaded.classifier.weight.clone()
        same(model, load_exits(loaded, tmp_path / "exits"))
        assert torch.equal(loaded.classifier.weight, kept)

    def test_an_untied_lm_head_is_the_bases(self, tmp_path):
        stock("decoder").save_pretrained(tmp_path / "base")
        trained("decoder", tmp_path / "base", **FIELDS["decoder"]).save_exits(tmp_path / "exits")
        assert "lm_head.weight" not in load_file(tmp_path / "exits/exits.safetensors")
        with pytest.raises(ValueError, match=r"lacks 'lm_head\.weight'.*Load the base with its head"):
            load_exits(LlamaModel.from_pretrained(tmp_path / "base"), tmp_path / "exits")

    def test_a_tied_lm_head(self, tmp_path):
        stock("decoder", tie_word_embeddings=True).save_pretrained(tmp_path / "base")
        model = trained("decoder", tmp_path / "base", **FIELDS["decoder"])
        model.save_exits(tmp_path / "exits")
        assert "lm_head.weight" not in load_file(tmp_path / "exits/exits.safetensors")
        for again in (
            AutoModelForCausalLM.from_pretrained(tmp_path / "exits").eval(),
            load_exits(LlamaForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "exits"),
            load_exits(LlamaModel.from_pretrained(tmp_path / "base"), tmp_path / "exits"),
        ):
            same(model, again)
            assert again.lm_head.weight is again.model.embed_tokens.weight


class TestTheBaseIsNotTheOne:
    def test_when_saving(self, kind, base, tmp_path):
        model = trained(kind, base, **FIELDS[kind])
        with torch.no_grad():
            next(model.base_model.parameters())[0, 0] += 1e-6
        with pytest.raises(ValueError, match=r"1 weights of the model's layers are not .*trainable='exits'"):
            model.save_exits(tmp_path / "exits")
        assert not (tmp_path / "exits").exists()

    def test_out_of_reach_when_saving(self, kind, base, tmp_path, caplog):
        model = trained(kind, base, **FIELDS[kind])
        model.save_exits(tmp_path / "exits", base=tmp_path / "nowhere")
        assert "cannot be reached" in caplog.text
        with pytest.raises(ValueError, match=r"nowhere, which cannot be loaded.*load_exits"):
            AUTO[kind].from_pretrained(tmp_path / "exits")
        same(model, load_exits(base, tmp_path / "exits").eval())
        with torch.no_grad():
            next(model.base_model.parameters())[0, 0] += 1e-6
        model.save_exits(tmp_path / "changed", base=tmp_path / "nowhere")
        with pytest.raises(ValueError, match="fingerprints differ"):
            load_exits(base, tmp_path / "changed")

    def test_other_weights(self, kind, base, saved):
        _, folder = saved
        other = stock(kind)
        with torch.no_grad():
            list(other.base_model.parameters())[-1].view(-1)[0] += 1e-6
        with pytest.raises(ValueError, match=r"weights of .* are not those.*fingerprints differ"):
            load_exits(other, folder)
        other.save_pretrained(base)
        with pytest.raises(ValueError, match=r"weights of .*base are not those.*fingerprints differ"):
            AUTO[kind].from_pretrained(folder)
        own = OURS[kind].from_pretrained(base)
        before = {name: value.clone() for name, value in own.state_dict().items()}
        with pytest.raises(ValueError, match="fingerprints differ"):
            own.load_exits(folder)
        assert own.exits_names == ["default"] and own.state_dict().keys() == before.keys()
        assert all(torch.equal(before[name], value) for name, value in own.state_dict().items())

    def test_another_head(self, saved, kind):
        """The last exit is the base's, so it counts as the layers do."""
        _, folder = saved
        other = stock(kind)
        with torch.no_grad():
            list(other.parameters())[-1].view(-1)[0] += 1e-3
        with pytest.raises(ValueError, match="fingerprints differ"):
            load_exits(other, folder)

    def test_other_sizes(self, kind, saved, base):
        _, folder = saved
        for fields, match in (
            ({"hidden_size": 16, "intermediate_size": 16}, "`hidden_size`=16.*trained on .* with 32"),
            ({"vocab_size": 61}, "`vocab_size`=61.*trained on .* with 60"),
            ({"num_hidden_layers": 5}, "`num_hidden_layers`=5.*trained on .* with 4"),
        ):
            other = stock(kind, **fields)
            with pytest.raises(ValueError, match=match):
                load_exits(other, folder)
        other = stock(kind, hidden_size=16)
        other.save_pretrained(base)
        with pytest.raises(ValueError, match="`hidden_size`=16"):
            AUTO[kind].from_pretrained(folder)
        stock(kind, intermediate_size=16).save_pretrained(base)
        with pytest.raises(ValueError, match=r"has other sizes than .* in shape"):
            AUTO[kind].from_pretrained(folder)
        stock(kind, num_hidden_layers=3).save_pretrained(base)
        with pytest.raises(ValueError, match="`num_hidden_layers`=3"):
            AUTO[kind].from_pretrained(folder)

    def test_fewer_layers_of_a_base(self, kind, base, tmp_path):
        """Where the model was cut, its exits belong to the base all the same."""
        model = trained(kind, base, num_hidden_layers=3, exit_layers=[1, 2])
        model.save_exits(tmp_path / "exits")
        same(model, AUTO[kind].from_pretrained(tmp_path / "exits").eval())
        with pytest.raises(ValueError, match=r"`num_hidden_layers`=4.*trained on .* with 3"):
            load_exits(stock(kind), tmp_path / "exits")

    def test_another_architecture(self, kind, saved, base, tmp_path):
        _, folder = saved
        other = RobertaForSequenceClassification(RobertaConfig(**SIZES, **LABELS))
        with pytest.raises(ValueError, match=rf"exits of a {OURS[kind].__name__}.*RobertaForSequenceClassification"):
            load_exits(other, folder)
        other.save_pretrained(base)
        with pytest.raises(ValueError, match="`model_type`='roberta'"):
            AUTO[kind].from_pretrained(folder)
        (wrong,) = (one for name, one in OURS.items() if name != kind)
        with pytest.raises(ValueError, match="model_type"):
            wrong.from_pretrained(folder)
        with pytest.raises(ValueError, match="model_type"):
            stock(next(name for name in OURS if name != kind)).save_pretrained(tmp_path / "other")
            wrong.from_pretrained(tmp_path / "other").load_exits(folder)

    def test_other_labels(self, tmp_path):
        stock("encoder").save_pretrained(tmp_path / "base")
        trained("encoder", tmp_path / "base", **FIELDS["encoder"]).save_exits(tmp_path / "exits")
        turned = {"id2label": {0: "who", 1: "yes", 2: "no"}, "label2id": {"who": 0, "yes": 1, "no": 2}}
        other = stock("encoder", **turned)
        own = BertForConsistentEE.from_pretrained(tmp_path / "base", **turned)
        for model in (other, own):
            with pytest.raises(ValueError, match=r"labels \['who', 'yes', 'no'\].*\['no', 'yes', 'who'\] apart"):
                load_exits(model, tmp_path / "exits")
        with pytest.raises(ValueError, match="has the labels"):
            load_exits(stock("encoder", num_labels=2, id2label=None, label2id=None), tmp_path / "exits")
        other.save_pretrained(tmp_path / "base")
        with pytest.raises(ValueError, match=r"labels \['who', 'yes', 'no'\]"):
            AutoModelForSequenceClassification.from_pretrained(tmp_path / "exits")
        # A base without names for its labels says nothing against those of the exits.
        same_head = stock("encoder", id2label=None, label2id=None, num_labels=3)
        assert load_exits(same_head, tmp_path / "exits").config.id2label[2] == "who"


class TestFoldersThatAreNoSuch:
    def test_missing_and_further_tensors(self, kind, base, saved):
        _, folder = saved
        name = sorted(load_file(folder / "exits.safetensors"))[-1]
        rewrite(folder, lambda tensors: tensors.pop(name))
        for load in (AUTO[kind].from_pretrained, lambda path: load_exits(stock(kind), path)):
            with pytest.raises(ValueError, match=rf"lacks tensors of the exits .*: 1, among them '{name}'"):
                load(folder)
        rewrite(folder, lambda tensors: tensors.update({name: torch.zeros(1), "exit_heads.more": torch.zeros(1)}))
        with pytest.raises(ValueError, match=r"are of no exit .*: 1, among them 'exit_heads\.more'"):
            AUTO[kind].from_pretrained(folder)

    def test_tensors_of_other_shapes(self, kind, saved):
        _, folder = saved
        name = sorted(load_file(folder / "exits.safetensors"))[-1]
        rewrite(folder, lambda tensors: tensors.update({name: torch.zeros(2, 3, 4)}))
        with pytest.raises(ValueError, match=rf"'{name}' of .* has the shape \(2, 3, 4\)"):
            AUTO[kind].from_pretrained(folder)

    def test_damaged_files(self, kind, saved):
        _, folder = saved
        content = (folder / "exits.safetensors").read_bytes()
        for damaged in (content[:-3], b"", content[:-1] + bytes([content[-1] ^ 1])):
            (folder / "exits.safetensors").write_bytes(damaged)
            with pytest.raises(ValueError, match=r"exits\.safetensors of .* is damaged"):
                AUTO[kind].from_pretrained(folder)
        (folder / "exits.safetensors").unlink()
        with pytest.raises(ValueError, match=r"lacks exits\.safetensors"):
            AUTO[kind].from_pretrained(folder)
        (folder / "exits.safetensors").write_bytes(content)
        for damage, match in (
            ({"revision": 3}, r"`exits_of\.revision`=3"),
            ({"layers": ["2"]}, r"`exits_of\.layers`"),
            ({"more": 1}, "unknown fields"),
            ({"fingerprints": {"int8": "0"}}, r"fingerprints"),
            ({"fingerprints": {}}, r"fingerprints"),
            ({"task_modules": ["exit_heads"]}, "task_modules"),
        ):
            text = (folder / "config.json").read_text()
            edit(folder, **damage)
            with pytest.raises(ValueError, match=match):
                AUTO[kind].from_pretrained(folder)
            (folder / "config.json").write_text(text)
        (folder / "config.json").write_text(json.dumps({**json.loads(text), "exits_of": "base"}))
        with pytest.raises(ValueError, match="`exits_of`='base'"):
            AUTO[kind].from_pretrained(folder)

    def test_a_whole_model(self, kind, base, saved, tmp_path):
        model, folder = saved
        model.save_pretrained(tmp_path / "whole")
        for whole in (tmp_path / "whole", base):
            with pytest.raises(ValueError, match="is a whole model and no folder with exits alone"):
                load_exits(stock(kind), whole)
            with pytest.raises(ValueError, match="is a whole model and no folder with exits alone"):
                model.load_exits(whole)
            with pytest.raises(ValueError, match=r"holds a whole model or an adapter \(model\.safetensors\)"):
                model.save_exits(whole)
        with pytest.raises(ValueError, match=r"holds no config\.json"):
            load_exits(stock(kind), tmp_path)
        with pytest.raises(ValueError, match="is itself a folder with exits alone"):
            model.save_exits(tmp_path / "more", base=folder)
        edit(folder, base=str(folder))
        with pytest.raises(ValueError, match="is itself a folder with exits alone"):
            AUTO[kind].from_pretrained(folder)

    def test_a_whole_model_is_a_base(self, kind, base, saved, tmp_path):
        """Its own exits give way to those of the folder."""
        model, _ = saved
        trained(kind, base, seed=3, **OTHER_FIELDS[kind]).save_pretrained(tmp_path / "whole")
        model.save_exits(tmp_path / "exits", base=tmp_path / "whole")
        same(model, AUTO[kind].from_pretrained(tmp_path / "exits").eval())

    def test_arguments(self, kind, base, saved, tmp_path):
        model, folder = saved
        with pytest.raises(TypeError, match="'dtype' are unknown"):
            model.load_exits(folder, dtype=torch.float16)
        with pytest.raises(TypeError, match="'overwrite' are unknown"):
            model.save_exits(tmp_path / "again", overwrite=True)
        with pytest.raises(ValueError, match="`base`=None"):
            OURS[kind](OURS[kind].config_class(**SIZES)).save_exits(tmp_path / "again")
        with pytest.raises(ValueError, match="no exit but the last one"):
            OURS[kind].from_pretrained(base, exit_layers=[4]).save_exits(tmp_path / "again")
        model.save_exits(folder)
        (tmp_path / "file").write_text("")
        with pytest.raises(ValueError, match="is a file"):
            model.save_exits(tmp_path / "file")


def test_fingerprints_are_of_names_shapes_and_bytes():
    tensors = {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(2, dtype=torch.long)}
    first = fingerprints(tensors)
    assert list(first) == ["float32", "bfloat16", "float16"]
    assert fingerprints({"b": tensors["b"], "a": tensors["a"].T.contiguous().T}) == first
    for other in (
        {**tensors, "a": tensors["a"].view(3, 2)},
        {**tensors, "a": tensors["a"] + 1},
        {**tensors, "b": tensors["b"] + 1},
        {"a": tensors["a"], "c": tensors["b"]},
    ):
        assert not set(fingerprints(other).values()) & set(first.values())
    assert fingerprints({**tensors, "a": tensors["a"].bfloat16()})["bfloat16"] == first["bfloat16"]
