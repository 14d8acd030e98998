"""One runnable file a figure: parameters on top, `python -m simrl.experiments.figures.NAME`."""
