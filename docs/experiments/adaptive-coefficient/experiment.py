"""Adaptive against fixed coefficients of the load-balancing loss: python
docs/experiments/adaptive-coefficient/experiment.py [run|report]"""

from __future__ import annotations

import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
from experiments import command_line, lines, mean, read_csv, run_all, write_csv  # noqa: E402

VARIANTS = {
    "none": ["model.router.load_balancing_coef=0.0"],
    "fixed 0.001": ["model.router.load_balancing_coef=0.001"],
    "fixed 0.01": ["model.router.load_balancing_coef=0.01"],
    "adaptive": ["model.router.adaptive.xi=0.2"],
    "fixed 1": ["model.router.load_balancing_coef=1.0"],
    "adaptive up to 1": [
        "model.router.load_balancing_coef=1.0",
        "model.router.adaptive.max_coef=1.0",
        "model.router.adaptive.xi=20.0",
    ],
}
LAYERS = 4
TOKENS = 600 * 2048


def folder(variant: str) -> str:
    return f"adaptive-coefficient/{variant.replace(' ', '-')}"


def run() -> None:
    run_all({folder(variant): values for variant, values in VARIANTS.items()}, HERE / "run.yaml", TOKENS)


def report() -> None:
    rows = []
    for variant, values in VARIANTS.items():
        fixed = float(values[0].split("=")[1]) if "coef" in values[0] else 0.01
        recent: list[float] = []
        for line in lines(folder(variant)):
            recent.append(line["loss"])
            if line["step"] % 20 == 0:
                row = {"variant": variant, "step": line["step"], "loss": mean(recent[-20:])}
                for layer in range(LAYERS):
                    router = line["routers"][f"layers.{layer}.mlp"]
                    row[f"drop_rate_{layer}"] = router["drop_rate"]
                    row[f"coef_{layer}"] = router.get("load_balancing_coef", fixed)
                rows.append(row)
        held_out = [value for name, value in line.items() if name.startswith("validation/")]
        drops = mean(rows[-1][f"drop_rate_{layer}"] for layer in range(LAYERS))
        print(
            f"{variant}: last 100 steps {mean(recent[-100:]):.4f}, held-out {mean(held_out):.4f}, drop rate {drops:.3f}"
        )
    write_csv(HERE / "data.csv", rows)
    draw(read_csv(HERE / "data.csv"))


def draw(rows: list[dict]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(2, 2, figsize=(10, 7), constrained_layout=True)
    for colour, variant in enumerate(VARIANTS):
        mine = [row for row in rows if row["variant"] == variant]
        steps = [row["step"] for row in mine]
        axes[0, 0].plot(steps, [row["loss"] for row in mine], color=f"C{colour}", label=variant)
        axes[0, 1].plot(
            steps,
            [mean(row[f"drop_rate_{i}"] for i in range(LAYERS)) for row in mine],
            color=f"C{colour}",
            label=variant,
        )
    for axis, variant in ((axes[1, 0], "adaptive"), (axes[1, 1], "adaptive up to 1")):
        mine = [row for row in rows if row["variant"] == variant]
        for layer in range(LAYERS):
            axis.plot([row["step"] for row in mine], [row[f"coef_{layer}"] for row in mine], label=f"layer {layer}")
        axis.set(title=f"coefficient, {variant}", xlabel="step")
        axis.legend()
    axes[0, 0].set(title="loss", ylim=(min(row["loss"] for row in rows) - 0.05, 5.0))
    axes[0, 1].set(title="drop rate, mean of the layers")
    axes[0, 0].legend()
    figure.savefig(HERE / "figure.png", dpi=90)


if __name__ == "__main__":
    {"run": run, "report": report}[command_line().parse_args().do]()
