"""docs/figures/breakdown.png: when the stages of a step come, and what the GPU-seconds of the main job go into."""

from matplotlib.figure import Figure

from simrl.experiments.config import load_config
from simrl.experiments.plots import gpu_seconds, stages, theme
from simrl.experiments.run import run

POLICIES = ("verl", "rlhfuse", "rlhfless")
NODES, STEPS, SEED = 20, 45, 0
OUTPUT = "docs/figures/breakdown.png"


def main() -> None:
    """Run the policies and draw both."""
    results = {policy: run(load_config(policy=policy, nodes=NODES, steps=STEPS, seed=SEED)) for policy in POLICIES}
    runs = {policy: result.frames for policy, result in results.items()}
    cost_usd = {policy: result.summary["cost_usd_per_step"] for policy, result in results.items()}
    with theme():
        figure = Figure(figsize=(8, 5.5), layout="constrained")
        above, below = figure.subplots(2, 1)
        stages(runs, above)
        gpu_seconds(runs, below, cost_usd=cost_usd)
        figure.savefig(OUTPUT, dpi=100)


if __name__ == "__main__":
    main()
