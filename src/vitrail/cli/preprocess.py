"""`--preprocess` as words: a name, fields as name=value, or a name and what differs from it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vitrail.config import ConfigError


def reading(words: Sequence[str]) -> Any:
    """What `load_model(preprocess=...)` takes; None for no words. Raises ConfigError for two names."""
    names = [word for word in words if "=" not in word]
    fields = dict(word.split("=", 1) for word in words if "=" in word)
    if len(names) > 1:
        raise ConfigError(f"--preprocess takes one name and fields as name=value; got the names {', '.join(names)}")
    if not fields:
        return names[0] if names else None
    return {**({"like": names[0]} if names else {}), **fields}
