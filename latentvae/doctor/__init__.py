"""Whether a VAE survives half precision, and a rescaled copy that does."""

from latentvae.doctor.diagnosis import Diagnosis, diagnose, synthetic_probes
from latentvae.doctor.halves import HalfPicture, compare_halves
from latentvae.doctor.rescaling import Rescaling, UnfixableError, rescale

__all__ = [
    "Diagnosis",
    "HalfPicture",
    "Rescaling",
    "UnfixableError",
    "compare_halves",
    "diagnose",
    "rescale",
    "synthetic_probes",
]
