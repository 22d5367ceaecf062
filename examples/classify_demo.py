# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Loads a trained folder through the Auto classes and shows every sentence's label and the layer where it left.

    python examples/classify_demo.py --model runs/demo "Who wrote Faust ?" "What is an atom ?"

Without sentences it classifies a few of its own and, at a terminal, then asks for more.
"""

import argparse
import sys
from pathlib import Path

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import transformers_cee  # noqa: F401  (registers its models with the Auto classes)


SENTENCES = (
    "Who painted the ceiling of the Sistine Chapel ?",
    "How many moons does Saturn have ?",
    "Where is the highest waterfall on Earth ?",
    "What does the abbreviation HTML stand for ?",
    "Why does bread rise in the oven ?",
    "What instrument did the man who first measured the speed of light look through ?",
)


@torch.inference_mode()
def classify(model, tokenizer, sentences: list[str], exit_threshold: float | None = None) -> list[dict]:
    """Label, probability and exit layer (1-based) of every sentence, as one batch."""
    batch = tokenizer(sentences, padding=True, truncation=True, return_tensors="pt").to(model.device)
    output = model(**batch, exit_threshold=exit_threshold)
    probabilities = output.logits.float().softmax(-1)
    best = probabilities.max(-1)
    return [
        {"label": model.config.id2label[index], "probability": probability, "exit_layer": layer}
        for index, probability, layer in zip(
            best.indices.tolist(), best.values.tolist(), output.exit_layers.tolist(), strict=True
        )
    ]


def show(sentence: str, result: dict, num_layers: int) -> str:
    """One line, e.g. `[###...] 3/6  human         0.98  Who wrote Faust ?`."""
    layer = result["exit_layer"]
    bar = "#" * layer + "." * (num_layers - layer)
    return f"[{bar}] {layer}/{num_layers}  {result['label']:<14} {result['probability']:.2f}  {sentence}"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="runs/demo", help="folder or Hub name of a trained model")
    parser.add_argument("--exit_threshold", type=float, help="1: exits off, 0: first exit; default: the model's own")
    parser.add_argument("text", nargs="*", help="sentences to classify")
    args = parser.parse_args(argv)
    if "/" not in args.model and not Path(args.model).is_dir():
        parser.error(f"--model: no such folder: {args.model!r}")
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForSequenceClassification.from_pretrained(args.model).eval()
    num_layers = model.config.num_hidden_layers

    def classify_and_show(sentences: list[str]) -> list[dict]:
        results = classify(model, tokenizer, sentences, args.exit_threshold)
        for sentence, result in zip(sentences, results, strict=True):
            print(show(sentence, result, num_layers))
        return results

    print(f"{type(model).__name__} from {args.model}; # = layers computed, . = layers saved\n")
    results = classify_and_show(args.text or list(SENTENCES))
    depth = sum(result["exit_layer"] for result in results) / len(results)
    print(f"\ndepth {depth:.2f} of {num_layers} layers")
    while not args.text and sys.stdin.isatty():
        try:
            sentence = input("sentence (empty to stop): ").strip()
        except EOFError:
            break
        if not sentence:
            break
        classify_and_show([sentence])


if __name__ == "__main__":
    main()
