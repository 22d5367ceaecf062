# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Rebuilds an entry of the zoo from its recipe: trains, measures, and writes its card.

    python examples/build_zoo.py model_cards/bert-cee-trec.yaml --path model=DIR data=DIR --output runs/zoo

A recipe names a script of this folder, the options that it runs with (those of a configuration file before its own),
and the paths that these stand on, which lie elsewhere on every machine. The model comes to lie in `--output`, in a
folder with the recipe's name. `--cards` (for the zoo itself, `model_cards`) gets what a reader looks at: the card, its
picture and `NAME.json`, the results that the card's figures are taken from.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from functools import reduce
from pathlib import Path
from typing import Any

from common import read_options

from transformers_cee.files import read_json, write_text


SCRIPTS = Path(__file__).parent
NEEDED, OPTIONAL = {"script", "paths", "options"}, {"config"}


def read_recipe(path: Path) -> dict[str, Any]:
    """The recipe in a .yaml file.

    Raises:
        ValueError: no recipe; the message names what is wrong with it.
    """
    recipe = read_options(path)
    if not NEEDED <= set(recipe) <= NEEDED | OPTIONAL:
        wanted = f"{', '.join(sorted(NEEDED))} and perhaps {', '.join(sorted(OPTIONAL))}"
        raise ValueError(f"{path}: a recipe has {wanted}; got {', '.join(map(str, recipe))}.")
    if not re.fullmatch(r"run_\w+\.py", str(recipe["script"])) or not (SCRIPTS / recipe["script"]).is_file():
        raise ValueError(f"{path}: `script`={recipe['script']!r} is no script of {SCRIPTS.name}.")
    for name in ("paths", "options"):
        if not isinstance(recipe[name], dict):
            raise ValueError(f"{path}: `{name}` holds `name: value` pairs; got {recipe[name]!r:.80}.")
    if "config" in recipe:
        recipe["options"] = read_options(path.parent / str(recipe.pop("config"))) | recipe["options"]
    return recipe


def place(value: Any, paths: Mapping[str, Path]) -> Any:
    """A value of a recipe in which `{name}` is replaced by that path, also in lists and objects."""
    return _in_texts(
        value, lambda text: reduce(lambda one, name: one.replace(f"{{{name}}}", str(paths[name])), paths, text)
    )


def lift(value: Any, paths: Mapping[str, Path]) -> Any:
    """The reverse of `place`: results name no folders of the machine that made them."""
    # Longest first: a folder may lie in another.
    names = sorted(paths, key=lambda name: -len(str(paths[name])))

    def lifted(text: str) -> str:
        for name in names:
            text = re.sub(re.escape(str(paths[name])) + r"(?!\w)", f"{{{name}}}", text)
        return text

    return _in_texts(value, lifted)


def _in_texts(value: Any, change: Callable[[str], str]) -> Any:
    if isinstance(value, dict):
        return {_in_texts(key, change): _in_texts(one, change) for key, one in value.items()}
    if isinstance(value, list):
        return [_in_texts(one, change) for one in value]
    return change(value) if isinstance(value, str) else value


def given_paths(words: list[str], recipe: Mapping[str, Any]) -> dict[str, Path]:
    """`name=path` words as the paths of a recipe.

    Raises:
        ValueError: a name that the recipe lacks, one that is not given, or a path that is not there.
    """
    given = {}
    for word in words:
        name, separator, path = word.partition("=")
        if not separator or name not in recipe["paths"]:
            raise ValueError(f"`path`={word!r} must be name=path, with one of {', '.join(recipe['paths'])}.")
        given[name] = Path(path).absolute()
        if not given[name].exists():
            raise ValueError(f"`path`={word!r}: there is no {path!r}.")
    for name, meaning in recipe["paths"].items():
        if name not in given:
            raise ValueError(f"`path` lacks {name}=…: {meaning}.")
    return given


def build(recipe_file: Path, words: list[str], output: Path) -> dict[str, Path]:
    """Runs a recipe's script.

    Args:
        words: `name=path` for each path of the recipe.
        output: folder of the model.

    Returns:
        The paths that stand in its card and results by name, beside the output.

    Raises:
        ValueError: no recipe, or paths that it does not take.
        subprocess.CalledProcessError: the script failed; it has said why.
    """
    recipe = read_recipe(recipe_file)
    paths = given_paths(words, recipe)
    options = place(recipe["options"], paths) | {"output_dir": str(output)}
    output.parent.mkdir(parents=True, exist_ok=True)
    # Beside the folder: some scripts want it empty.
    placed = output.with_name(f"{output.name}.json")
    write_text(placed, json.dumps(options, indent=1))
    subprocess.run([sys.executable, str(SCRIPTS / recipe["script"]), str(placed)], check=True)
    return paths


def publish(output: Path, cards: Path, paths: Mapping[str, Path]) -> list[Path]:
    """Copies card, its picture and the results of a finished run to the zoo; returns the files."""
    name = output.name
    # What a reader of the card has is a run of their own.
    paths = {**paths, "output": output}
    texts = [
        read_json(output / "results.json", "These are the figures of a card."),
        (output / "README.md").read_text("utf-8"),
    ]
    results, card = place(lift(texts, paths), {"output": Path("runs", name)})
    files = [cards / f"{name}.json", cards / f"{name}.md"]
    cards.mkdir(parents=True, exist_ok=True)
    for picture in re.findall(r"\]\((\w+\.png)\)", card):
        files.append(cards / f"{name}.png")
        card = card.replace(f"]({picture})", f"]({files[-1].name})")
        shutil.copyfile(output / picture, files[-1])
    write_text(files[0], json.dumps(results, ensure_ascii=False, separators=(",", ":")) + "\n")
    write_text(files[1], card)
    return files


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path, help="recipe of an entry")
    parser.add_argument("--path", nargs="*", default=[], metavar="NAME=PATH", help="the paths that the recipe names")
    parser.add_argument("--output", type=Path, required=True, help="folder that the model's folder comes to lie in")
    parser.add_argument("--cards", type=Path, help="folder that card and results are copied to, such as model_cards")
    args = parser.parse_args(argv)
    output = args.output.absolute() / args.recipe.stem
    try:
        paths = build(args.recipe, args.path, output)
    except ValueError as error:
        parser.error(str(error))
    except subprocess.CalledProcessError as error:
        sys.exit(error.returncode)
    if args.cards is not None:
        for path in publish(output, args.cards, paths):
            print(path)


if __name__ == "__main__":
    main()
