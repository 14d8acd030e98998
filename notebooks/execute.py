"""Executes notebooks, each in a fresh kernel of this Python; `make notebooks` writes their outputs into them.

python notebooks/execute.py notebooks/*.ipynb
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from traitlets.config import Config

TIMEOUT_S = 900
"""Of one cell."""


def execute(path: Path, *, small: bool = False, checks: str | None = None) -> nbformat.NotebookNode:
    """The notebook with the outputs of running it in its own folder; nothing is written.

    Args:
        path: Of the notebook.
        small: In the size of the tests.
        checks: Code that runs after the last cell, in a cell of its own.

    Raises:
        CellExecutionError: a cell, or a check, failed; the message has its code and traceback.
    """
    notebook = nbformat.read(path, as_version=4)
    if checks is not None:
        notebook.cells.append(nbformat.v4.new_code_cell(checks))
    environment = {**os.environ, "SIMRL_NOTEBOOK_SIZE": "ci" if small else "full"}
    with tempfile.TemporaryDirectory() as sockets:  # and no port, which others on the machine could listen to
        client = NotebookClient(
            notebook,
            timeout=TIMEOUT_S,
            kernel_name="python3",
            record_timing=False,  # times of day would change with every execution
            config=Config({"KernelManager": {"transport": "ipc", "ip": f"{sockets}/kernel"}}),
            resources={"metadata": {"path": str(path.parent)}},
        )
        executed: nbformat.NotebookNode = client.execute(env=environment)
    executed.metadata["language_info"] = {"name": "python"}  # the kernel adds its version
    return executed


def main() -> None:
    """Execute the named notebooks in full size, each in place once all of its cells have run."""
    for path in map(Path, sys.argv[1:]):
        print(path)
        nbformat.write(execute(path), path)


if __name__ == "__main__":
    main()
