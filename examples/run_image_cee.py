# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Exits for images under a budget: EERO in its own setting, beside a learned policy and confidence.

    apt-get download dataset-fashion-mnist && dpkg-deb -x dataset-fashion-mnist_*.deb runs/assets
    python examples/run_image_cee.py examples/configs/fashion_mnist.yaml

A small ResNet or ConvNeXt is trained from scratch, backbone and exits together (phase `heads`), then its policies on
stored states. Exits stand behind blocks; a head is linear on the mean of the map. On dev, thresholds are fitted that
keep the mean FLOPs of an image within shares of full depth; the test images say what each way reaches, and what it
used. Data are the four IDX files of MNIST and its likes, or CIFAR-10, CIFAR-100 and a folder of images by torchvision
(`--dataset cifar10 --data_dir DIR`).
"""

from __future__ import annotations

import gzip
import logging
import struct
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import parse_dataclasses
from scipy.optimize import brentq
from torch import Tensor
from torch.utils.data import Dataset
from transformers import set_seed

from transformers_cee import (
    ConsistentEETrainer,
    ConsistentEETrainingArguments,
    ConvNextCeeConfig,
    ConvNextForConsistentEE,
    ResNetCeeConfig,
    ResNetForConsistentEE,
    calibrate_budget,
    score_store,
)
from transformers_cee.calibration.budget import conditional_thresholds
from transformers_cee.calibration.scores import ExitScores
from transformers_cee.evaluation.costs import exit_costs
from transformers_cee.evaluation.operating_points import OperatingPoint
from transformers_cee.evaluation.plots import curve_style, draw_curve, new_figure, save_figure
from transformers_cee.evaluation.report import markdown_table, write_results
from transformers_cee.exits.deciding import criterion_settings
from transformers_cee.files import write_text
from transformers_cee.hub.model_card import EarlyExitCard
from transformers_cee.stores.scoring import exits_taken
from transformers_cee.stores.store import ExitStore


logger = logging.getLogger("run_image_cee")

MODELS: dict[str, tuple[type, type]] = {
    "resnet": (ResNetCeeConfig, ResNetForConsistentEE),
    "convnext": (ConvNextCeeConfig, ConvNextForConsistentEE),
}
DATASETS = ("idx", "cifar10", "cifar100", "folder")
FULL = "full depth"
CARD_ARGUMENTS = (
    "phases",
    "heads_objective",
    "learning_rate",
    "num_train_epochs",
    "per_device_train_batch_size",
    "policy_num_train_epochs",
)
IDX_NAMES = {"train": "train", "test": "t10k"}


@dataclass
class ImageArguments:
    """Data, backbone, exits and budgets."""

    data_dir: Path = field(metadata={"help": "Folder of the data."})
    data_name: str | None = field(
        default=None, metadata={"help": "What the card calls the data. Default: the folder."}
    )
    data_license: str | None = field(default=None, metadata={"help": "Licence of the data for the card."})
    dataset: str = field(default="idx", metadata={"help": "idx, or by torchvision cifar10, cifar100 or folder."})
    model: str = field(default="resnet", metadata={"help": "resnet or convnext."})
    hidden_sizes: list[int] = field(default_factory=lambda: [32, 64, 128, 256], metadata={"help": "Of the stages."})
    depths: list[int] = field(default_factory=lambda: [2, 2, 2, 2], metadata={"help": "Blocks of the stages."})
    exit_layers: list[int] = field(default_factory=lambda: [2, 4, 6], metadata={"help": "Blocks that end in an exit."})
    budgets: list[float] = field(
        default_factory=lambda: [0.5, 0.6, 0.7, 0.8, 0.9],
        metadata={"help": "Accepted mean FLOPs of an image, as shares of full depth."},
    )
    dev_rows: int = field(default=5000, metadata={"help": "Training images kept for thresholds."})
    max_train_rows: int | None = field(default=None, metadata={"help": "Fewer training images, for a quick look."})

    def __post_init__(self) -> None:
        if self.model not in MODELS:
            raise ValueError(f"`model`={self.model!r} must be one of {', '.join(MODELS)}.")
        if self.dataset not in DATASETS:
            raise ValueError(f"`dataset`={self.dataset!r} must be one of {', '.join(DATASETS)}.")
        if not all(0 < budget < 1 for budget in self.budgets):
            raise ValueError(f"`budgets`={self.budgets} must be shares between 0 and 1.")
        if not self.data_dir.is_dir():
            raise ValueError(f"`data_dir`={str(self.data_dir)!r}: there is no such folder.")


class Images(Dataset):
    """Images as a model takes them, as tensors in memory.

    Args:
        pixels (`ByteTensor` of shape `(images, channels, height, width)`): grey values.
        labels (`LongTensor` of shape `(images,)`): classes.
        mean, spread (`Tensor` of shape `(channels, 1, 1)`): of training images.
    """

    def __init__(self, pixels: Tensor, labels: Tensor, mean: Tensor, spread: Tensor) -> None:
        self.pixels, self.labels, self.mean, self.spread = pixels, labels, mean, spread

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {
            "pixel_values": (self.pixels[index].float() / 255 - self.mean) / self.spread, "labels": self.labels[index]
        }  # fmt: skip


def read_idx(path: Path) -> np.ndarray:
    """An array of unsigned bytes in the format of MNIST, gzipped or not.

    Raises:
        ValueError: the file is no such array, or shorter than it says.
    """
    opened = gzip.open(path) if path.suffix == ".gz" else path.open("rb")
    with opened as file:
        zeros, kind, dimensions = struct.unpack(">HBB", file.read(4))
        if zeros or kind != 8 or not 1 <= dimensions <= 3:
            raise ValueError(f"{path} is no IDX file of unsigned bytes.")
        shape = struct.unpack(f">{dimensions}I", file.read(4 * dimensions))
        content = file.read()
    if len(content) != int(np.prod(shape)):
        raise ValueError(f"{path} holds {len(content)} bytes; its head promises {int(np.prod(shape))}.")
    return np.frombuffer(content, np.uint8).reshape(shape)


def read_split(args: ImageArguments, split: str) -> tuple[Tensor, Tensor]:
    """Grey values (images, channels, height, width) and labels (images,)."""
    if args.dataset == "idx":
        arrays = []
        for kind in ("images-idx3", "labels-idx1"):
            found = sorted(args.data_dir.glob(f"{IDX_NAMES[split]}-{kind}-ubyte*"))
            if not found:
                raise ValueError(f"{args.data_dir} holds no {IDX_NAMES[split]}-{kind}-ubyte or …-ubyte.gz.")
            arrays.append(torch.from_numpy(read_idx(found[0]).copy()))
        return arrays[0].unsqueeze(1), arrays[1].long()
    from torchvision import datasets

    if args.dataset != "folder":
        made = getattr(datasets, args.dataset.upper())(str(args.data_dir), train=split == "train")
        return torch.from_numpy(made.data).permute(0, 3, 1, 2), torch.tensor(made.targets)
    made = datasets.ImageFolder(str(args.data_dir / split))
    pixels = torch.stack([torch.from_numpy(np.asarray(image).copy()) for image, _ in made])
    return pixels.permute(0, 3, 1, 2), torch.tensor(made.targets)


def read_data(args: ImageArguments, seed: int) -> dict[str, Images]:
    """Images of train, dev (kept from train) and test."""
    pixels, labels = read_split(args, "train")
    order = torch.randperm(len(pixels), generator=torch.Generator().manual_seed(seed))
    dev, train = order[: args.dev_rows], order[args.dev_rows :][: args.max_train_rows]
    if not len(train):
        raise ValueError(f"`dev_rows`={args.dev_rows} leave no training images of {len(pixels)}.")
    values = pixels[train].float() / 255
    mean, spread = (part.view(-1, 1, 1) for part in (values.mean((0, 2, 3)), values.std((0, 2, 3)).clamp_min(1e-6)))
    parts = {
        "train": (pixels[train], labels[train]),
        "dev": (pixels[dev], labels[dev]),
        "test": read_split(args, "test"),
    }
    return {name: Images(*part, mean, spread) for name, part in parts.items()}


def make_model(args: ImageArguments, data: Images) -> Any:
    """A network from scratch for images of this size."""
    config_class, model_class = MODELS[args.model]
    fields = {
        "num_channels": data.pixels.shape[1],
        "hidden_sizes": args.hidden_sizes,
        "depths": args.depths,
        "num_labels": int(data.labels.max()) + 1,
        "exit_layers": args.exit_layers,
        "exit_threshold": 0.5,
        "policy_inputs": "log_confidence",
        "policy_condition": "film",
    }
    if args.model == "resnet":
        fields |= {"embedding_size": args.hidden_sizes[0], "layer_type": "basic"}
    else:
        fields |= {"num_stages": len(args.depths), "patch_size": 2, "layer_scale_init_value": 1.0, "image_size": 28}
    return model_class(config_class(**fields))


@dataclass
class Way:
    """A way to spend a budget: thresholds of a criterion, from scores on dev.

    Args:
        criterion (`str`): whose scores decide.
        fit (`Callable`): from scores on dev, costs and budget to thresholds, one per exit.
    """

    criterion: str
    fit: Callable[[ExitScores, list[float], float], list[float]]


def mean_cost(criterion: str, thresholds: Any, scores: Tensor, costs: list[float]) -> float:
    return float(torch.tensor(costs, dtype=torch.double)[exits_taken(criterion, thresholds, scores)].mean())


def one_threshold(scores: ExitScores, costs: list[float], budget: float) -> list[float]:
    """The single threshold that uses most of the budget."""
    known = scores.scores[scores.scores.isfinite()].numpy()
    candidates = [float(one) for one in np.quantile(known, np.linspace(0, 1, 513)).clip(0, 1)]
    spent = {one: mean_cost(scores.criterion, one, scores.scores, costs) for one in candidates}
    fits = [one for one in candidates if spent[one] <= budget] or [0.0]
    return [max(fits, key=lambda one: spent.get(one, 0.0))] * len(costs)


def geometric(scores: ExitScores, costs: list[float], budget: float) -> list[float]:
    """Rates that fall or rise by the same factor from exit to exit (MSDNet, Huang et al. 2018)."""
    prices = torch.tensor(costs, dtype=torch.double)

    def rates(log_factor: float) -> Tensor:
        return torch.softmax(log_factor * torch.arange(len(prices), dtype=torch.double), 0)

    found = brentq(lambda one: float(rates(one) @ prices) - budget, -40.0, 40.0)
    return [*conditional_thresholds(scores.oriented, rates(found)).tolist(), 0.0]


def eero(scores: ExitScores, costs: list[float], budget: float, refine: bool) -> list[float]:
    return list(calibrate_budget(scores, budget, costs, unit="flops", refine=refine).thresholds)


WAYS = {
    "EERO as published": Way("max_probability", lambda *given: eero(*given, refine=False)),
    "EERO refined": Way("max_probability", lambda *given: eero(*given, refine=True)),
    "geometric schedule": Way("max_probability", geometric),
    "one threshold": Way("max_probability", one_threshold),
}


Points = list[dict[str, Any]]


def measure(model: Any, stores: dict[str, ExitStore], costs: list[float], budgets: list[float]) -> Points:
    """Accuracy and used share of the FLOPs on test, of every way at every budget; thresholds come from dev."""
    found: Points = []
    for name, way in WAYS.items():
        dev, test = (score_store(stores[split], way.criterion, model) for split in ("dev", "test"))
        for budget in budgets:
            try:
                thresholds = way.fit(dev, costs, budget * costs[-1])
            except ValueError as error:
                logger.warning(f"{name} at {budget:g}: {error}")
                continue
            about = {"way": name, "criterion": way.criterion, "budget": budget, "thresholds": thresholds}
            found.append(about | reached(way.criterion, thresholds, test.scores, stores["test"], costs))
    return found + by_price(model, stores, costs, budgets)


def by_price(model: Any, stores: dict[str, ExitStore], costs: list[float], budgets: list[float]) -> Points:
    """Policies conditioned on the price of a layer, at 0.5 and the price that uses most of the budget on dev."""
    low, high = model.config.policy_alphas
    settings, spent = criterion_settings(model), {}
    for alpha in np.geomspace(low, high, 49).tolist():
        dev = score_store(stores["dev"], "policy", model, replace(settings, alpha=alpha))
        spent[alpha] = mean_cost("policy", 0.5, dev.scores, costs)
    found: Points = []
    for budget in budgets:
        fits = [alpha for alpha, cost in spent.items() if cost <= budget * costs[-1]]
        if not fits:
            logger.warning(f"policy by its price at {budget:g}: no price is within the budget.")
            continue
        alpha = max(fits, key=lambda one: spent[one])
        test = score_store(stores["test"], "policy", model, replace(settings, alpha=alpha))
        about = {"way": "policy by its price", "criterion": "policy", "budget": budget, "alpha": alpha}
        found.append(about | reached("policy", 0.5, test.scores, stores["test"], costs))
    return found


def reached(criterion: str, thresholds: Any, scores: Tensor, store: ExitStore, costs: list[float]) -> dict[str, float]:
    """Accuracy and used share of the FLOPs of a store's rows."""
    exits = exits_taken(criterion, thresholds, scores)
    accuracy = float(store.correct.gather(1, exits.unsqueeze(1)).double().mean())
    depth = float(store.layers[exits].double().mean())
    return {"accuracy": accuracy, "used": mean_cost(criterion, thresholds, scores, costs) / costs[-1], "depth": depth}


def check_executed(model: Any, data: Images, row: dict[str, Any], costs: list[float], rows: int = 1000) -> float:
    """Used share of the FLOPs of some images that really leave: layers behind an exit are not executed."""
    layers, total = model.layer_numbers, []
    with torch.inference_mode():
        for start in range(0, min(rows, len(data)), 100):
            batch = torch.stack([data[number]["pixel_values"] for number in range(start, min(start + 100, len(data)))])
            asked = {"exit_criterion": row["criterion"], "exit_threshold": row["thresholds"]}
            total += [costs[layers.index(layer)] for layer in model(pixel_values=batch, **asked).exit_layers.tolist()]
    return sum(total) / len(total) / costs[-1]


def table(results: dict[str, Any]) -> str:
    rows = [
        [row["way"], f"{row['budget']:.2f}", f"{row['used']:.3f}", f"{row['accuracy']:.4f}"]
        for row in results["points"]
    ]
    exits = ", ".join(
        f"{accuracy:.4f} for {cost:.3f} (block {layer})"
        for layer, accuracy, cost in zip(results["layers"], results["exits"], results["costs"], strict=True)
    )
    header = ["", "budget", "used", "accuracy"]
    return f"Accuracy of each exit alone, and its share of the FLOPs: {exits}.\n\n{markdown_table(header, rows)}\n"


def draw(results: dict[str, Any], path: Path) -> None:
    """Accuracy over the used share, a line for each way."""
    figure, (axis,) = new_figure(1)
    for index, name in enumerate(dict.fromkeys(row["way"] for row in results["points"])):
        points = sorted((row["used"], row["accuracy"]) for row in results["points"] if row["way"] == name)
        draw_curve(axis, points, curve_style(index, name))
    axis.set_xlabel("mean FLOPs of an image, as a share of full depth")
    axis.set_ylabel("accuracy")
    save_figure(figure, axis, path, results["title"])


def card_points(results: dict[str, Any]) -> dict[str, list[OperatingPoint]]:
    """Operating points of every way, and of full depth under its own name."""
    blocks = results["layers"][-1]
    last = {"way": FULL, "thresholds": 1.0, "depth": blocks, "accuracy": results["exits"][-1], "used": 1.0}
    curves: dict[str, list[OperatingPoint]] = {}
    for row in (last, *results["points"]):
        # Policies are at one threshold, and at a price that goes with the budget.
        threshold = row["thresholds"] if "thresholds" in row else f"α = {row['alpha']:.3g}"
        metrics = {"accuracy": row["accuracy"], "FLOPs": row["used"]}
        point = OperatingPoint(
            row["way"], threshold, row["depth"], 1 - row["depth"] / blocks, blocks / row["depth"], metrics=metrics
        )
        curves.setdefault(row["way"], []).append(point)
    return curves


def write_card(results: dict[str, Any], args: ImageArguments, training: ConsistentEETrainingArguments) -> None:
    """README.md of the model folder, from what was measured."""
    curves, rows = card_points(results), results["rows"]
    (full,) = curves.pop(FULL)
    EarlyExitCard(
        model_name=Path(training.output_dir).name,
        repo_id=training.hub_model_id or training.output_dir,
        num_layers=results["layers"][-1],
        dataset_name=args.data_name or args.data_dir.name,
        metric_name="accuracy",
        curves=curves,
        full_depth=full,
        exit_layers=results["layers"],
        base_model=f"A {args.model} of {results['parameters']:,} parameters, trained from scratch",
        data_notes=f"Images: {rows['train']} train, {rows['dev']} dev, taken from train, and {rows['test']} test. "
        "Thresholds come from dev. FLOPs are a share of those at full depth.",
        data_license=args.data_license,
        figure="budgets.png",
        training_arguments={name: getattr(training, name) for name in CARD_ARGUMENTS}
        | {name: getattr(args, name) for name in ("hidden_sizes", "depths", "exit_layers")},
        seeds=[training.seed],
        image_shape=results["image_shape"],
        task="image-classification",
    ).save(training.output_dir)


def main(argv: list[str] | None = None) -> dict[str, Any]:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    args, training = parse_dataclasses(
        (ImageArguments, ConsistentEETrainingArguments), sys.argv[1:] if argv is None else argv, "Exits for images."
    )
    set_seed(training.seed)
    data = read_data(args, training.seed)
    model = make_model(args, data["train"])
    trainer = ConsistentEETrainer(model=model, args=training, train_dataset=data["train"], eval_dataset=data["dev"])
    output = Path(training.output_dir)
    if training.do_train:
        trainer.train(resume_from_checkpoint=training.resume_from_checkpoint)
        trainer.save_model()
    else:
        trainer.model = model = type(model).from_pretrained(output)
    model = model.eval()
    stores = {split: trainer.collect_exits(data[split], split) for split in ("dev", "test")}
    costs = exit_costs(model, data["test"].pixels.shape[-1], "flops")
    results: dict[str, Any] = {
        "model": args.model,
        "parameters": sum(weight.numel() for weight in model.parameters()),
        "layers": model.layer_numbers,
        "costs": [cost / costs[-1] for cost in costs],
        "exits": stores["test"].correct.double().mean(0).tolist(),
        "seed": training.seed,
        "rows": {name: len(part) for name, part in data.items()},
        "points": measure(model, stores, costs, args.budgets),
    }
    middle = next(row for row in results["points"] if row["budget"] == args.budgets[len(args.budgets) // 2])
    results["executed"] = {"way": middle["way"], "used": check_executed(model, data["test"], middle, costs)}
    results["image_shape"] = list(data["test"].pixels.shape[1:])
    results["title"] = f"{args.model}, {len(data['test'])} test images, seed {training.seed}"
    write_results(results, output / "results.json")
    write_text(output / "table.md", table(results))
    print(table(results))
    write_card(results, args, training)
    draw(results, output / "budgets.png")
    return results


if __name__ == "__main__":
    main()
