"""The directory of many runs: it says what it is of, keeps each run that is done, and can be gone on with."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from simrl.experiments.config import Config, config_toml
from simrl.experiments.run import RunDirectoryError, write_directory
from simrl.experiments.sweep_engines import Outcome
from simrl.traces.trace import TraceError, whole_file


def replace_file(path: Path, write: Callable[[Path], object]) -> None:
    """Let *write* fill a file that takes the name *path* when it is complete; its folder is made.

    Raises:
        RunDirectoryError: it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(path) as hidden:
            write(hidden)
    except TraceError as error:
        raise RunDirectoryError(str(error)) from error
    except OSError as error:
        raise RunDirectoryError(f"output {str(path)!r} cannot be written: {error.strerror} (--output)") from error


def write_text(path: Path, text: str) -> None:
    """A whole text file or none, as `replace_file`."""
    replace_file(path, lambda hidden: hidden.write_text(text, encoding="utf-8"))


def write_json(path: Path, document: object) -> None:
    """A whole JSON file or none, as `replace_file`."""
    write_text(path, json.dumps(document, indent=2) + "\n")


class KeptRuns:
    """Outcomes of runs that succeeded, a file each, complete as soon as it is there; without a folder none is kept."""

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder

    def get(self, key: str) -> Outcome | None:
        """Of the run of that key, if it is there."""
        if self.folder is None:
            return None
        try:
            outcome: Outcome = json.loads((self.folder / f"{key}.json").read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):  # ValueError: a machine that lost its power leaves empty files
            return None
        return outcome

    def put(self, key: str, outcome: Outcome) -> None:
        """Keep it, unless the run failed."""
        if self.folder is not None and "error" not in outcome:
            write_json(self.folder / f"{key}.json", outcome)


def open_directory(
    directory: Path,
    kind: str,
    name: str,
    base: Config,
    about: Mapping[str, Any],
    *,
    resume: bool,
    renewable: Collection[str] = (),
) -> bool:
    """Make the directory of a *kind* of work, or check that it is this one's.

    Args:
        directory: Where.
        kind: As messages call it: sweep, search.
        name: Of the file that holds *about*.
        base: Goes to config.toml.
        about: What tells this work from others of its kind, as JSON has it.
        resume: Go on in *directory*, if it is there.
        renewable: Keys of *about* that may differ from when it was begun; what is there is written anew.

    Returns:
        Whether any of those does.

    Raises:
        RunDirectoryError: it cannot be written, or is of other work.
    """
    path = directory / name
    if not (resume and directory.is_dir() and any(directory.iterdir())):

        def write(place: Path) -> None:
            (place / "config.toml").write_text(config_toml(base), encoding="utf-8")
            write_json(place / name, about)

        write_directory(directory, write)
        return False
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
        different = {key for key in about if before.get(key) != about[key]}
    except (OSError, ValueError, AttributeError):
        raise RunDirectoryError(f"output {str(directory)!r} is not the directory of a {kind} (--resume)") from None
    if different - set(renewable):
        others = " and ".join(key for key in about if key in different and key not in renewable)
        raise RunDirectoryError(f"output {str(directory)!r} is of another {kind}: its {others} differ (--resume)")
    for left in directory.rglob(".*.tmp"):  # of work that was killed while it wrote
        left.unlink()
    if different:
        write_json(path, about)
    return bool(different)
