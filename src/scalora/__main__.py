"""The ``scalora`` command, and what it says where only the library is installed."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line; exits with 2 where its packages are missing."""
    try:
        from .cli import app
    except ModuleNotFoundError as error:
        print(f"error: {error.name} is missing: the command needs pip install 'scalora[cli]'", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        raise SystemExit(130) from None
    app()


if __name__ == "__main__":
    main()
