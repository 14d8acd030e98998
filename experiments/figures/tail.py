"""docs/figures/tail.png: the lengths of the main job, functions that generate, and the wait for the last response."""

from matplotlib.figure import Figure

from simrl.experiments.config import load_config
from simrl.experiments.plots import actors, lengths, tail, theme
from simrl.experiments.run import run

POLICIES = ("verl", "rlhfuse", "rlhfless")
NODES, STEPS, SEED = 20, 45, 0
OUTPUT = "docs/figures/tail.png"


def main() -> None:
    """Run the policies and draw all three; the lengths are the same for all of them."""
    runs = {p: run(load_config(policy=p, nodes=NODES, steps=STEPS, seed=SEED)).frames for p in POLICIES}
    with theme():
        figure = Figure(figsize=(8, 5.5), layout="constrained")
        panels = figure.subplot_mosaic([["lengths", "lengths"], ["actors", "tail"]])
        lengths(runs[POLICIES[0]].samples, panels["lengths"])
        for policy, frames in runs.items():
            actors(frames, panels["actors"], label=policy)
            tail(frames.samples, panels["tail"], label=policy)
        panels["actors"].legend()
        figure.savefig(OUTPUT, dpi=100)


if __name__ == "__main__":
    main()
