"""Progress bars of the libraries that we call: shown on a terminal, silent elsewhere.

Our own bars know that by themselves (`tqdm(..., disable=None)`); transformers' don't.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from transformers.utils import logging


@contextmanager
def bars_on_terminals_only() -> Iterator[None]:
    """Switch transformers' bars off inside the block unless standard error is a terminal."""
    terminal = sys.stderr is not None and sys.stderr.isatty()
    if terminal or not logging.is_progress_bar_enabled():
        yield
        return
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.enable_progress_bar()
