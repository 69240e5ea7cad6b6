"""What comes with this package: models with trained weights, and sample pictures. Imports nothing heavy."""

from pathlib import Path

WEIGHTS_NAME = "diffusion_pytorch_model.safetensors"
WEIGHTS_DIR = Path(__file__).parent / "weights"
SAMPLE_PICTURE = Path(__file__).parent / "assets" / "chelsea.png"
DEFAULT_MODEL = "f8c4-small"


def bundled() -> list[str]:
    """Names of the models whose trained weights are installed with this package."""
    return sorted(path.parent.name for path in WEIGHTS_DIR.glob(f"*/{WEIGHTS_NAME}"))
