# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Tables over seeds from the results.json files that examples/run_glue_cee.py writes.

    python benchmarks/summarize_glue.py runs/sst2-* runs/trec-* --output docs/results/glue.md

Per corpus: the metric of each exit criterion at matched depths (mean ± standard deviation over seeds), the model's own
threshold, full depth and the oracle. Thresholds are picked on dev, figures come from test; all criteria share one
model per seed.
"""

import argparse
import json
from collections import defaultdict
from pathlib import Path

from transformers_cee.evaluation.report import markdown_table, method_name, spread
from transformers_cee.files import write_text


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path, help="output folders of run_glue_cee.py")
    parser.add_argument("--output", type=Path, help="Markdown file; without it the tables are only printed")
    return parser.parse_args()


def summarize(runs: list[dict]) -> str:
    """Section of one corpus."""
    first = runs[0]
    metric, layers = first["corpus"]["metrics"][0], len(first["comparisons"]["test"]["exits"])
    tests = [run["comparisons"]["test"] for run in runs]
    depths = list(tests[0]["matched"]["policy"])
    rows = [
        [method_name(name), *(spread([test["matched"][name][depth] for test in tests]) for depth in depths)]
        for name in tests[0]["matched"]
    ]
    seeds = [run["arguments"]["seed"] for run in runs]
    own = [point for test in tests for point in test["curves"]["policy"] if point["exit_threshold"] == 0.5]
    half = [
        point["wall_clock_speedup"] / point["layer_speedup"]
        for run in runs
        for size in run["executed"].values()
        for point in size
        if point["criterion"] == "policy"
        and layers * 0.4 <= point["depth"] <= layers * 0.6
        and point["wall_clock_speedup"] is not None  # noise
    ]
    lines = [
        f"## {first['corpus']['name']}",
        f"Rows: {first['corpus']['splits']}. Seeds: {seeds}. {' '.join(first['corpus']['notes'])}",
        markdown_table([f"{metric} in % at depth (of {layers})", *depths], rows),
        f"Full depth {spread([test['full']['metrics'][metric] for test in tests])}; oracle "
        f"{spread([test['oracle']['metrics'][metric] for test in tests])} at depth "
        f"{spread([test['oracle']['depth'] for test in tests], scale=1.0)}; ConsistentEE at its own threshold of 0.5: "
        f"{spread([point['metrics'][metric] for point in own])} at depth "
        f"{spread([point['depth'] for point in own], scale=1.0)}.",
    ]
    exits = zip(*(test["exits"] for test in tests), strict=True)
    by_exit = [spread([point["metrics"][metric] for point in points]) for points in exits]
    lines.append(f"All rows at one exit, 1 to {layers}: {', '.join(by_exit)}.")
    if half:
        lines.append(
            f"Wall-clock over layer speed-up near half depth, executed: {spread(half, digits=2, scale=1.0)} "
            f"({len(half)} points)."
        )
    return "\n\n".join(lines)


def main() -> None:
    args = parse_arguments()
    corpora = defaultdict(list)
    for folder in sorted(args.folders):
        run = json.loads((folder / "results.json").read_text(encoding="utf-8"))
        corpora[run["corpus"]["name"]].append(run)
    text = "\n\n".join(summarize(runs) for runs in corpora.values()) + "\n"
    print(text)
    if args.output is not None:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        write_text(args.output, text)


if __name__ == "__main__":
    main()
