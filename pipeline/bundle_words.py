"""What the files of a MONAI bundle say, read as words: references are followed, nothing of them is ever run.

In a bundle `$` begins Python, `@a::b` a reference, `%` text from elsewhere. Of these references are followed, and of Python
only what is a literal or nothing but a reference. A value that needs more is refused when it is asked for, and only then:
most of a bundle's expressions are about files and devices, which are none of an import's business.
"""

import ast
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import yaml

from .errors import PackageError

REFERENCE = re.compile(r"@[A-Za-z_]\w*(?:(?:::|#)\w+)*")
DEEPEST = 50
"""References that lead to references; a bundle has two or three, a circle has no end."""


@dataclass(frozen=True, kw_only=True)
class Target:
    """A `_target_`: what would be called, and with what."""

    name: str
    """Without the modules before it."""
    path: str
    """As the bundle says it."""
    arguments: Mapping[str, Any]
    """As the bundle says them, references and all."""
    is_off: bool = False
    """`_disabled_`: it is not called."""


@dataclass(frozen=True, kw_only=True)
class Words:
    """A file of a bundle."""

    file: str
    said: Mapping[str, Any]

    @staticmethod
    def read(file: str, text: str) -> "Words":
        try:
            said = json.loads(text) if file.endswith(".json") else yaml.safe_load(text)
        except (json.JSONDecodeError, yaml.YAMLError) as error:
            raise PackageError(
                f"{file} cannot be read ({error}); JSON or plain YAML is needed. Copy it anew."
            ) from None
        if not isinstance(said, dict):
            raise PackageError(f"{file} is no table; the configuration of a MONAI bundle is needed. Copy it anew.")
        return Words(file=file, said=said)

    def find(self, *names: str) -> Any:
        """What the file says under the first of these names that it has; None where it has none."""
        return next((self.value(self.said[name]) for name in names if name in self.said), None)

    def value(self, said: Any, depth: int = DEEPEST) -> Any:
        """References followed, literals read; a `_target_` becomes a Target, whose arguments stay as they are said."""
        if depth == 0:
            raise self._refused(said, "its references lead in a circle")
        if isinstance(said, list):
            return [self.value(item, depth - 1) for item in said]
        if isinstance(said, Mapping):
            if "_target_" in said:
                return self._target(said, depth)
            return {str(key): self.value(item, depth - 1) for key, item in said.items()}
        if not isinstance(said, str):
            return said
        if said.startswith("%"):
            raise self._refused(said, "text from elsewhere is not fetched")
        text = said[1:].strip() if said.startswith("$") else said
        if REFERENCE.fullmatch(text):
            return self.value(self._followed(text), depth - 1)
        return self._literal(said, text) if said.startswith("$") else said

    def arguments(self, target: Target, unasked: frozenset[str] = frozenset()) -> dict[str, Any]:
        """All that it would be called with, but what nobody asks for."""
        return {
            key: self.value(item)
            for key, item in target.arguments.items()
            if key not in unasked and not key.startswith("_")
        }

    def _target(self, said: Mapping[str, Any], depth: int) -> Target:
        path = str(said["_target_"])
        is_off = self.value(said.get("_disabled_", False), depth - 1)
        arguments = {str(key): item for key, item in said.items() if key not in ("_target_", "_disabled_")}
        return Target(name=path.split(".")[-1], path=path, arguments=arguments, is_off=str(is_off).lower() == "true")

    def _followed(self, reference: str) -> Any:
        there: Any = self.said
        for word in re.split("::|#", reference[1:]):
            if isinstance(there, str):  # a reference to what is itself one
                there = self.said_of(there)
            if isinstance(there, Mapping) and word in there:
                there = there[word]
            elif isinstance(there, list) and word.isdigit() and int(word) < len(there):
                there = there[int(word)]
            else:
                raise self._refused(reference, f"nothing is called {word} there")
        return there

    def said_of(self, text: str) -> Any:
        """What a reference stands for, itself not yet read."""
        if not REFERENCE.fullmatch(text):
            raise self._refused(text, "it is no reference")
        return self._followed(text)

    def _literal(self, said: str, text: str) -> Any:
        try:
            return ast.literal_eval(text)
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            raise self._refused(said, "it is Python, which an import does not run") from None

    def _refused(self, said: Any, why: str) -> PackageError:
        shown = str(said)[:120]
        return PackageError(
            f"{self.file} says {shown!r}, and {why}; a literal or a reference to one is needed here. Write the value out in a "
            "copy of the bundle, if you trust it."
        )
