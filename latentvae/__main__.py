"""`python -m latentvae`, for torchrun and machines without scripts on their path."""

from latentvae.cli.main import main

main()
