"""Whether a VAE's latents are easy to diffuse: what a small diffusion model makes of them.

Skorokhodov et al. 2025 call it diffusability. The same small network is trained on each VAE's latents for the
same steps, with several seeds, whose spread says which differences are noise. Latents are normalised per
channel, so that denoising losses compare between VAEs of one shape; the distance is of pictures, so it
compares between all. It is the Frechet distance of LPIPS's features, averaged over positions, of samples to
training images: not FID, and of use within one table only.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from statistics import fmean
from typing import Any

import torch
from diffusers import AutoencoderKL
from torch.nn.functional import mse_loss
from tqdm import tqdm

from latentvae.measure.evaluate import Evaluator
from latentvae.measure.lpips import LPIPS
from latentvae.measure.rfid import FeatureStatistics, frechet_distance
from latentvae.models.latents import decode, seeded_noise
from latentvae.toolbox.priors.diffusion import NOISE_LEVELS, DiffusionPrior, DiffusionSettings, fit_diffusion
from latentvae.toolbox.priors.latent_set import LatentSet

BATCH = 32
# a small network: what is asked is how the VAEs differ, and not how good a model could become
SETTINGS = DiffusionSettings(
    steps=300, batch_size=BATCH, width=32, warmup_steps=15, ema_decay=0.99, sampling_steps=20
)


@dataclass(frozen=True)
class Run:
    """One diffusion model on one VAE's latents."""

    seed: int
    loss: float  # of v, on images not trained on, mean over noise levels; 1 of a model that says nothing
    frechet: float | None  # of its samples; None without LPIPS


@dataclass(frozen=True)
class Diffusability:
    """One VAE's figures; those with noise are means over seeds, with half of the distance between seeds."""

    model: str
    latents: tuple[int, int, int]  # (C, h, w)
    psnr: float  # of reconstructions of images not trained on
    lpips: float | None
    rebuilt_frechet: float | None  # of those: what no diffusion model can do much better than
    parameters: int  # of the diffusion model
    runs: tuple[Run, ...]

    def mean(self, figure: str) -> tuple[float, float] | None:
        """Mean of "loss" or "frechet" over seeds, and half of the distance of the largest to the smallest."""
        values = [getattr(run, figure) for run in self.runs]
        if not values or None in values:
            return None
        return fmean(values), (max(values) - min(values)) / 2


class Bench:
    """Pictures to train on and others to judge by, in memory, and the small model's settings.

    Args:
        train: (N, C, S, S) in [-1, 1], on the CPU.
        val: likewise, other images.
        lpips: of `load_lpips`, or None to leave distances out.
        settings: of the diffusion model; its seed is set by each run.
        samples: pictures that each model draws.
    """

    def __init__(
        self,
        train: torch.Tensor,
        val: torch.Tensor,
        lpips: LPIPS | None = None,
        settings: DiffusionSettings = SETTINGS,
        samples: int = 128,
    ) -> None:
        self.train, self.val, self.lpips = train, val, lpips
        self.settings, self.samples = settings, samples
        self.wanted = None if lpips is None else statistics(lpips, train.split(BATCH), "features")

    @property
    def photographs(self) -> float | None:
        """The distance of the images that are judged by: how near pictures can come."""
        return self.distance(self.val.split(BATCH))

    def distance(self, batches: Sequence[torch.Tensor]) -> float | None:
        """The distance of pictures to the training images; None without LPIPS."""
        if self.lpips is None or self.wanted is None:
            return None
        found = statistics(self.lpips, batches)
        return frechet_distance(found.mean, found.covariance, self.wanted.mean, self.wanted.covariance)

    def latents(self, vae: AutoencoderKL) -> tuple[LatentSet, LatentSet]:
        """Those of both sets, normalised by the training set's figures."""
        train = LatentSet.of(vae, tqdm(self.train.split(BATCH), desc="encoding", leave=False))
        val = LatentSet.of(vae, self.val.split(BATCH))
        val.mean, val.std = train.mean, train.std
        return train, val

    def seconds(self, train: LatentSet, device: torch.device) -> float:
        """About how long one seed takes on these latents, from a few steps."""
        probe = partial(fit_diffusion, train, device=device, progress=False)
        times = []
        for steps in (1, 3):  # the difference: the first step costs more
            start = time.perf_counter()
            probe(replace(self.settings, steps=steps, warmup_steps=0))
            times.append(time.perf_counter() - start)
        step = (times[1] - times[0]) / 2
        # a third of a step for each sampling step of a batch: there is no backward pass
        sampling = self.settings.sampling_steps * self.samples / self.settings.batch_size / 3
        return max(step, 0.0) * (self.settings.steps + sampling)

    @torch.no_grad()
    def reconstructions(self, vae: AutoencoderKL) -> tuple[float, float | None, float | None]:
        """PSNR, LPIPS and distance of the images that are judged by."""
        evaluator, rebuilt = Evaluator(vae, self.lpips), []
        for number, batch in enumerate(tqdm(self.val.split(BATCH), desc="reconstructing", leave=False)):
            names = [f"{number}-{place}" for place in range(len(batch))]
            rebuilt.append(evaluator.add_batch(names, batch)[0].clamp(-1, 1))
        summary = evaluator.metrics.summary()
        return summary.psnr, summary.lpips, self.distance(rebuilt)

    def run(
        self, vae: AutoencoderKL, train: LatentSet, val: LatentSet, seed: int
    ) -> tuple[Run, DiffusionPrior, list[torch.Tensor]]:
        """One diffusion model, its figures, and the pictures that it draws.

        Raises:
            KeyboardInterrupt: also where training would have kept what was learned by then.
        """
        model = fit_diffusion(train, replace(self.settings, seed=seed), device=vae.device)
        if model.card.fit["steps_done"] < self.settings.steps:
            raise KeyboardInterrupt
        model.to(vae.device)
        drawn = self._draw(vae, model)
        return Run(seed, validation_loss(model, val), self.distance(drawn)), model, drawn

    @torch.no_grad()
    def _draw(self, vae: AutoencoderKL, model: DiffusionPrior) -> list[torch.Tensor]:
        """Decoded samples in batches, from the same noise for every model of one latent shape."""
        pictures = []
        for start in tqdm(range(0, self.samples, BATCH), desc="sampling", leave=False):
            numbers = range(start, min(start + BATCH, self.samples))
            pictures.append(decode(vae, model.latents(numbers, 0).to(vae.device)).float().clamp(-1, 1))
        return pictures


@torch.no_grad()
def validation_loss(model: DiffusionPrior, latents: LatentSet) -> float:
    """Mean squared error of v on every image, at evenly spread noise levels, with the same noise always."""
    x, device = latents.modes(), model.unet.device
    levels = torch.linspace(0, NOISE_LEVELS - 1, len(x)).long()
    noise = seeded_noise(tuple(x.shape), 0, "diffusability", 0)
    total = 0.0
    for part, level, some in zip(x.split(BATCH), levels.split(BATCH), noise.split(BATCH), strict=True):
        clean, t, added = part.to(device), level.to(device), some.to(device)
        predicted = model.unet(model.scheduler.add_noise(clean, added, t), t).sample
        total += mse_loss(predicted, model.scheduler.get_velocity(clean, added, t)).item() * len(part)
    return total / len(x)


@torch.no_grad()
def statistics(lpips: LPIPS, batches: Sequence[torch.Tensor], title: str | None = None) -> FeatureStatistics:
    """Of LPIPS's features of all layers, each averaged over positions."""
    found = None
    for part in tqdm(batches, desc=title, leave=False, disable=title is None):
        maps = lpips.features(part.to(lpips.shift.device))
        features = torch.cat([layer.mean((2, 3)) for layer in maps], dim=1)
        found = found or FeatureStatistics(features.shape[1], features.device)
        found.add(features)
    assert found is not None
    return found


def compare(
    bench: Bench,
    vaes: dict[str, AutoencoderKL],
    seeds: int,
    announce: Callable[[float], Any] = lambda seconds: None,
) -> Iterator[Diffusability]:
    """Each VAE's figures, as soon as all its seeds are done.

    Args:
        bench: the images.
        vaes: by name, on their device.
        seeds: diffusion models of each.
        announce: is told the seconds that all will take, before the first model is trained.
    """
    latents = {name: bench.latents(vae) for name, vae in vaes.items()}
    times = {name: bench.seconds(pair[0], vaes[name].device) for name, pair in latents.items()}
    announce(seeds * sum(times.values()))
    for name, vae in vaes.items():
        train, val = latents[name]
        figures = bench.reconstructions(vae)
        runs, parameters = [], 0
        for seed in range(seeds):
            run, model, _ = bench.run(vae, train, val, seed)
            runs.append(run)
            parameters = model.card.fit["parameters"]
        yield Diffusability(name, train.shape, *figures, parameters, tuple(runs))


def table(photographs: float | None, found: Sequence[Diffusability]) -> str:
    """The figures in Markdown."""
    head = "| VAE | latents | PSNR, dB | LPIPS | its pictures | denoising loss | distance of samples |"
    lines = [head, "|---|---|---|---|---|---|---|"]
    if photographs is not None:
        lines.append(f"| photographs not trained on | | | | {photographs:.4f} | | |")
    for each in found:
        shape = "x".join(map(str, each.latents))
        noisy = (each.mean("loss"), each.mean("frechet"))
        cells = [f"{each.psnr:.2f}", _cell(each.lpips, ".3f"), _cell(each.rebuilt_frechet, ".4f")]
        cells += ["-" if pair is None else f"{pair[0]:.4f} ± {pair[1]:.4f}" for pair in noisy]
        lines.append(f"| {each.model} | {shape} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(value: float | None, form: str) -> str:
    return "-" if value is None else f"{value:{form}}"
