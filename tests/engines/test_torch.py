# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""What the engine `torch` has of its own; what engines share is tested over all of them."""

from functools import partial

import families
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification

from transformers_cee import ModernBertCeeConfig, ModernBertForConsistentEE
from transformers_cee.engines.buckets import Buckets, bucket_of
from transformers_cee.engines.engine import Written
from transformers_cee.engines.graphs import BlockGraph, Cut, token_inputs
from transformers_cee.engines.loading import load_exported
from transformers_cee.engines.torch_engine import WEIGHTS, TorchEngine


ALL = frozenset({"hidden", "state", "logits"})


@pytest.fixture
def modernbert():
    torch.manual_seed(0)
    config = ModernBertCeeConfig(
        vocab_size=60, hidden_size=32, num_hidden_layers=4, num_attention_heads=4, intermediate_size=48,
        max_position_embeddings=64, num_labels=3, local_attention=8, pad_token_id=0, exit_layers=2,
    )  # fmt: skip
    return ModernBertForConsistentEE(config).eval()


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(0)
    mask = torch.arange(19) < torch.tensor([[19], [3], [7], [12], [1]])
    return {"input_ids": torch.randint(2, 60, (5, 19), generator=generator) * mask, "attention_mask": mask}


def exits_of(model, batch):
    found = model(**batch, output_all_exits=True)
    return found.all_exit_logits, found.all_exit_states


@torch.no_grad()
def test_rotary_tables_and_two_kinds_of_masks(modernbert, batch, tmp_path):
    modernbert.export(tmp_path / "out", engine="torch", precision="float32")
    exported = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(exits_of(exported, batch), exits_of(modernbert, batch), rtol=1e-5, atol=1e-5)
    fewer = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out", exit_layers=[4])
    torch.testing.assert_close(fewer(**batch).logits, modernbert(**batch).logits, rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("model_type", families.of_kind("encoder"))
@pytest.mark.parametrize(("precision", "tolerance"), [("float32", 1e-5), ("bfloat16", 0.03), ("int8", 0.03)])
def test_every_family(model_type, precision, tolerance, tmp_path):
    model = families.model(model_type, exit_layers=2).requires_grad_(False).eval()
    batch = families.batch(model_type, families.rows(model_type, 3), "left")
    first = {name: batch[name] for name in token_inputs(model.config) if name in batch}
    first["attention_mask"] = first["attention_mask"] != 0
    if "token_type_ids" in token_inputs(model.config):
        first.setdefault("token_type_ids", torch.zeros_like(first["input_ids"]))
    model.config.exit_engine = {"criterion": None}
    TorchEngine.write(Written(model, precision, None, [first]), tmp_path)
    engine = TorchEngine(tmp_path, model.config, precision, torch.get_num_threads())
    found = engine.block(Cut(0, 2, ALL))(first)
    second = {"hidden": found["hidden"], "attention_mask": first["attention_mask"]}
    states = torch.stack((found["state"], engine.block(Cut(2, 4, frozenset({"state"})))(second)["state"]), dim=1)
    expected = model(**batch, output_all_exits=True).all_exit_states
    assert (states - expected).norm() < tolerance * expected.norm()


@torch.no_grad()
def test_exits_compute_in_float32_behind_layers_in_bfloat16(modernbert, batch, tmp_path):
    exported = modernbert.export(tmp_path / "out", engine="torch", precision="bfloat16")
    weights = load_file(tmp_path / "out" / "engine" / WEIGHTS)
    precisions = {name: value.dtype for name, value in weights.items()}
    assert precisions["model.layers.1.mlp.Wi.weight"] == precisions["model.embeddings.norm.weight"] == torch.bfloat16
    for name in ("model.final_norm.weight", "head.dense.weight", "exit_heads.heads.layer_2.weight"):
        assert precisions[name] == torch.float32
    found = exported.block(Cut(0, 2, ALL))(batch)
    assert {name: value.dtype for name, value in found.items()} == {
        "hidden": torch.bfloat16, "state": torch.float32, "logits": torch.float32,
    }  # fmt: skip
    # The same layer by layer, in bfloat16 throughout.
    hidden = modernbert.embedded(input_ids=batch["input_ids"], inputs_embeds=None).to(torch.bfloat16)
    rows = modernbert.masked(hidden, batch["attention_mask"])
    layers = modernbert.layers.to(torch.bfloat16)
    for index in range(2):
        rows.hidden_states = modernbert.bind(index, layers[index], {})(rows)
    mask = batch["attention_mask"]
    torch.testing.assert_close(found["hidden"][mask], rows.hidden_states[mask], rtol=0.05, atol=0.05)
    state = modernbert.state(found["hidden"].float(), mask, 0)
    torch.testing.assert_close(found["state"], state, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found["logits"], modernbert.logits(state, 0), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_buckets_give_what_the_block_gives(make_model, modernbert, batch):
    captured = []

    def capture(block, buffers):
        captured.append([tuple(buffer.shape) for buffer in buffers])
        return lambda: block(*buffers)

    policy = make_model(policy_inputs="both", policy_condition="film")
    history = {"margin": torch.rand(5, 1), "predictions": torch.randint(0, 3, (5, 2))}
    given = {**batch, "token_type_ids": torch.zeros_like(batch["input_ids"]), "alpha": torch.tensor([0.01])}
    scored = ALL | {"score", "margin", "predictions"}
    for model, cut, criterion in (
        (modernbert, Cut(0, 2, ALL), None),
        (policy, Cut(0, 1, scored), "policy"),
        (policy, Cut(1, 3, scored, has_history=True), "policy"),
    ):
        given["hidden"] = torch.randn(5, 19, 32)
        block = BlockGraph(model, cut, criterion)
        run = Buckets(block, block.inputs, block.outputs, capture, most_columns=24)
        captured.clear()
        for rows, columns in ((5, 19), (4, 7), (3, 16), (5, 19)):
            some = {name: value[:rows, :columns] for name, value in given.items() if name not in ("alpha", *history)}
            some |= {name: value[:rows] for name, value in history.items()} | {"alpha": given["alpha"]}
            expected = dict(zip(block.outputs, block(*(some[name] for name in block.inputs)), strict=True))
            found = run(some)
            assert found.keys() == expected.keys() == cut.gives
            mask = some["attention_mask"]
            for one in (found, expected):
                # What padding becomes depends on how much of it there is.
                one["hidden"] = one["hidden"] * mask.unsqueeze(-1)
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        assert [shapes[block.inputs.index("attention_mask")] for shapes in captured] == [(8, 24), (4, 16)]


def test_results_of_buckets_stay_as_they_are(batch):
    counted = torch.zeros(8, 32)
    run = Buckets(
        lambda mask: (counted.add_(1),), ["attention_mask"], ["logits"], lambda block, given: lambda: block(*given)
    )
    first = run(batch)["logits"]
    second = run(batch)["logits"]
    assert first.shape == (5, 32)
    assert (first == 1).all() and (second == 2).all()


@pytest.mark.parametrize(
    ("size", "most", "expected"),
    [((1, 1), None, (1, 16)), ((3, 16), 512, (4, 16)), ((8, 17), 20, (8, 20)), ((9, 24), 20, (16, 24))],
)
def test_bucket_of(size, most, expected):
    assert bucket_of(*size, most) == expected


@pytest.mark.slow
@torch.no_grad()
def test_compiled_blocks_give_the_same(make_model, tokenizer, texts, tmp_path, monkeypatch):
    model = make_model()
    # Traced, but not translated to machine code, which takes a minute.
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    model.export(tmp_path / "out", engine="torch", precision="float32")
    exported = load_exported(tmp_path / "out", compile=True)
    for rows in (1, 3, 5):
        batch = tokenizer(texts[:rows], padding=True, return_tensors="pt")
        torch.testing.assert_close(exits_of(exported, batch), exits_of(model, batch), rtol=1e-5, atol=1e-5)


def test_threads_and_labels(make_model, batch, tmp_path):
    make_model().export(tmp_path / "out", engine="torch", precision="float32")
    before = torch.get_num_threads()
    exported = load_exported(tmp_path / "out", threads=before + 1)
    assert exported.engine.threads == before + 1
    with torch.no_grad():
        assert exported(**batch, labels=torch.tensor([0, 1, 2, 0, 1])).loss > 0
    assert torch.get_num_threads() == before
    for wrong in (-1, 0, "x", 1.5):
        with pytest.raises(ValueError, match=r"`threads`=.* must be a whole number"):
            load_exported(tmp_path / "out", threads=wrong)
    with pytest.raises(ValueError, match="were exported to 'torch' are part of its graphs"):
        exported.save_exits(tmp_path / "exits")
    with pytest.raises(TypeError, match="`model` is exported to 'torch' already"):
        exported.export(tmp_path / "again")
    assert exported.to("meta").device == torch.device("cpu")


def test_refusals(make_model, tmp_path):
    out = tmp_path / "out"
    make_model().export(out, engine="torch", precision="float32")
    with pytest.raises(ValueError, match="`cuda_graphs`=True, but `device`='cpu'"):
        load_exported(out, cuda_graphs=True)
    with pytest.raises(ValueError, match="`device`='mps' is none of the engine 'torch'"):
        load_exported(out, device="mps")
    weights = load_file(out / "engine" / WEIGHTS)
    weights.pop("bert.pooler.dense.bias")
    save_file(weights, out / "engine" / WEIGHTS)
    with pytest.raises(ValueError, match=r"does not fit its config: 1 weights .* 'bert.pooler.dense.bias'"):
        load_exported(out)
    (out / "engine" / WEIGHTS).write_bytes(b"nothing")
    with pytest.raises(ValueError, match="is damaged"):
        load_exported(out)


@torch.no_grad()
def test_int8_has_static_scales(make_model, tokenizer, texts, tmp_path):
    model = make_model()
    asked = {"calibration_texts": texts, "processing_class": tokenizer, "measure": False}
    exported = model.export(tmp_path / "out", engine="torch", precision="int8", **asked)
    weights = load_file(tmp_path / "out" / "engine" / WEIGHTS)
    name = "bert.encoder.layer.2.intermediate.dense"
    stock = model.get_submodule(name)
    assert weights[f"{name}.weight"].dtype == torch.int8
    scale, factor = weights[f"{name}.weight_scale"].unsqueeze(1), weights[f"{name}.input_factor"]
    back = weights[f"{name}.weight"] * scale
    assert ((back - stock.weight / factor).abs() <= 0.501 * scale).all()
    # Exits and embeddings stay as they are.
    kept = ("classifier", "bert.pooler.dense", "exit_heads.heads.layer_1", "bert.embeddings.word_embeddings")
    assert all(torch.equal(weights[f"{one}.weight"], model.get_parameter(f"{one}.weight")) for one in kept)
    # The range is that of all tokens of the texts that set scales, every second one here, and of no padding.
    seen = []
    hook = stock.register_forward_pre_hook(lambda module, given: seen.append(given[0][0]))
    for text in texts[::2]:
        model(**tokenizer(text, return_tensors="pt"), exit_threshold=1.0)
    hook.remove()
    given = torch.cat(seen)
    expected = torch.stack(((given * factor).min(), (given * factor).max()))
    torch.testing.assert_close(weights[f"{name}.input_range"], expected, rtol=1e-4, atol=1e-5)
    # The map against numbers that are rounded one by one, which may fall to the other side of a half.
    step = float(expected[1] - expected[0]) / 255
    rounded = (given * factor / step).round() * step
    found = exported.engine.model.get_submodule(name)(given)
    near = step * back.abs().amax(1)
    assert ((found - rounded @ back.T - stock.bias).abs() <= 2 * near + 1e-4).all()
    # Nearly all of what the map gave before.
    whole = stock(given)
    assert (found - whole).norm() < 0.03 * whole.norm()
    with pytest.raises(ValueError, match="`compile`=True: int8"):
        load_exported(tmp_path / "out", compile=True)
