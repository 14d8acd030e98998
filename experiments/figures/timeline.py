"""docs/figures/timeline.png: what each of 160 GPUs does in two steps of the main job, by policy."""

from matplotlib.figure import Figure

from simrl.experiments.config import load_config
from simrl.experiments.plots import gantt, legend_above, theme
from simrl.experiments.run import run

POLICIES = ("verl", "rlhfuse", "rlhfless")
NODES, STEPS, FIRST_STEP, SHOWN_STEPS, SEED = 20, 14, 12, 2, 0
OUTPUT = "docs/figures/timeline.png"


def main() -> None:
    """Run the policies and draw them on one time axis."""
    with theme():
        figure = Figure(figsize=(8, 6.5), layout="constrained")
        panels = figure.subplots(len(POLICIES), 1, sharex=True)
        longest_s = 0.0
        for axes, policy in zip(panels, POLICIES, strict=True):
            frames = run(load_config(policy=policy, nodes=NODES, steps=STEPS, seed=SEED)).frames
            steps = frames.phases[frames.phases["stage"] == "step"].set_index("step")
            start_s, end_s = steps["start_s"][FIRST_STEP], steps["end_s"][FIRST_STEP + SHOWN_STEPS - 1]
            gantt(frames.workers, axes, start_s=start_s, end_s=end_s).set(xlabel="", title=f"{policy}\n")
            axes.set_yticks(axes.get_yticks()[::4])
            longest_s = max(longest_s, end_s - start_s)
        legend_above(panels[0])
        panels[-1].set(xlim=(0, longest_s), xlabel=f"s after step {FIRST_STEP} began")
        figure.savefig(OUTPUT, dpi=100)


if __name__ == "__main__":
    main()
