"""TOML that remembers where a key stands, and a writer for configurations."""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Iterator, Mapping
from typing import Any

Path = tuple[str, ...]

_HEADER = re.compile(r"^\s*\[\s*([^\[\]]+?|.*\".*\".*?)\s*\]\s*(#.*)?$")
_BARE = re.compile(r"^[A-Za-z0-9_-]+$")


def parse_key(text: str) -> Path:
    """The path that a TOML key such as `a."b.c".d` stands for.

    Raises:
        ValueError: it is no TOML key.
    """
    try:
        tree = tomllib.loads(f"{text} = 0")
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{text!r} is not a key") from error
    leaves = list(leaves_of(tree))
    if len(leaves) != 1 or leaves[0][1] != 0:
        raise ValueError(f"{text!r} is not a key")
    return leaves[0][0]


def parse_value(text: str) -> Any:
    """The TOML value that *text* is; itself where it is none, so that names need no quotes."""
    try:
        tree = tomllib.loads(f"value = {text}")
    except tomllib.TOMLDecodeError:
        return text
    return tree["value"] if len(tree) == 1 else text


def leaves_of(tree: Mapping[str, Any], path: Path = ()) -> Iterator[tuple[Path, Any]]:
    """Paths and values of everything that is not a table."""
    for name, node in tree.items():
        if isinstance(node, Mapping):
            yield from leaves_of(node, (*path, name))
        else:
            yield (*path, name), node


def line_of(text: str, path: Path) -> int | None:
    """The line, from 1, on which the value at *path* is given: its own, or that of a table that holds it."""
    table: Path = ()
    found, depth = None, 0
    for number, line in enumerate(text.splitlines(), 1):
        header = _HEADER.match(line)
        try:
            if header:
                here = table = parse_key(header[1])
            else:
                here = (*table, *parse_key(line.partition("=")[0]))
        except ValueError:
            continue  # a comment, an empty line, or the inside of a longer value
        if here == path[: len(here)] and len(here) > depth:
            found, depth = number, len(here)
    return found


def write_toml(tree: Mapping[str, Any]) -> str:
    """TOML text: plain keys first, then a table for every mapping, whose own mappings are inline; None is left out."""
    tables = {name: node for name, node in tree.items() if isinstance(node, Mapping)}
    lines = [_line(name, node) for name, node in tree.items() if name not in tables and node is not None]
    for name, table in tables.items():
        lines += ["", f"[{_key(name)}]", *(_line(key, node) for key, node in table.items() if node is not None)]
    return "\n".join(lines) + "\n"


def _line(key: str, value: object) -> str:
    return f"{_key(key)} = {_value(value)}"


def _key(name: str) -> str:
    return name if _BARE.match(name) else _string(name)


def _string(text: str) -> str:
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")  # TOML's escapes hold JSON's


def _value(value: object) -> str:
    match value:
        case bool():
            return "true" if value else "false"
        case int() | float():
            return repr(value)
        case str():
            return _string(value)
        case Mapping():
            return "{" + ", ".join(_line(key, node) for key, node in value.items() if node is not None) + "}"
        case list() | tuple():
            return "[" + ", ".join(_value(item) for item in value) + "]"
    raise TypeError(f"{value!r} has no form in TOML")
