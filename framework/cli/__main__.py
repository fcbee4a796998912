"""`python -m framework.cli`: the command `octavo` without its script, as sweeps start it."""

import sys

from framework.sweep.process import follow_starter

if __name__ == "__main__":
    follow_starter()
    from framework.cli.main import main

    sys.exit(main())
