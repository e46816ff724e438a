"""The errors that users meet.

Every message says three things: what was wrong, what was found, and what to do. Code raises one of
these instead of a bare `ValueError` wherever the cause is outside the program (a file, a name, a
card, a network), so that a caller can catch `OrthoError` and print one paragraph.
"""

from __future__ import annotations


class OrthoError(Exception):
    """Base of all errors that libortho raises on purpose."""


class FetchError(OrthoError):
    """A file could not be fetched, or what came is not what was pinned."""


class ModelLoadError(OrthoError):
    """A model can't be loaded: unknown name, gated, missing files, no plain linear layers."""


class CorpusError(OrthoError):
    """A corpus is unknown, unreadable, empty or too short for what was asked of it."""


class RecordError(OrthoError):
    """A record file is missing, empty, malformed, or has records that a model can't take."""


class ShapeError(OrthoError, ValueError):
    """A tensor has the wrong shape, dtype or non-finite values."""


class SeparationError(OrthoError):
    """A model can't be separated, or an operation needs a separated model and got a plain one."""


class ArtifactError(OrthoError):
    """A saved artefact is missing, truncated, tampered with, or of a format that is not known."""


class HardwareError(OrthoError):
    """A card, its driver or its memory doesn't allow what was asked for."""


class ConfigError(OrthoError, ValueError):
    """An option, an ini setting or an environment variable has a value that makes no sense."""
