"""Gating-logit normalisation on and off: python docs/experiments/router-normalisation/experiment.py [run|report]"""

from __future__ import annotations

import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
from experiments import command_line, lines, mean, read_csv, run_all, write_csv  # noqa: E402

VARIANTS = {
    "without": [],
    "lambda 0.5": ["model.router.normalize_logits=true", "model.router.logit_scale=0.5"],
    "lambda 1": ["model.router.normalize_logits=true"],
    "lambda 2": ["model.router.normalize_logits=true", "model.router.logit_scale=2"],
}
SEEDS = (1, 2)
TOKENS = 600 * 2048
FIGURES = {
    "loss": "loss",
    "max1_over_max2": "Max1/Max2",
    "max2_over_max3": "Max2/Max3",
    "drop_rate": "drop rate (capacity factor 1.25)",
}


def folder(variant: str, seed: int) -> str:
    return f"router-normalisation/{variant.replace(' ', '-')}-seed-{seed}"


def run() -> None:
    runs = {folder(v, seed): [*values, f"training.seed={seed}"] for seed in SEEDS for v, values in VARIANTS.items()}
    run_all(runs, HERE / "run.yaml", TOKENS)


def report() -> None:
    rows = []
    for variant in VARIANTS:
        for seed in SEEDS:
            recent: list[float] = []
            for line in lines(folder(variant, seed)):
                recent.append(line["loss"])
                if line["step"] % 20 == 0:
                    routers = line["routers"].values()
                    figures = {name: mean(router[name] for router in routers) for name in list(FIGURES)[1:]}
                    rows.append(
                        {"variant": variant, "seed": seed, "step": line["step"], "loss": mean(recent[-20:]), **figures}
                    )
            final = [value for name, value in line.items() if name.startswith("validation/")]
            print(
                f"{variant} seed {seed}: last 100 steps {mean(recent[-100:]):.4f}, held-out "
                f"{mean(final) if final else float('nan'):.4f}"
            )
    write_csv(HERE / "data.csv", rows)
    draw(read_csv(HERE / "data.csv"))


def draw(rows: list[dict]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(2, 2, figsize=(10, 7), constrained_layout=True)
    for axis, (name, title) in zip(axes.flat, FIGURES.items()):
        for colour, variant in enumerate(VARIANTS):
            of_variant = [row for row in rows if row["variant"] == variant]
            steps = sorted({row["step"] for row in of_variant})
            values = [mean(row[name] for row in of_variant if row["step"] == step) for step in steps]
            axis.plot(steps, values, color=f"C{colour}", label=variant)
        axis.set(title=title, xlabel="step")
        if name == "loss":
            axis.set_ylim(min(row["loss"] for row in rows) - 0.05, 5.0)
            axis.legend()
    figure.savefig(HERE / "figure.png", dpi=90)


if __name__ == "__main__":
    {"run": run, "report": report}[command_line().parse_args().do]()
