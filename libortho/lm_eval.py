"""lm-evaluation-harness on separated models: `python -m libortho.lm_eval`, with lm_eval's options.

    python -m libortho.lm_eval --model hf --model_args pretrained=FOLDER --tasks arc_easy

The harness loads its model by transformers and has no way to be told of another package, so its own
`lm_eval` command refuses a separated folder. This imports libortho and calls that very command.
"""

from __future__ import annotations

import importlib.util
import sys

EXIT_REFUSED = 2


def main() -> int | None:
    """Run lm_eval's command line; 2 if it isn't installed."""
    if importlib.util.find_spec("lm_eval") is None:
        said = "lm-evaluation-harness is not installed. Run `pip install lm_eval[hf]`."
        sys.stderr.write(f"libortho: {said}\n")
        return EXIT_REFUSED
    from lm_eval.__main__ import cli_evaluate  # noqa: PLC0415  # not a dependency

    return cli_evaluate()


if __name__ == "__main__":
    sys.exit(main())
