"""Errors for users: what went wrong, where, the rule, the remedy."""

from __future__ import annotations

EXIT_BAD_INPUT = 2
"""Exit code of every command that refuses its input."""


class MltfrError(Exception):
    """A condition the user can put right.

    The message is one paragraph: ``what`` happened, the ``rule`` that it breaks, the ``remedy``.
    Commands print it without a traceback and exit with :data:`EXIT_BAD_INPUT`.
    """

    def __init__(self, what: str, *, rule: str = "", remedy: str) -> None:
        self.what, self.rule, self.remedy = what, rule, remedy
        super().__init__(" ".join(part for part in (what, rule, remedy) if part))


class ConfigError(MltfrError):
    """A configuration that cannot run: unknown key, wrong type, impossible combination."""


class OtherRankError(MltfrError):
    """Another rank met bad input and says so; this one only stops."""


class DataError(MltfrError):
    """Interactions, shards or token tables that are missing, malformed or damaged."""


class CheckpointError(MltfrError):
    """A checkpoint or run folder that cannot be used."""
