"""Progress in notebooks."""

from __future__ import annotations

from collections.abc import Callable


def progress_bar(total: int) -> Callable[[int], None]:
    """A bar below the running cell of a notebook, to be given as *progress*; it needs `simrl[notebooks]`.

    Args:
        total: Of what is counted, as `config.job.steps` for a run.

    Returns:
        Called with how many are done, it moves the bar.
    """
    from IPython.display import ProgressBar  # not needed to use simrl elsewhere

    bar = ProgressBar(total)
    bar.display()

    def show(done: int) -> None:
        bar.progress = done

    return show
