"""Colours of files to sRGB: by ICC profiles, and by what CICP, or a PNG's gAMA and cHRM, declare."""

import io
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
from PIL import Image, ImageCms

PROFILE_MODES = {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK", "Lab": "LAB"}  # ICC's colour spaces as Pillow's
Chromaticities = tuple[tuple[float, float], ...]
D65 = (0.3127, 0.3290)
# x and y of red, green, blue and white, by the number that ITU-T H.273 has for them
SRGB: Chromaticities = ((0.640, 0.330), (0.300, 0.600), (0.150, 0.060), D65)
PRIMARIES = {
    1: ("sRGB", SRGB),
    4: ("BT.470 M", ((0.67, 0.33), (0.21, 0.71), (0.14, 0.08), (0.310, 0.316))),
    5: ("BT.601 625", ((0.64, 0.33), (0.29, 0.60), (0.15, 0.06), D65)),
    6: ("BT.601 525", ((0.630, 0.340), (0.310, 0.595), (0.155, 0.070), D65)),
    7: ("SMPTE 240M", ((0.630, 0.340), (0.310, 0.595), (0.155, 0.070), D65)),
    9: ("BT.2020", ((0.708, 0.292), (0.170, 0.797), (0.131, 0.046), D65)),
    11: ("DCI-P3", ((0.680, 0.320), (0.265, 0.690), (0.150, 0.060), (0.314, 0.351))),
    12: ("Display P3", ((0.680, 0.320), (0.265, 0.690), (0.150, 0.060), D65)),
}
# the curves of H.273 that are not sRGB's or, as video's are shown, as good as it
CURVES: dict[int, tuple[str, float | str]] = {
    4: ("gamma 2.2", 2.2),
    5: ("gamma 2.8", 2.8),
    8: ("linear", 1.0),
    16: ("PQ", "PQ"),
    18: ("HLG", "HLG"),
}
WHITE_NITS = 203.0  # of SDR in an HDR picture (ITU-R BT.2408)
PEAK_NITS = 1000.0  # brighter light counts as this
NEAR_SRGB = 0.05  # of a gamma, as libpng has it: 1/2.2 means sRGB
NEAR_PRIMARIES = 0.01  # in x and y
BRADFORD = np.array([[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]])
BT2020_LUMA = np.array([0.2627, 0.6780, 0.0593], dtype=np.float32)
PQ_M1, PQ_M2, PQ_C1, PQ_C2, PQ_C3 = 2610 / 16384, 2523 / 32, 3424 / 4096, 2413 / 128, 2392 / 128
HLG_A, HLG_B, HLG_C = 0.17883277, 0.28466892, 0.55991073
KNEE = 1.5  # of BT.2390's curve


@dataclass(frozen=True)
class Encoding:
    """What samples mean where no ICC profile says it.

    Attributes:
        name: for people.
        curve: "sRGB", "PQ", "HLG", "light" (1 is `peak`), or the exponent that makes samples linear.
        primaries: of red, green, blue and white.
        peak: nits of the brightest that counts, in HDR.
    """

    name: str
    curve: float | str = "sRGB"
    primaries: Chromaticities = SRGB
    peak: float = PEAK_NITS

    @property
    def is_hdr(self) -> bool:
        """Whether it goes beyond SDR's white."""
        return self.curve in ("PQ", "HLG", "light")

    @property
    def note(self) -> str:
        """What is done to the picture."""
        if self.is_hdr:
            return (
                f"HDR ({self.name}) tone-mapped to SDR (BT.2390, {self.peak:.4g} nits to {WHITE_NITS:g}, "
                "which are white)"
            )
        return f"converted from {self.name}"

    @cached_property
    def _matrix(self) -> np.ndarray:
        """Linear RGB of these primaries to linear sRGB, whites kept white."""
        return (np.linalg.inv(_to_xyz(SRGB)) @ _to_xyz(self.primaries)).astype(np.float32)

    def to_srgb(self, colour: np.ndarray) -> np.ndarray:
        """Convert samples (..., 3), or grey ones (...), in [0, 1]; float32 in [0, 1] too."""
        grey = colour.ndim == 2
        linear = self._linear(colour.astype(np.float32))
        if not grey and self.primaries != SRGB:
            linear = linear @ self._matrix.T
        linear = np.clip(linear, 0, 1)
        return np.where(
            linear <= 0.0031308, 12.92 * linear, 1.055 * np.power(linear, np.float32(1 / 2.4)) - 0.055
        )

    def _linear(self, colour: np.ndarray) -> np.ndarray:
        """Light, SDR's white being 1."""
        if self.curve == "PQ":
            return _tone_mapped(_pq_nits(colour))
        if self.curve == "HLG":
            return _tone_mapped(_hlg_nits(colour))
        if self.curve == "light":
            return _tone_mapped(self.peak * colour, self.peak)
        if self.curve == "sRGB":
            return np.where(colour <= 0.04045, colour / 12.92, ((colour + 0.055) / 1.055) ** 2.4)
        return np.power(colour, np.float32(self.curve))


def from_cicp(primaries: int, curve: int) -> Encoding | None:
    """What two numbers of ITU-T H.273 mean; None where that is sRGB, as good as it, or not known."""
    gamut, xy = PRIMARIES.get(primaries, PRIMARIES[1])
    name, power = CURVES.get(curve, ("", "sRGB"))
    return Encoding(", ".join(filter(None, (name, gamut))), power, xy) if name or xy != SRGB else None


def from_gamma(gamma: float | None, primaries: Chromaticities | None) -> Encoding | None:
    """What a PNG's gAMA (0.45455 for an exponent of 2.2) and cHRM mean; None: sRGB.

    Raises:
        ValueError: values that no picture can have.
    """
    parts: list[str] = []
    power: float | str = "sRGB"
    xy = SRGB
    if gamma is not None:
        if not 0.01 <= gamma <= 100:
            raise ValueError(f"a gamma of {gamma:g}")
        if abs(gamma * 2.2 - 1) > NEAR_SRGB:
            power = 1 / gamma
            parts.append(f"gamma {1 / gamma:.3g}")
    if primaries is not None and np.abs(np.array(primaries) - SRGB).max() > NEAR_PRIMARIES:
        matrix = _to_xyz(primaries)
        if not np.isfinite(matrix).all() or abs(np.linalg.det(matrix)) < 1e-4:
            raise ValueError("primaries that span no colours")
        parts.append("the primaries that its cHRM names")
        xy = primaries
    return Encoding(" and ".join(parts), power, xy) if parts else None


def _to_xyz(primaries: Chromaticities) -> np.ndarray:
    """The matrix from linear RGB to XYZ, adapted to D65 (Bradford)."""
    columns = np.array([(x / max(y, 1e-9), 1.0, (1 - x - y) / max(y, 1e-9)) for x, y in primaries]).T
    white, matrix = columns[:, 3], columns[:, :3]
    try:
        matrix = matrix * np.linalg.solve(matrix, white)
    except np.linalg.LinAlgError:
        return np.full((3, 3), np.nan)
    target = np.array([D65[0] / D65[1], 1.0, (1 - sum(D65)) / D65[1]])
    if np.allclose(white, target, atol=1e-3):
        return matrix
    gains = (BRADFORD @ target) / (BRADFORD @ white)
    return np.linalg.inv(BRADFORD) @ np.diag(gains) @ BRADFORD @ matrix


def _pq_nits(colour: np.ndarray) -> np.ndarray:
    """SMPTE ST 2084."""
    power = np.power(colour, np.float32(1 / PQ_M2))
    return 10_000 * np.power(np.maximum(power - PQ_C1, 0) / (PQ_C2 - PQ_C3 * power), np.float32(1 / PQ_M1))


def _pq_of(nits: np.ndarray) -> np.ndarray:
    power = np.power(nits / 10_000, np.float32(PQ_M1))
    return np.power((PQ_C1 + PQ_C2 * power) / (1 + PQ_C3 * power), np.float32(PQ_M2))


def _hlg_nits(colour: np.ndarray) -> np.ndarray:
    """ITU-R BT.2100 on a display of PEAK_NITS, for which its system gamma is 1.2."""
    scene = np.where(colour <= 0.5, colour**2 / 3, (np.exp((colour - HLG_C) / HLG_A) + HLG_B) / 12)
    light = scene if colour.ndim == 2 else (scene @ BT2020_LUMA)[..., None]
    return PEAK_NITS * scene * np.power(np.maximum(light, 1e-9), np.float32(0.2))


def _tone_mapped(nits: np.ndarray, peak: float = PEAK_NITS) -> np.ndarray:
    """The curve of ITU-R BT.2390 on the largest of R, G and B, so that hues stay: `peak` becomes 1, white."""
    largest = nits if nits.ndim == 2 else nits.max(-1, keepdims=True)
    top = _pq_of(np.array(peak, np.float32))
    white = _pq_of(np.array(WHITE_NITS, np.float32)) / top
    knee = KNEE * white - 0.5
    level = np.minimum(_pq_of(largest) / top, 1)
    t = np.maximum(level - knee, 0) / (1 - knee)
    bent = (2 * t**3 - 3 * t**2 + 1) * knee + (t**3 - 2 * t**2 + t) * (1 - knee)
    bent += (3 * t**2 - 2 * t**3) * white
    mapped = _pq_nits(np.where(level < knee, level, bent) * top)
    return nits * (mapped / np.maximum(largest, 1e-9)) / WHITE_NITS


@lru_cache(maxsize=16)
def icc_conversion(profile: bytes, mode: str) -> tuple[str, str, ImageCms.ImageCmsTransform | None]:
    """Return the profile's name, the mode it is for, and the transform to sRGB (None where it is sRGB).

    Raises:
        ValueError, and what LittleCMS raises: a profile that cannot be used.
    """
    source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
    space = source.profile.xcolor_space.strip()
    wanted = PROFILE_MODES.get(space, "")
    if wanted != mode and (wanted, mode) != ("RGB", "L"):
        raise ValueError(f"a profile for {space} cannot describe {mode} pixels")
    intent, flags = ImageCms.Intent.RELATIVE_COLORIMETRIC, ImageCms.Flags.BLACKPOINTCOMPENSATION
    transform = ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), wanted, "RGB", intent, flags)
    return _name_of(source), wanted, None if _changes_nothing(transform, wanted) else transform


def _name_of(profile: ImageCms.ImageCmsProfile) -> str:
    try:
        return ImageCms.getProfileDescription(profile).strip()
    except ImageCms.PyCMSError:  # an accent that is not in ASCII, say: the colours are described all the same
        return "(a name that cannot be read)"


def _changes_nothing(transform: ImageCms.ImageCmsTransform, mode: str) -> bool:
    """Tell sRGB by what it does, not by its name, so that sRGB pictures keep their exact samples."""
    if mode not in ("L", "RGB"):
        return False
    levels = np.linspace(0, 255, 9) if mode == "RGB" else np.arange(256)
    grid = np.stack(np.meshgrid(*[levels] * len(mode)), -1).reshape(1, -1, len(mode)).astype(np.uint8)
    probe = Image.fromarray(grid if mode == "RGB" else grid[..., 0])
    after = np.asarray(ImageCms.applyTransform(probe, transform), dtype=np.int16)
    return bool(np.abs(after - np.asarray(probe.convert("RGB"), dtype=np.int16)).max() <= 1)
