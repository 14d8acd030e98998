"""Architecture facts of language models, and the sizes that follow from them."""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files


@dataclass(frozen=True)
class Model:
    """A dense decoder-only transformer with grouped-query attention and a gated feed-forward layer.

    ``intermediate`` is the width of the feed-forward layer; ``max_context`` counts tokens. ``layer_norms`` are norms of
    a layer over its whole width; ``qk_norm`` adds one over each head of the queries and one over each of the keys.
    """

    name: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    tied_embeddings: bool
    qkv_bias: bool
    max_context: int
    source: str
    qk_norm: bool = False
    layer_norms: int = 2

    @property
    def shape(self) -> tuple[object, ...]:
        """What decides how long an iteration takes: models of one shape have one table."""
        return tuple(value for name, value in vars(self).items() if name not in ("name", "max_context", "source"))

    @property
    def parameters(self) -> int:
        """Number of weights: embeddings, output head (unless tied), layers and norms."""
        embeddings = self.vocab * self.hidden * (1 if self.tied_embeddings else 2)
        return embeddings + self.layers * self._layer_parameters() + self.hidden

    def _layer_parameters(self) -> int:
        q_width = self.heads * self.head_dim
        kv_width = self.kv_heads * self.head_dim
        attention = self.hidden * (q_width + 2 * kv_width) + q_width * self.hidden
        biases = q_width + 2 * kv_width if self.qkv_bias else 0
        feed_forward = 3 * self.hidden * self.intermediate
        norms = self.layer_norms * self.hidden + (2 * self.head_dim if self.qk_norm else 0)
        return attention + biases + feed_forward + norms

    def weight_bytes(self, bytes_per_parameter: int = 2) -> int:
        """Bytes of all weights; two bytes a parameter is bf16."""
        return self.parameters * bytes_per_parameter

    def kv_bytes_per_token(self, bytes_per_value: int = 2) -> int:
        """Bytes that one token of context holds in the KV cache, keys and values of all layers."""
        return 2 * self.layers * self.kv_heads * self.head_dim * bytes_per_value


def model_names() -> list[str]:
    """Names that `load_model` knows, sorted."""
    return sorted(_models())


def load_model(name: str, own: Mapping[str, Model] | None = None) -> Model:
    """Look a model up by its name in any case, such as ``Qwen2.5-7B``.

    Args:
        name: Of a shipped model, or of one of the user's.
        own: The user's models, by name in lower case.

    Raises:
        ValueError: No such model; the message names the nearest one and all that are known.
    """
    models = {**_models(), **(own or {})}
    model = models.get(name.lower())
    if model is None:
        near = difflib.get_close_matches(name.lower(), models, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ValueError(f"model {name!r} is unknown; {hint}known: {', '.join(sorted(models))}")
    return model


@cache
def _models() -> dict[str, Model]:
    text = files("simrl.traces").joinpath("data/models.toml").read_text(encoding="utf-8")
    return {name: Model(name=name, **facts) for name, facts in tomllib.loads(text).items()}
