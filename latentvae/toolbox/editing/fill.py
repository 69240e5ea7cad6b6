"""Filling in missing pixels: latents whose decoding agrees with the known ones, window by window.

The hole gets a smooth extension of the known pixels and a share of the detail that the model adds; how much
of each is found on known pixels that are hidden for the purpose. Below: `fill` and its methods, the trial on
hidden pixels, the smooth extension, and windows for images whose gradients would not fit into memory.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from diffusers import AutoencoderKL
from torch.nn.functional import avg_pool2d, interpolate, max_pool2d, pad

from latentvae.base.errors import ImageError, LatentVAEError
from latentvae.images.tensors import to_uint8
from latentvae.models.latents import decode, encode

Method = Literal["optimise", "project", "one_pass"]

# Of the methods
STEPS = {"optimise": 20, "project": 3, "one_pass": 1}
LEARNING_RATE = 0.07  # of the spread of the image's own latents, per step of Adam
AGAIN = 3  # the final run has a third of the steps, because it goes on from the trial's latents
STAY = 1e-3  # keeps latents over large holes, where no pixel says anything, where the encoder put them
GREY = 0.0  # behind which training hides pixels

# Of the trial
HELD_OUT = 0.1  # of the known pixels, where the hole is scattered: more would be another problem
SOLID = 9  # pixels: a hole that contains such a square is no scattered one

# Of the smooth extension
MAX_ITERATIONS = 400
TOLERANCE = 1e-4  # of the first residual

# Of windows
SMALLEST_WINDOW = 64  # pixels a side: less has no surroundings to learn from
OVERLAP = 4  # a window shares this part of its side with each neighbour


@dataclass(frozen=True)
class Filling:
    """A completed image, and what it was made of.

    Attributes:
        images: (1, C, H, W) in [-1, 1]; known pixels are those that came, bit for bit.
        smooth: (1, C, H, W), the smooth extension alone: what no model adds.
        decoded: (1, C, H, W), what the latents decode to, everywhere.
        plate: weight in 0..1 of the thin plate in the smooth part, against the membrane.
        detail: weight in 0..1 of the model's detail, 0 where it was no help on held-out pixels.
    """

    images: torch.Tensor
    smooth: torch.Tensor
    decoded: torch.Tensor
    plate: float
    detail: float


def fill(
    vae: AutoencoderKL,
    images: torch.Tensor,
    missing: torch.Tensor,
    *,
    method: Method = "optimise",
    steps: int | None = None,
    blend: bool = True,
    seed: int = 0,
    progress: Callable[[], object] | None = None,
) -> Filling:
    """Complete an image from its known pixels, which are kept bit for bit.

    The decoded image rarely agrees with the known pixels exactly, so with `blend` the hole gets a smooth
    extension of the known pixels plus the detail of the decoded image (what its own smooth extension misses).
    Their weights are least squares over known pixels that are hidden for the purpose: the hole elsewhere.
    `fill_in_windows` does the same for images that are too large for gradients.

    Args:
        vae: any AutoencoderKL; the optimisation wants it in float32.
        images: (1, C, H, W) in [-1, 1]; what missing pixels hold is not looked at.
        missing: (H, W) bool.
        method: "optimise": Adam on the latents, from those of a smoothly filled image; "project": encode,
            decode and put the known pixels back, again and again, without gradients; "one_pass": encode once
            with mid-grey in the hole, for models that were trained with masked input.
        steps: of the method; None: 20 of Adam, 3 projections. One pass has one.
        blend: False: the hole gets the decoded image as it is.
        seed: of the choice of hidden pixels.
        progress: called after every step.

    Raises:
        ImageError: more than one image, a mask of another size, or no known pixel.
        LatentVAEError: an unknown method, or steps below 1.
    """
    steps = _steps_of(method, steps)
    if images.ndim != 4 or images.shape[0] != 1:
        raise ImageError(f"shape {tuple(images.shape)} came; one image (1, C, H, W) was wanted.")
    check_missing(images, missing)
    missing = missing.to(images.device)
    if not missing.any():  # known pixels are kept, so there is nothing to ask the model
        return Filling(images, images, images, 0.0, 0.0)
    run = _Run(vae, method, steps, progress)
    plate, detail, trial = 0.0, 0.0, None
    if blend:
        hidden = elsewhere(missing, seed)  # (H, W)
        if hidden.any():  # else nothing could be hidden, and only the smooth part is safe
            # hidden from the smooth extension and from the model, or their weights would be too good
            trial = run.layers(images, missing | hidden)
            plate, detail = fit_weights(trial, images, hidden)
    layers = run.layers(images, missing, trial)
    smooth = layers.mix(plate, 0.0)
    inside = layers.mix(plate, detail) if blend else layers.decoded
    values = inside.clamp(-1, 1).to(images.dtype)
    return Filling(torch.where(missing, values, images), smooth, layers.decoded, plate, detail)


def _steps_of(method: str, steps: int | None) -> int:
    """How many steps there will be, of a method that exists."""
    if method not in get_args(Method):
        raise LatentVAEError(f"unknown method {method!r}; choose one of {', '.join(get_args(Method))}.")
    steps = STEPS[method] if steps is None else steps
    if steps < 1 or (method == "one_pass" and steps != 1):
        raise LatentVAEError(f"{steps} steps of {method!r} came; wanted 1 or more, of one_pass exactly 1.")
    return steps


def check_missing(images: torch.Tensor, missing: torch.Tensor) -> None:
    """Check that images (B, C, H, W) and missing (H, W) belong together and that some pixel is known.

    Raises:
        ImageError: they do not, or none is.
    """
    if images.ndim != 4 or missing.dtype != torch.bool or missing.shape != images.shape[-2:]:
        raise ImageError(
            f"images {tuple(images.shape)} came with a {missing.dtype} mask {tuple(missing.shape)}; wanted "
            f"(B, C, H, W) and a bool mask (H, W) of the same size: do not resize one without the other."
        )
    if bool(missing.all()):
        raise ImageError(
            "every pixel is missing, so there is nothing to fill in from. White means missing: is the mask "
            "inverted?"
        )


@dataclass(frozen=True)
class Layers:
    """What a filling is mixed from, each (1, C, H, W), and the latents that decode to `decoded`."""

    membrane: torch.Tensor
    plate: torch.Tensor
    decoded: torch.Tensor
    detail: torch.Tensor
    latents: torch.Tensor

    def mix(self, plate: float, detail: float) -> torch.Tensor:
        """The membrane, bent towards the plate, with a share of the detail."""
        return self.membrane + plate * (self.plate - self.membrane) + detail * self.detail


@dataclass(frozen=True)
class _Run:
    vae: AutoencoderKL
    method: Method
    steps: int
    progress: Callable[[], object] | None

    def layers(self, images: torch.Tensor, missing: torch.Tensor, trial: Layers | None = None) -> Layers:
        """The layers of a hole, from what is known outside it; Adam goes on from a trial's latents."""
        membrane, plate = (extend(images, missing, order=order) for order in (1, 2))  # each (1, C, H, W)
        if self.method == "optimise":
            latents, decoded = self._optimise(images, missing, membrane, trial)
        else:
            latents, decoded = self._project(images, missing, membrane)
        decoded = decoded.to(images.device)
        # detail: what the decoded image has in the hole beyond its own surroundings, so that a decoder whose
        # colours or brightness are off leaves no edge around the hole
        return Layers(membrane, plate, decoded, decoded - extend(decoded, missing), latents)

    @torch.no_grad()
    def _project(
        self, images: torch.Tensor, missing: torch.Tensor, start: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Encode and decode, with the known pixels put back before each time; one pass begins with grey."""
        decoded = torch.full_like(start, GREY) if self.method == "one_pass" else start
        for _ in range(self.steps):
            filled = torch.where(missing, decoded.to(images), images)  # where: missing ones may be NaN
            posterior, padding = encode(self.vae, filled)
            decoded = decode(self.vae, posterior.mode(), padding)
            self._report()
        return posterior.mode(), decoded

    def _optimise(
        self, images: torch.Tensor, missing: torch.Tensor, start: torch.Tensor, trial: Layers | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Adam, its rate falling to zero, on the squared error of known pixels."""
        with torch.no_grad():
            posterior, padding = encode(self.vae, start)
        origin = posterior.mode()  # (1, c, h, w)
        spread = origin.std().clamp_min(1e-6) if origin.numel() > 1 else origin.new_ones(())  # of one: NaN
        steps = self.steps if trial is None else -(-self.steps // AGAIN)
        first = LEARNING_RATE * steps / self.steps  # on with the rate of the trial's last third
        latents = (origin if trial is None else trial.latents).clone().requires_grad_(True)
        adam = torch.optim.Adam([latents], lr=1.0)
        known = (~missing).to(self.vae.device)  # (H, W)
        wanted = images.masked_fill(missing, 0.0).to(self.vae.device)
        count = known.sum() * images.shape[1]  # of known values: the loss does not depend on the hole's size
        for step in range(steps):
            adam.param_groups[0]["lr"] = float(first * spread) * (1 - step / steps)
            with torch.enable_grad():
                error = (decode(self.vae, latents, padding) - wanted) * known
                loss = error.square().sum() / count
                loss = loss + STAY * ((latents - origin) / spread).square().mean()
            # asked for by name, so that the model's own gradients are neither computed nor touched
            (latents.grad,) = torch.autograd.grad(loss, [latents])
            adam.step()
            self._report()
        with torch.no_grad():
            return latents.detach(), decode(self.vae, latents, padding)

    def _report(self) -> None:
        if self.progress is not None:
            self.progress()


def elsewhere(missing: torch.Tensor, seed: int = 0) -> torch.Tensor:
    """Known pixels (H, W) to hide for a trial: the same hole, moved to where most of it is known.

    Of a scattered hole only so many that the density of known pixels stays about what it was.
    """
    height, width = missing.shape
    shifts = [(y, x) for y in range(4) for x in range(4) if y or x]
    moved = [
        missing.roll((y * height // 4, x * width // 4), (0, 1)) & ~missing for y, x in shifts
    ]  # rolled over the edge a hole is two smaller ones, no matter
    best = max(moved, key=lambda hole: int(hole.sum()))  # the one that lies most on known pixels
    if is_solid(missing):
        keep = best
    else:
        share = HELD_OUT * float((~missing).sum()) / max(int(best.sum()), 1)
        draw = torch.rand(missing.shape, generator=torch.Generator().manual_seed(seed))
        keep = best & (draw < share).to(missing.device)
    # some pixel must stay known, or there is nothing to extend
    return keep if not (keep | missing).all() else torch.zeros_like(missing)


def is_solid(missing: torch.Tensor) -> bool:
    """Whether a hole contains a whole square of SOLID pixels' side."""
    if min(missing.shape) < SOLID:
        return False
    known = (~missing)[None, None].float()
    return bool((max_pool2d(known, SOLID, stride=1) == 0).any())  # a square whose largest `known` is 0


def fit_weights(layers: Layers, images: torch.Tensor, hidden: torch.Tensor) -> tuple[float, float]:
    """Weights (plate, detail), each in 0..1, that are least squares over hidden pixels (H, W)."""
    names = (layers.plate - layers.membrane, layers.detail, images - layers.membrane)
    # in this order, because MPS has no float64
    plate, detail, wanted = (layer[..., hidden].flatten().cpu().double() for layer in names)  # (N,) each
    columns = torch.stack([plate, detail])  # (2, N)
    gram, right = columns @ columns.T, columns @ wanted  # the normal equations, (2, 2) and (2,)
    candidates = [(float(p), float(d)) for p in (0.0, 1.0) for d in (0.0, 1.0)]
    for fixed in (0.0, 1.0):  # the best on each edge of the square, and inside it
        candidates += [(fixed, _share(right[1] - fixed * gram[0, 1], gram[1, 1]))]
        candidates += [(_share(right[0] - fixed * gram[0, 1], gram[0, 0]), fixed)]
    # gelsd: also where both columns are alike, as of a model that adds nothing, and gram has no inverse
    inner = torch.linalg.lstsq(gram, right[:, None], driver="gelsd").solution[:, 0]
    if bool(((inner >= 0) & (inner <= 1)).all()):
        candidates.append((float(inner[0]), float(inner[1])))

    def loss(weights: tuple[float, float]) -> float:
        vector = torch.tensor(weights, dtype=torch.float64)
        return float(vector @ gram @ vector - 2 * vector @ right)

    return min(candidates, key=loss)


def _share(above: torch.Tensor, below: torch.Tensor) -> float:
    return float((above / below).clamp(0, 1)) if float(below) > 0 else 0.0


def hole_psnr(filled: torch.Tensor, images: torch.Tensor, missing: torch.Tensor) -> float:
    """PSNR in dB over the missing pixels (H, W) alone of two (1, C, H, W) in 8 bits; inf if equal."""
    missing = missing.cpu()
    found, wanted = (to_uint8(each.cpu()).float()[..., missing] for each in (filled, images))
    return float(10 * (255**2 / (found - wanted).square().mean()).log10())


@torch.no_grad()
def extend(images: torch.Tensor, missing: torch.Tensor, *, order: int = 1) -> torch.Tensor:
    """Continue known pixels into the missing ones as smoothly as can be; known pixels are kept bit for bit.

    Order 1 solves Laplace's equation in the hole (a membrane: never beyond the values around it). Order 2
    solves the biharmonic equation (a thin plate: continues slopes, better between scattered pixels, worse
    across large holes). Conjugate gradients from a pyramid of means.

    Args:
        images: (B, C, H, W) float; what missing pixels hold is not looked at, and may be NaN.
        missing: (H, W) bool, True where a pixel is to be found.
        order: 1 or 2.

    Raises:
        ImageError: no pixel is known, the sizes differ, or another order.
    """
    if order not in (1, 2):
        raise ImageError(f"order {order} came, but 1 (membrane) or 2 (thin plate) was wanted.")
    check_missing(images, missing)
    known = ~missing.to(images.device)
    values = images.masked_fill(~known, 0.0)  # missing ones may be NaN, which times 0 is NaN
    if known.all():
        return values
    # conjugate gradients over the missing pixels alone: known ones are the boundary, and `inside` keeps them
    inside = (~known).to(values.dtype)  # (H, W)
    found = _pyramid(values, known.expand_as(values[:1, :1]))
    residual = -inside * _stiffness(found, order)  # (B, C, H, W)
    direction, square = residual.clone(), _norm(residual)
    goal = TOLERANCE**2 * square
    for _ in range(MAX_ITERATIONS):
        if bool((square <= goal).all()):  # of every image and channel, each a problem of its own
            break
        bent = inside * _stiffness(direction, order)
        length = square / (direction * bent).sum((-2, -1), keepdim=True).clamp_min(1e-30)
        found, residual = found + length * direction, residual - length * bent
        before, square = square, _norm(residual)
        direction = residual + square / before.clamp_min(1e-30) * direction
    return torch.where(known, values, found)  # bit for bit, whatever rounding did


def _pyramid(values: torch.Tensor, known: torch.Tensor) -> torch.Tensor:
    """Fill missing pixels with the mean of what is known around them, at the finest scale that has any."""
    if bool(known.all()):
        return values
    weight = known.to(values.dtype)

    def halve(x: torch.Tensor) -> torch.Tensor:
        return avg_pool2d(x, 2, ceil_mode=True, count_include_pad=False)

    share = halve(weight)  # of each four pixels, how much is known
    coarse = _pyramid(halve(values * weight) / share.clamp_min(1e-9), share > 0)
    height, width = values.shape[-2:]
    size = (2 * coarse.shape[-2], 2 * coarse.shape[-1])  # one more than odd sides, and cut off again
    wide = interpolate(coarse, size=size, mode="bilinear")[..., :height, :width]
    return torch.where(known, values, wide)


def _stiffness(values: torch.Tensor, order: int) -> torch.Tensor:
    """The graph Laplacian, once or twice; nothing flows over the edges of the image."""
    for _ in range(order):
        padded = pad(values, (1, 1, 1, 1), mode="replicate")  # a neighbour that is alike: nothing flows
        across = padded[..., 1:-1, :-2] + padded[..., 1:-1, 2:]
        along = padded[..., :-2, 1:-1] + padded[..., 2:, 1:-1]
        values = 4 * values - across - along
    return values


def _norm(residual: torch.Tensor) -> torch.Tensor:
    return residual.square().sum((-2, -1), keepdim=True)


def fill_in_windows(
    vae: AutoencoderKL, images: torch.Tensor, missing: torch.Tensor, side: int = 512, **options: Any
) -> Filling:
    """Complete an image as `fill` does, in overlapping windows that are blended; known pixels are kept.

    Windows without missing pixels are left out; one in which no pixel is known keeps the smooth extension.
    Not the numbers of `fill` on the whole image: each window has latents and weights of its own.

    Args:
        vae: any AutoencoderKL.
        images: (1, C, H, W) in [-1, 1].
        missing: (H, W) bool.
        side: of a window in pixels, 64 or more; an image no larger is one window.
        options: of `fill`.

    Returns:
        A filling whose `plate` and `detail` are means over the windows.

    Raises:
        ImageError, LatentVAEError: as `fill`; or a side below 64.
    """
    if side < SMALLEST_WINDOW:
        raise LatentVAEError(f"windows of {side} pixels came; {SMALLEST_WINDOW} or more were wanted.")
    if max(images.shape[-2:]) <= side:
        return fill(vae, images, missing, **options)
    check_missing(images, missing)
    smooth = extend(images, missing)  # over the whole image: a window may have no known pixel of its own
    blends = {name: _Blend(smooth) for name in ("images", "smooth", "decoded")}
    weights = []
    for window in windows(missing.shape[0], missing.shape[1], side):
        hole = window.of(missing)
        if not hole.any() or hole.all():
            continue  # nothing to do, or nothing to go by
        part = fill(vae, window.of(images), hole, **options)
        weights.append((part.plate, part.detail))
        for name, blend in blends.items():
            blend.add(window, getattr(part, name).to(smooth))
    # no window had both kinds of pixels: only the smooth extension is left
    plate, detail = torch.tensor(weights or [(0.0, 0.0)]).mean(0).tolist()
    found = {name: blend.result() for name, blend in blends.items()}
    filled = torch.where(missing.to(images.device), found["images"], images)
    return Filling(filled, found["smooth"], found["decoded"], plate, detail)


@dataclass(frozen=True)
class Window:
    """A part of an image, and which part of it no neighbour shares."""

    top: int
    left: int
    height: int
    width: int

    def of(self, images: torch.Tensor) -> torch.Tensor:
        """A view of (..., H, W)."""
        return images[..., self.top : self.top + self.height, self.left : self.left + self.width]

    def weights(self) -> torch.Tensor:
        """(height, width): 1 in the middle, falling to almost 0 at the sides, so that neighbours blend."""
        height, width = (_ramp(side) for side in (self.height, self.width))
        return height[:, None] * width


@dataclass
class _Blend:
    """Pictures as sums of weighted windows, begun with what no window will cover."""

    start: torch.Tensor
    total: torch.Tensor = field(init=False)
    weight: torch.Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.total = torch.zeros_like(self.start)
        self.weight = torch.zeros_like(self.start[:1, :1])

    def add(self, window: Window, images: torch.Tensor) -> None:
        weights = window.weights().to(images)
        window.of(self.total).add_(weights * images)
        window.of(self.weight).add_(weights)

    def result(self) -> torch.Tensor:
        covered = self.weight > 0
        return torch.where(covered, self.total / self.weight.where(covered, torch.ones(())), self.start)


def windows(height: int, width: int, side: int) -> Iterator[Window]:
    """Windows of at most `side` pixels that cover an image and overlap by a quarter or more."""
    for top in _starts(height, side):
        for left in _starts(width, side):
            yield Window(top, left, min(side, height), min(side, width))


def _starts(length: int, side: int) -> list[int]:
    if length <= side:
        return [0]
    # as many as overlap by a quarter, then spread evenly: the last one ends where the image does
    count = -(-(length - side) // (side - side // OVERLAP)) + 1
    return [round(number * (length - side) / (count - 1)) for number in range(count)]


def _ramp(side: int) -> torch.Tensor:
    reach = side // OVERLAP
    nearest = torch.minimum(torch.arange(side), torch.arange(side).flip(0)) + 1.0  # 1 at the sides, never 0
    return (nearest / (reach + 1)).clamp(max=1.0)
