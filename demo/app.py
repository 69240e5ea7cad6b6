"""The demo as a hosted Space, or by hand: python demo/app.py [--port N] [--host HOST] [--model PATH ...]."""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a checkout needs no installation

from latentvae.cli.main import main

if __name__ == "__main__":
    hosted = ["--host", "0.0.0.0"] if "SPACE_ID" in os.environ else []
    main(["demo", *hosted, *sys.argv[1:]])
