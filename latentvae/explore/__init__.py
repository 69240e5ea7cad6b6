"""What a VAE is for besides pipelines: sample, interpolate and vary images, fill in pixels, find the odd one.

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
    from latentvae.explore.diffusion import fit_diffusion as fit_diffusion
    from latentvae.explore.features import Features as Features
    from latentvae.explore.features import pool as pool
    from latentvae.explore.imputation import Filling as Filling
    from latentvae.explore.imputation import fill as fill
    from latentvae.explore.imputation import hole_psnr as hole_psnr
    from latentvae.explore.interpolation import Interpolation as Interpolation
    from latentvae.explore.interpolation import interpolate as interpolate
    from latentvae.explore.interpolation import slerp as slerp
    from latentvae.explore.interpolation import step_sizes as step_sizes
    from latentvae.explore.latent_set import LatentSet as LatentSet
    from latentvae.explore.mixture import fit_mixture as fit_mixture
    from latentvae.explore.prior import StandardNormal as StandardNormal
    from latentvae.explore.prior import load_prior as load_prior
    from latentvae.explore.projection import Projection as Projection
    from latentvae.explore.projection import project as project
    from latentvae.explore.roc import auroc as auroc
    from latentvae.explore.sampling import sample as sample
    from latentvae.explore.sampling import sample_batches as sample_batches
    from latentvae.explore.variation import Variations as Variations
    from latentvae.explore.variation import vary as vary

_HOME = {
    "Calibration": "calibration",
    "Features": "features",
    "Filling": "imputation",
    "Interpolation": "interpolation",
    "LatentSet": "latent_set",
    "Look": "anomaly",
    "Projection": "projection",
    "StandardNormal": "prior",
    "Variations": "variation",
    "Verdict": "calibration",
    "auroc": "roc",
    "calibrate": "calibration",
    "fill": "imputation",
    "fit_diffusion": "diffusion",
    "fit_mixture": "mixture",
    "hole_psnr": "imputation",
    "interpolate": "interpolation",
    "load_calibration": "calibration",
    "load_prior": "prior",
    "look": "anomaly",
    "pool": "features",
    "project": "projection",
    "sample": "sampling",
    "sample_batches": "sampling",
    "slerp": "interpolation",
    "step_sizes": "interpolation",
    "vary": "variation",
}

__all__ = sorted(_HOME)  # noqa: PLE0605


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'latentvae.explore' has no attribute {name!r}")
    return getattr(import_module(f"latentvae.explore.{_HOME[name]}"), name)
