"""Train from a recipe: `python train.py recipe=pocket_lora model.dit.precision=fp8`, the same as `octavo train ...`."""

import sys

from framework.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
