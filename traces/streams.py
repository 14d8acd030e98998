"""Named random streams: what one part of a run draws never shifts what another part sees."""

from __future__ import annotations

import hashlib
import json
import operator

import numpy as np

_WORDS = 4


def stream(seed: int, *name: str | int) -> np.random.Generator:
    """A generator of its own for every (seed, name): same arguments, same draws, in any process and any order.

    Args:
        seed: The run's seed, 0 <= seed < 2**128.
        name: What is drawn, from coarse to fine, for instance "length", epoch, sample. 1 and "1" are different names.

    Raises:
        ValueError: If the seed is out of range or the name is empty.
    """
    if not 0 <= seed < 2**128:
        raise ValueError(f"{seed=} must be in 0 <= seed < 2**128")
    if not name:
        raise ValueError("a stream needs a name: two nameless users of one seed would draw the same numbers")
    # JSON keeps ("a", "b") and ("ab",), 1 and "1" apart; Python's own hash of a string differs between processes.
    text = json.dumps([part if isinstance(part, str) else operator.index(part) for part in name])
    digest = hashlib.blake2b(text.encode(), digest_size=4 * _WORDS).digest()
    words = [int.from_bytes(digest[4 * i : 4 * i + 4], "little") for i in range(_WORDS)]
    # The name is the spawn key, not entropy: NumPy then pads the seed, so a long seed cannot run into a name.
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(int(seed), spawn_key=words)))
