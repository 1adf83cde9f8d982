"""``timm-csg`` and ``python -m timm_csg``: the command line in a process of its own."""

from __future__ import annotations

import signal
import sys
from typing import NoReturn


def run() -> NoReturn:
    """Run the command and end the process with its status.

    Ctrl-C is one line also while the command is being loaded, and ends the process without a traceback while it ends.
    """
    try:
        from timm_csg.cli import main

        status = main()
    except KeyboardInterrupt:
        sys.stderr.write("stopped.\n")
        status = 130
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    sys.exit(status)


if __name__ == "__main__":
    run()
