"""The ``scalora`` command, and what it says where only the library is installed."""

from __future__ import annotations

import os
import sys


def main() -> None:
    """Run the command line; exits with 2 where its packages are missing, and with 130 where a signal stops it."""
    try:
        from .common.launch import launched
        from .common.stopping import listen

        listen()
        if launched() > 1:  # before torch is there: its warnings would come from every process
            os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
        _run()
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        raise SystemExit(130) from None


def _run() -> None:
    from .common.stopping import was_stopped

    try:
        from .cli import app
    except Exception as error:
        if was_stopped(error):
            raise KeyboardInterrupt from error
        if not isinstance(error, ModuleNotFoundError):
            raise
        print(f"error: {error.name} is missing: the command needs pip install 'scalora[cli]'", file=sys.stderr)
        raise SystemExit(2) from None
    try:
        app()
    except SystemExit as end:
        if end.code == 1 and was_stopped(end):  # click's answer to Ctrl-C outside of a verb
            raise SystemExit(130) from None
        raise


if __name__ == "__main__":
    main()
