"""``minimax-train`` and ``python -m minimax_train``."""

import os
import sys

from minimax_train.startup import no_collection


def main() -> int:
    """Console script: :func:`minimax_train.cli.main`, whose imports take seconds in which Ctrl-C may come."""
    # Of a connection that another rank closes PyTorch warns with pages of C++ stack; the watchdog says whose it was.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    try:
        with no_collection():
            from minimax_train.cli import main as run
    except KeyboardInterrupt:
        print("error: interrupted before the first step", file=sys.stderr)
        return 130
    return run()


if __name__ == "__main__":
    sys.exit(main())
