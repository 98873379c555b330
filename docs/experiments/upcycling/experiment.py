"""Upcycling against training from scratch: python docs/experiments/upcycling/experiment.py [run [SEED...]|report]"""

from __future__ import annotations

import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
from experiments import RUNS, command_line, fork, lines, mean, read_csv, run_all, write_csv  # noqa: E402

SEEDS = (1, 2, 3)
BATCH = 8 * 128
DENSE_TOKENS = 400 * BATCH
BUDGETS = (0.5, 1.0, 2.0, 3.0)
"""Compute of the mixture's training over that of the dense model's."""
PEAK, FLOOR = 3.0e-3, 3.0e-4
"""Learning rates between which the dense model was trained; all schedules end at FLOOR."""
VARIANTS = {"scratch": PEAK, "upcycled, small lr": FLOOR, "upcycled, middle lr": 1.0e-3, "upcycled, large lr": PEAK}


def folder(variant: str, budget: float, seed: int) -> str:
    return f"upcycling/{variant.replace(', ', '-').replace(' ', '-')}-{budget:g}C-seed-{seed}"


def cost_ratio() -> float:
    """Operations of a token of the mixture over those of a token of the dense model."""
    from moe_train.config import load_run

    dense, mixture = (load_run(HERE / name).model for name in ("dense.yaml", "mixture-of-experts.yaml"))
    return mixture.flops_per_token(128) / dense.flops_per_token(128)


def run(seeds: list[int]) -> None:
    import os

    os.environ.update(TOKENS=str(DENSE_TOKENS), ORDER="1")
    ratio = cost_ratio()
    for seed in seeds:
        dense = f"upcycling/dense-seed-{seed}"
        run_all({dense: [f"training.seed={seed}"]}, HERE / "dense.yaml", DENSE_TOKENS, 100 + seed)
        upcycled = RUNS / f"upcycling/upcycled-seed-{seed}"
        if not upcycled.exists():
            fork(
                "checkpoint",
                "upcycle",
                str(RUNS / dense),
                str(upcycled),
                "--experts",
                "8",
                "--top-k",
                "2",
                "--router",
                "normalize_logits=true",
                "--seed",
                str(seed),
            )
        for budget in BUDGETS:
            tokens = round(budget * DENSE_TOKENS / ratio / BATCH) * BATCH
            runs = {}
            for variant, lr in VARIANTS.items():
                start = [] if variant == "scratch" else [f"checkpoint.initialize_from={upcycled}"]
                rate = [f"optimizer.lr={lr}", f"schedule.min_lr_ratio={FLOOR / lr:g}"]
                runs[folder(variant, budget, seed)] = [f"training.seed={seed}", *rate, *start]
            run_all(runs, HERE / "mixture-of-experts.yaml", tokens, seed)


def held_out(name: str) -> float:
    return mean(value for key, value in lines(name)[-1].items() if key.startswith("validation/"))


def report() -> None:
    rows = []
    for seed in SEEDS:
        rows.append(
            {
                "variant": "dense",
                "budget": 1.0,
                "seed": seed,
                "held_out_loss": held_out(f"upcycling/dense-seed-{seed}"),
                "similarity": 1.0,
            }
        )
        for budget in BUDGETS:
            for variant in VARIANTS:
                name = folder(variant, budget, seed)
                similar = [line["routers"] for line in lines(name) if "routers" in line][-1]
                similarity = mean(router["similarity"] for router in similar.values())
                rows.append(
                    {
                        "variant": variant,
                        "budget": budget,
                        "seed": seed,
                        "held_out_loss": held_out(name),
                        "similarity": similarity,
                    }
                )
    write_csv(HERE / "data.csv", rows)
    rows = read_csv(HERE / "data.csv")
    for variant in ("dense", *VARIANTS):
        for budget in BUDGETS:
            mine = [row for row in rows if row["variant"] == variant and row["budget"] == budget]
            if mine:
                losses = [row["held_out_loss"] for row in mine]
                print(
                    f"| {variant} | {budget:g} | {mean(losses):.3f} ({min(losses):.3f} to {max(losses):.3f}) | "
                    f"{mean(r['similarity'] for r in mine):.2f} |"
                )
    draw(rows)


def draw(rows: list[dict]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.5), constrained_layout=True)
    for colour, variant in enumerate(VARIANTS):
        for axis, name in ((left, "held_out_loss"), (right, "similarity")):
            values = [
                [row[name] for row in rows if row["variant"] == variant and row["budget"] == budget]
                for budget in BUDGETS
            ]
            axis.plot(BUDGETS, [mean(each) for each in values], "o-", color=f"C{colour}", label=variant)
            if name == "held_out_loss":
                axis.fill_between(
                    BUDGETS,
                    [min(each) for each in values],
                    [max(each) for each in values],
                    color=f"C{colour}",
                    alpha=0.15,
                )
    left.axhline(
        mean(row["held_out_loss"] for row in rows if row["variant"] == "dense"),
        color="grey",
        linestyle=":",
        label="dense, at 1",
    )
    left.set(title="held-out loss", xlabel="compute / that of the dense model")
    right.set(title="cosine between experts", xlabel="compute / that of the dense model")
    left.legend()
    figure.savefig(HERE / "figure.png", dpi=90)


if __name__ == "__main__":
    parser = command_line()
    parser.add_argument("seeds", metavar="SEED", type=int, nargs="*", default=SEEDS)
    asked = parser.parse_args()
    if asked.do == "run":
        run(asked.seeds)
    else:
        report()
