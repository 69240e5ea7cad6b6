"""What a VAE is for besides pipelines: interpolate and vary images, fill in pixels, find the odd one.

Names are imported with their first use, so that a command's help needs no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from latentvae.explore.anomaly import Look as Look
    from latentvae.explore.anomaly import look as look
    from latentvae.explore.calibration import Calibration as Calibration
    from latentvae.explore.calibration import Verdict as Verdict
    from latentvae.explore.calibration import calibrate as calibrate
    from latentvae.explore.calibration import load_calibration as load_calibration
    from latentvae.explore.imputation import Filling as Filling
    from latentvae.explore.imputation import fill as fill
    from latentvae.explore.imputation import hole_psnr as hole_psnr
    from latentvae.explore.interpolation import Interpolation as Interpolation
    from latentvae.explore.interpolation import interpolate as interpolate
    from latentvae.explore.interpolation import slerp as slerp
    from latentvae.explore.interpolation import step_sizes as step_sizes
    from latentvae.explore.roc import auroc as auroc
    from latentvae.explore.variation import Variations as Variations
    from latentvae.explore.variation import vary as vary

_HOME = {
    "Calibration": "calibration",
    "Filling": "imputation",
    "Interpolation": "interpolation",
    "Look": "anomaly",
    "Variations": "variation",
    "Verdict": "calibration",
    "auroc": "roc",
    "calibrate": "calibration",
    "fill": "imputation",
    "hole_psnr": "imputation",
    "interpolate": "interpolation",
    "load_calibration": "calibration",
    "look": "anomaly",
    "slerp": "interpolation",
    "step_sizes": "interpolation",
    "vary": "variation",
}

__all__ = sorted(_HOME)  # noqa: PLE0605


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'latentvae.explore' has no attribute {name!r}")
    return getattr(import_module(f"latentvae.explore.{_HOME[name]}"), name)
