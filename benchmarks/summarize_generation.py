# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Table from the results.json that examples/run_clm_cee.py writes, also from one that is not complete yet. Speeds are
medians over rounds of the ratio to full depth in the same run; noise is called so.

python benchmarks/summarize_generation.py runs/alpaca --metrics agreement identical rougeL perplexity
"""

import argparse
import json
from pathlib import Path

from transformers_cee.evaluation.report import markdown_table, method_name
from transformers_cee.evaluation.speeds import Speed


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="output folder of run_clm_cee.py")
    parser.add_argument("--metrics", nargs="+", default=["agreement", "identical", "rougeL", "perplexity"])
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    results = json.loads((args.folder / "results.json").read_text(encoding="utf-8"))
    points = [results["full"], *(point for curve in results["curves"].values() for point in curve)]
    sizes = list(dict.fromkeys(size for point in points for size in point["speeds"]))
    header = [
        "criterion",
        "threshold",
        "depth",
        "layer speed-up",
        *(f"tokens/s over full, batch {size}" for size in sizes),
    ]
    rows = []
    for point in points:
        speeds = [point["speeds"].get(size) for size in sizes]
        rows.append(
            [
                method_name(point["criterion"]),
                f"{point['exit_threshold']:.4g}",
                f"{point['depth']:.1f}",
                f"{point['layer_speedup']:.2f}x",
                *("-" if speed is None else Speed(**speed).figure("speedup").text() for speed in speeds),
                *(f"{point['metrics'][name]:.3f}" for name in args.metrics),
            ]
        )
    print(markdown_table([*header, *args.metrics], rows))
    print(f"\n{results['timing']} {' '.join(results['corpus']['notes'])}")


if __name__ == "__main__":
    main()
