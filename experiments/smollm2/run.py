"""Train and evaluate arms × seeds on SmolLM2-135M; what exists already is not done again.

    python experiments/smollm2/run.py MODEL TEXTS OUT --arms gateskip control random --seeds 0 1 2
    python experiments/smollm2/run.py MODEL TEXTS OUT --recipe lora32 --on dev --seeds 0

MODEL is a SmolLM2 folder or name, TEXTS what ``texts.py`` wrote. Under OUT: ``<fit>/`` the gates an
arm begins with, ``<recipe>_<arm>_s<seed>/`` what was trained, beside it ``….<data>.json`` from
``gateskip eval``. Stop it at any time and run it again: trainings go on from their checkpoint.
``benchmarks/quality.py`` joins the results.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

TRAIN = {
    "--steps": "60", "--batch-size": "8", "--max-length": "384", "--lora-rank": "8",
    "--learning-rate": "2e-3", "--compensation-learning-rate": "1e-3", "--budget": "0.5",
    "--schedule": "sampled", "--save-every": "15", "--dtype": "bfloat16",
}  # fmt: skip
FIT = {"--kind": "scalar", "--dtype": "bfloat16"}
#: What a recipe changes: (options of ``gateskip fit``, options of ``gateskip train``).
RECIPES: dict[str, tuple[dict[str, str], dict[str, str]]] = {
    "base": ({}, {}),
    "compensation128": ({"--compensation-rank": "128"}, {}),
    "compensation_none": ({"--compensation": "none"}, {}),
    "compensation_fast": ({}, {"--compensation-learning-rate": "4e-3"}),
    "lora32": ({}, {"--lora-rank": "32"}),
    "distill": ({}, {"--distill": "0.5"}),
    "low_rank": ({"--kind": "low_rank"}, {}),
    "trained_gates": ({}, {"--train-gates": "", "--gate-learning-rate": "1e-3"}),
    "low_budgets": ({}, {"--budget": "0.4"}),
    "rate4": ({}, {"--learning-rate": "4e-3"}),
    "itself": ({}, {"--distill": "0.5", "--teacher": "itself"}),
    "vector": ({"--kind": "vector"}, {}),
    "low_rank4": ({"--kind": "low_rank", "--rank": "4"}, {}),
    "low_rank64": ({"--kind": "low_rank", "--rank": "64"}, {}),
    "previous": ({"--kv-source": "previous"}, {}),
    "head": ({"--importance": "head"}, {}),
    "head_trained_gates": (
        {"--importance": "head", "--kind": "low_rank"},
        {"--train-gates": "", "--gate-learning-rate": "1e-3"},
    ),
    "penalty": (
        {"--importance": "head"},
        {"--train-gates": "", "--gate-learning-rate": "1e-3", "--penalty": "0.1"},
    ),
    "decisions": (
        {"--importance": "head"},
        {
            "--train-gates": "",
            "--gate-learning-rate": "1e-4",
            "--decision-gradient": "0.5",
            "--cost-weight": "1",
        },
    ),
    "decisions_free": (
        {"--importance": "head"},
        {
            "--train-gates": "",
            "--gate-learning-rate": "1e-4",
            "--decision-gradient": "0.5",
            "--cost-weight": "0.1",
        },
    ),
    "frozen": ({}, {"--backbone": "frozen"}),
    # bfloat16 weights lose updates as small as these: float32 ones, under autocast.
    "full": ({}, {"--backbone": "full", "--learning-rate": "1e-4", "--dtype": "auto"}),
    "compensation_fixed": ({}, {"--fixed-compensation": ""}),
    "linear": ({}, {"--schedule": "linear"}),
    "at_75": ({}, {"--schedule": "linear", "--budget": "0.75", "--budget-start": "0.75"}),
    "calibrate15": ({}, {"--calibrate-every": "15"}),
    "steps120": ({}, {"--steps": "120", "--save-every": "30"}),
    "steps240": ({}, {"--steps": "240", "--save-every": "30"}),
}
#: Parts of the options that a control has no use for.
GATED = ("gate", "distill", "teacher", "penalty", "decision", "cost-weight")
COMPUTE = ("1.0", "0.9", "0.85", "0.75", "0.5")
SETS: dict[str, tuple[tuple[str, str], ...]] = {
    "dev": (("dev_gsm8k", "6000"), ("dev_wikitext2", "6000")),
    "test": (("gsm8k_test", "15000"), ("wikitext2_test", "15000")),
}


def gateskip(*args: str) -> None:
    """Run one command of the library; its failure is ours."""
    print("gateskip", *args, flush=True)
    program = "import sys; from gateskip.cli.main import main; sys.exit(main())"
    subprocess.run([sys.executable, "-c", program, *args], check=True)


def listed(options: dict[str, str]) -> list[str]:
    """Options as command line arguments; a flag has an empty value."""
    return [part for pair in options.items() for part in pair if part]


def fitted(args: argparse.Namespace, recipe: str, arm: str) -> Path:
    """The closed-form gates that an arm begins with, fitted on the training text."""
    options = RECIPES[recipe][0]
    changes = "_".join(value for value in options.values())
    out: Path = args.out / ("fit" + (f"_{changes}" if changes else ""))
    if arm != "random" and not (out / "gateskip_config.json").is_file():
        gateskip(
            "fit", args.model, "--data", str(args.texts / "mix.jsonl"), "--calibration-data",
            str(args.texts / "cal.jsonl"), "--out", str(out), *listed(FIT | options),
            "--max-tokens", str(args.fit_tokens), "--overwrite",
        )  # fmt: skip
    return out


def train(args: argparse.Namespace, recipe: str, arm: str, seed: int) -> Path:
    """One training, or the rest of it."""
    out: Path = args.out / f"{recipe}_{arm}_s{seed}"
    if (out / "gateskip_config.json").is_file():
        return out
    options = TRAIN | RECIPES[recipe][1]
    if args.steps is not None:
        options["--steps"] = str(args.steps)
    if arm == "control":
        options = {k: v for k, v in options.items() if not any(part in k for part in GATED)}
    begin = ["--gates", str(fitted(args, recipe, arm))] if arm != "random" else ["--kind", "scalar"]
    begun = (out / "start" / "gateskip_config.json").is_file()
    gateskip(
        "train", args.model, "--data", str(args.texts / "mix.jsonl"), "--calibration-data",
        str(args.texts / "cal.jsonl"), "--out", str(out), "--arm", arm, "--seed", str(seed),
        *begin, *listed(options), "--resume" if begun else "--overwrite",
    )  # fmt: skip
    return out


def main() -> None:
    """All arms of a recipe, seed by seed."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model")
    parser.add_argument("texts", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--recipe", choices=sorted(RECIPES), default="base")
    parser.add_argument("--arms", nargs="+", default=["gateskip"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--steps", type=int, help="instead of the recipe's, for quick probes")
    parser.add_argument("--fit-tokens", type=int, default=30_000)
    parser.add_argument("--eval-tokens", type=int, help="per text, instead of the set's")
    parser.add_argument("--on", choices=sorted(SETS), default="test")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    for seed in args.seeds:
        for arm in args.arms:
            out = train(args, args.recipe, arm, seed)
            for name, tokens in SETS[args.on]:
                result = out.with_name(f"{out.name}.{name}.json")
                if result.is_file():
                    continue
                budgets = [part for c in COMPUTE for part in ("--compute", c)]
                gateskip(
                    "eval", str(out), "--base", args.model, "--data",
                    str(args.texts / f"{name}.jsonl"), "--seed", str(seed), "--dtype", "bfloat16",
                    "--max-length", "512", "--max-tokens", str(args.eval_tokens or tokens),
                    *(["--arm", "control"] if arm == "control" else budgets),
                    "--json", str(result),
                )  # fmt: skip


if __name__ == "__main__":
    main()
