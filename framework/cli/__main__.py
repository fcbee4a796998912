"""`python -m framework.cli`: the command `octavo` without its script, as sweeps start it."""

import os
import sys

if __name__ == "__main__":
    if not sys.flags.safe_path:
        # `-m` puts the current folder first, where a person's timeit.py or json.py would be taken for Python's own.
        sys.path[0] = __file__.rsplit(os.sep, 3)[0]

    from framework.sweep.process import follow_starter

    follow_starter()
    from framework.cli.main import main

    sys.exit(main())
