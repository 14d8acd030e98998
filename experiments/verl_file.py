"""verl's settings as they stand in a YAML file of hydra's or in a launch script."""

from __future__ import annotations

import ast
import operator
import re
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from simrl.experiments.config import ConfigError

MOST_BYTES = 4 * 1024 * 1024  # a resolved configuration has some 20,000
MOST_SETTINGS = 20_000
MOST_DEPTH = 50
MOST_CHARACTERS = 10_000  # of a word of a script
ROOTS = ("data", "actor_rollout_ref", "critic", "reward_model", "reward", "algorithm", "trainer")
HIDE, SHOW = str.maketrans("${}", "\0\1\2"), str.maketrans("\0\1\2", "${}")
GROUPS = ("model_engine",)  # groups of hydra's that are chosen by name

_OVERRIDE = re.compile(r"\+{0,2}([A-Za-z_]\w*(?:\.[\w@/-]+)+)=(.*)", re.DOTALL)
_GROUP = re.compile(rf"({'|'.join(GROUPS)})=(.*)")
_ASSIGNMENT = re.compile(r"([A-Za-z_]\w*)=(.*)", re.DOTALL)
_VARIABLE = re.compile(r"\$(?:(\w+)|\{(\w+)(?::?-([^${}]*))?\})")
_ARITHMETIC = re.compile(r"\$\(\((.*?)\)\)(?!\))")
_REFERENCE = re.compile(r"\$\{(?:oc\.select:\s*)?(\.*)([A-Za-z_][\w.\-]*)\s*(?:,\s*([^${}]*))?\}")
_OPERATORS: dict[type, Any] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.floordiv,
    ast.FloorDiv: operator.floordiv,
}  # fmt: skip


class Unresolved(ValueError):
    """A setting whose value cannot be told from the file; the message is the reason."""


@dataclass(frozen=True, slots=True)
class VerlFile:
    """Settings by dotted key.

    Attributes:
        source: The file.
        leaves: Values as given, references and variables included.
        unread: Parts of the file that are no settings but look like some, with the reason.
        is_script: `$` marks shell variables, not references.
    """

    source: str
    leaves: Mapping[str, Any]
    unread: Mapping[str, str] = field(default_factory=dict)
    is_script: bool = False

    def value(self, key: str, *, last_part: bool = False) -> Any:
        """The value of *key*, references followed; None where it is absent, null or "???".

        Args:
            key: Dotted.
            last_part: Whether only the part of a path behind its last slash has to be known.

        Raises:
            Unresolved: It depends on what the file does not say.
        """
        return self._resolved(key, self.leaves.get(key), last_part, 0)

    def _resolved(self, key: str, value: Any, last_part: bool, depth: int) -> Any:
        if value == "???":
            return None
        if not isinstance(value, str) or "$" not in value:
            return value
        if last_part and "$" not in value.rstrip("/").rpartition("/")[2]:
            return value.rstrip("/").rpartition("/")[2]
        if self.is_script:
            raise Unresolved("a shell variable that the script does not set")
        match = _REFERENCE.fullmatch(value.strip())
        if match is None:
            raise Unresolved("it is resolved only when verl runs")
        dots, path, default = match.groups()
        above = key.split(".")[: -len(dots)] if dots else []
        target = ".".join([*above, path])
        if depth > MOST_DEPTH:
            raise Unresolved("it refers to itself")
        if target in self.leaves:
            return self._resolved(target, self.leaves[target], last_part, depth + 1)
        if default is None:
            raise Unresolved(f"it refers to {target}, which the file does not have")
        return _parsed(default.strip())


def read_verl(path: Path) -> VerlFile:
    """Read `config.yaml` or `overrides.yaml` of hydra's, a part of one, or, by any other suffix, a launch script.

    Raises:
        ConfigError: It cannot be read, or holds no settings of verl.
    """
    text = _text(path)
    read = _from_yaml if path.suffix.lower() in (".yaml", ".yml", ".json") else _from_script
    file = read(text, str(path))
    if not any(key.partition(".")[0] in ROOTS for key in file.leaves):
        raise ConfigError(f"{path} has no settings of verl, such as data.train_batch_size (--from-verl)")
    return file


def _text(path: Path) -> str:
    text = ""
    try:
        if not path.is_file():
            wrong = "is not a file" if path.exists() else "does not exist"
        elif path.stat().st_size > MOST_BYTES:
            wrong = f"has more than {MOST_BYTES} bytes"
        else:
            text = path.read_text(encoding="utf-8-sig")
            wrong = "is binary, not text" if "\0" in text else ""
    except UnicodeDecodeError:
        wrong = "is not UTF-8 text"
    except (OSError, ValueError) as error:  # ValueError: a NUL in its name
        wrong = f"cannot be read: {getattr(error, 'strerror', None) or error}"
    if wrong:
        raise ConfigError(f"verl configuration {str(path)!r} {wrong} (--from-verl)")
    return text


def _from_yaml(text: str, source: str) -> VerlFile:
    try:
        tree = yaml.safe_load(text)
    except RecursionError:
        raise ConfigError(f"{source}: not valid YAML: nested too deeply (--from-verl)") from None
    except (yaml.YAMLError, ValueError) as error:
        mark = getattr(error, "problem_mark", None)
        place = f"{source}:{mark.line + 1}" if mark else source
        reason = getattr(error, "problem", None) or str(error).partition("\n")[0]
        raise ConfigError(f"{place}: not valid YAML: {reason} (--from-verl)") from None
    if isinstance(tree, Mapping):
        return VerlFile(source, dict(_leaves(tree, source)))
    if isinstance(tree, list) and all(isinstance(item, str) for item in tree):
        return _from_overrides(tree, source)
    raise ConfigError(f"{source} must be a YAML mapping, or a list of overrides such as trainer.nnodes=2 (--from-verl)")


def _leaves(tree: Mapping[Any, Any], source: str) -> Iterator[tuple[str, Any]]:
    """Settings of a tree by dotted key; without recursion, as a tree may refer to itself."""
    waiting: list[tuple[str, Any, int]] = [("", tree, 0)]
    count = 0
    while waiting:
        key, node, depth = waiting.pop()
        count += 1
        if count > MOST_SETTINGS or depth > MOST_DEPTH:
            raise ConfigError(f"{source} has more than {MOST_SETTINGS} settings or {MOST_DEPTH} levels (--from-verl)")
        if isinstance(node, Mapping) and (node or not key):
            parts = [(f"{key}.{name}" if key else str(name), part, depth + 1) for name, part in node.items()]
            waiting += reversed(parts)
        else:
            yield key, node


def _from_overrides(items: list[str], source: str) -> VerlFile:
    leaves: dict[str, Any] = {}
    unread = {}
    for item in items:
        match = _OVERRIDE.fullmatch(item) or _GROUP.fullmatch(item)
        if match:
            leaves[match[1]] = _parsed(match[2])
        else:
            unread[item[:80]] = "neither a setting nor a group that simrl knows"
    return VerlFile(source, leaves, unread)


def _from_script(text: str, source: str) -> VerlFile:
    """Overrides among the words of a script, with the variables that the script itself sets by then."""
    text = _ARITHMETIC.sub(lambda match: "".join(match[0].split()), text.replace("\r\n", "\n"))
    try:
        words = [word.rstrip(";") for word in shlex.split(text, comments=True)]
    except ValueError as error:
        raise ConfigError(f"{source}: not a shell script: {error} (--from-verl)") from None
    variables: dict[str, str] = {}
    leaves: dict[str, Any] = {}
    for position, word in enumerate(words):
        name = re.fullmatch(r"--config-name(?:=(.+))?", word)
        if name:
            leaves["--config-name"] = name[1] or next(iter(words[position + 1 :]), "")
        elif match := _OVERRIDE.fullmatch(word) or _GROUP.fullmatch(word):
            value = _expanded(match[2], variables)
            leaves[match[1]] = _parsed(value.rstrip(")") if value.count("(") < value.count(")") else value)
        elif match := _ASSIGNMENT.fullmatch(word):
            variables[match[1]] = _expanded(match[2], variables)
    return VerlFile(source, leaves, is_script=True)


def _expanded(text: str, variables: Mapping[str, str]) -> str:
    """*text* with its variables, their defaults and sums replaced; what is unknown stays."""

    def variable(match: re.Match[str]) -> str:  # hidden, so that it is not looked at again
        return variables.get(match[1] or match[2], match[0] if match[3] is None else match[3]).translate(HIDE)

    def total(match: re.Match[str]) -> str:
        return _computed(match[1], variables) or match[0].translate(HIDE)

    for _ in range(10):  # from the inside out: defaults hold variables
        before = text
        text = _VARIABLE.sub(variable, _ARITHMETIC.sub(total, text))
        if text == before or len(text) > MOST_CHARACTERS:
            break
    return text.translate(SHOW)[:MOST_CHARACTERS]


def _computed(text: str, variables: Mapping[str, str]) -> str | None:
    """What the shell makes of a sum, difference, product or quotient of whole numbers; None for anything else."""

    def number(node: ast.AST, depth: int = 0) -> int:
        match node:
            case ast.Constant(value=int() as value) if depth < 20 and abs(value) < 10**12:
                return value
            case ast.Name(id=name) if depth < 20 and variables.get(name, "").isdecimal():
                return int(variables[name][:20])
            case ast.BinOp(left=left, op=operation, right=right) if depth < 20 and type(operation) in _OPERATORS:
                return int(_OPERATORS[type(operation)](number(left, depth + 1), number(right, depth + 1)))
        raise ValueError(text)

    try:
        return str(number(ast.parse(_VARIABLE.sub(lambda m: m[1] or m[2], text.strip()), mode="eval").body))
    except (ValueError, SyntaxError, ZeroDivisionError, RecursionError, MemoryError):
        return None


def _parsed(text: str) -> Any:
    """The YAML value that an override's right side is; a text where it is none."""
    try:
        value = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError):
        return text
    is_text = isinstance(value, Mapping) or (value is None and text.strip() not in ("null", "None", "~", ""))
    return text if is_text else value
