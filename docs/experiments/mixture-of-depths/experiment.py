"""Tokens that pass layers by: python docs/experiments/mixture-of-depths/experiment.py [run|report]"""

from __future__ import annotations

import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
from experiments import RUNS, command_line, lines, mean, read_csv, run_all, write_csv  # noqa: E402

SEEDS = (1, 2)
TOKENS, MORE_TOKENS = 600 * 2048, 300 * 2048
LAYERS = {f"{layers} layers": [f"model.num_layers={layers}"] for layers in (6, 4, 3)}
GATED = {
    f"gate {gate}, alpha {coef:g}": [f"model.depth.initial_gate={gate}", f"model.depth.coef={coef}"]
    for gate, coef in ((0.5, 0.01), (0.9, 0.0), (0.9, 0.01), (0.9, 0.1), (0.9, 1.0))
}
CONVERTED = {
    "6 layers, goes on": [],
    **{
        f"converted, gate {gate}, alpha {coef:g}": [f"model.depth.initial_gate={gate}", f"model.depth.coef={coef}"]
        for gate in (0.5, 0.9)
        for coef in (0.01, 0.3)
    },
}
"""Variant -> what it sets in run.yaml."""


def folder(variant: str, seed: int) -> str:
    return f"mixture-of-depths/{variant.replace(', ', '-').replace(' ', '-')}-seed-{seed}"


def run() -> None:
    for seed in SEEDS:
        common = [f"training.seed={seed}"]
        scratch = {folder(variant, seed): [*common, *keys] for variant, keys in {**LAYERS, **GATED}.items()}
        run_all(scratch, HERE / "run.yaml", TOKENS, seed)
        trained = RUNS / folder("6 layers", seed)
        common += [f"checkpoint.initialize_from={trained}", "optimizer.lr=1.0e-3", "schedule.min_lr_ratio=0.3"]
        converted = {folder(variant, seed): [*common, *keys] for variant, keys in CONVERTED.items()}
        run_all(converted, HERE / "run.yaml", MORE_TOKENS, 100 + seed)


def report() -> None:
    from moe_train.config import load_run

    rows = []
    for variant in (*LAYERS, *GATED, *CONVERTED):
        for seed in SEEDS:
            model = load_run(RUNS / folder(variant, seed) / "config.yaml", with_mixture=False).model
            recent: list[dict] = []
            for line in lines(folder(variant, seed)):
                recent = [*recent[-99:], line]
                if line["step"] % 20 and "validation/code" not in line:
                    continue
                depths = [each["depths"] for each in recent[-20:] if "depths" in each]
                through = {n: mean(each[f"layers.{n}"]["through"] for each in depths) for n in (1, 3, 5) if depths}
                held_out = [value for name, value in line.items() if name.startswith("validation/")]
                rows.append(
                    {
                        "variant": variant,
                        "seed": seed,
                        "step": line["step"],
                        "loss": mean(each["loss"] for each in recent[-20:]),
                        "through": mean(each.get("depth", 1.0) for each in recent[-20:]),
                        **{f"through_{n}": through.get(n, "") for n in (1, 3, 5)},
                        "operations": model.flops_per_token(128, list(through.values())),
                        "held_out": mean(held_out) if held_out else "",
                    }
                )
    write_csv(HERE / "data.csv", rows)
    rows = read_csv(HERE / "data.csv")
    for variant in (*LAYERS, *GATED, *CONVERTED):
        ended = [row for row in rows if row["variant"] == variant and row["held_out"] != ""]
        losses = [row["held_out"] for row in ended]
        layers = ", ".join(
            f"{mean(row[f'through_{n}'] for row in ended):.2f}" for n in (1, 3, 5) if ended[0]["through_1"] != ""
        )
        operations = mean(row["operations"] for row in ended) / rows[0]["operations"]
        print(
            f"| {variant} | {mean(losses):.3f} ({min(losses):.3f} to {max(losses):.3f}) | {layers} | {operations:.2f} |"
        )
    draw(rows)


def draw(rows: list[dict]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.5), constrained_layout=True)
    whole = rows[0]["operations"]
    for group, colour, label in (
        (LAYERS, "grey", "fewer layers"),
        (GATED, "C0", "gated"),
        (CONVERTED, "C1", "goes on, gated or not"),
    ):
        ended = [row for row in rows if row["variant"] in group and row["held_out"] != ""]
        left.plot(
            [row["operations"] / whole for row in ended],
            [row["held_out"] for row in ended],
            "o",
            color=colour,
            label=label,
        )
    left.set(title="held-out loss", xlabel="operations of a token / those of 6 layers")
    left.legend()
    for variant in (*GATED, *list(CONVERTED)[1:]):
        mine = [row for row in rows if row["variant"] == variant and row["seed"] == SEEDS[0]]
        style = "-" if variant in GATED else "--"
        right.plot([row["step"] for row in mine], [row["through"] for row in mine], style, label=variant)
    right.set(title="part of the tokens that go through, seed 1", xlabel="step")
    right.legend(fontsize=7)
    figure.savefig(HERE / "figure.png", dpi=90)


if __name__ == "__main__":
    {"run": run, "report": report}[command_line().parse_args().do]()
