"""Train a VAE: the entry for `accelerate launch train/train.py --config f8c4 ...` and for torchrun.

Everything is in latentvae/training; `latentvae train` is the same in one process.
"""

import sys

from latentvae.cli.main import main

if __name__ == "__main__":
    main(["train", *sys.argv[1:]])
