"""A small latent diffusion prior: diffusers' UNet2DModel, trained on a latent store in a plain loop."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DDIMPipeline, DDIMScheduler, UNet2DModel
from diffusers.optimization import get_cosine_schedule_with_warmup
from diffusers.training_utils import EMAModel
from safetensors import SafetensorError
from tqdm import tqdm

from latentvae.base.errors import LatentVAEError
from latentvae.toolbox.priors.latent_set import LatentSet
from latentvae.toolbox.priors.prior import Prior, PriorCard, card_of

NOISE_LEVELS = 1000  # of training, DDPM's
GROUPS = 8
ATTENTION_SIDE = 16  # latents: attention at this size of map and below; its cost grows with the square
SHOWN = 0.98  # smoothing of the loss that the bar shows


@dataclass(frozen=True)
class DiffusionSettings:
    """How a diffusion prior is trained; every default carries its reason."""

    steps: int = 2000  # of the optimizer: minutes on a CPU for 4x4 latents
    batch_size: int = 64
    lr: float = 1e-3  # small networks bear larger steps than the usual 1e-4
    warmup_steps: int = 100  # Adam's second moments are noise before
    ema_decay: float = 0.995  # averages the last 200 steps; warms up in shorter runs
    width: int = 64  # channels of the first level, doubled from the second on
    layers: int = 1  # residual blocks of each level
    by_class: bool = False  # condition on the store's labels
    sampling_steps: int = 50  # of DDIM
    seed: int = 0


class DiffusionPrior(Prior):
    """A denoising network and its sampler.

    The folder is a stock diffusers pipeline of `unet/` and `scheduler/`: DDIM, v-prediction (Salimans & Ho
    2022) on the cosine schedule (Nichol & Dhariwal 2021), so that the last noise level is noise alone.
    """

    def __init__(self, card: PriorCard, unet: UNet2DModel, scheduler: DDIMScheduler) -> None:
        super().__init__(card)
        self.unet, self.scheduler = unet.eval().requires_grad_(False), scheduler

    def to(self, device: torch.device) -> "DiffusionPrior":
        self.unet.to(device)
        return self

    @torch.no_grad()
    def draw(self, numbers: Sequence[int], seed: int, labels: Sequence[int] | None = None) -> torch.Tensor:
        """As `Prior.draw`. Each batch has rounding of its own (1e-6), so `sample` keeps batches the same."""
        device = self.unet.device
        x = self.noise(numbers, seed).to(device)  # (B, C, h, w)
        classes = self._classes(numbers, seed, labels)
        self.scheduler.set_timesteps(self.card.fit["sampling_steps"])
        for t in self.scheduler.timesteps:
            predicted = self.unet(x, t, class_labels=classes).sample
            x = self.scheduler.step(predicted, t, x, eta=0.0).prev_sample  # eta 0: no noise but the first
        return x.float().cpu()

    def labels_of(self, numbers: Sequence[int], seed: int) -> list[int] | None:
        """As `Prior.labels_of`, each label as often as among the images learned from."""
        if self.card.labels is None or self.card.label_counts is None:
            return None
        # each draw from (seed, n) alone, so that more draws leave the first ones as they are
        ends = np.cumsum(self.card.label_counts) / sum(self.card.label_counts)
        picks = [np.random.default_rng((seed, n)).random() for n in numbers]
        return [self.card.labels[int(np.searchsorted(ends[:-1], pick, side="right"))] for pick in picks]

    def _classes(self, numbers: Sequence[int], seed: int, labels: Sequence[int] | None) -> Any:
        """Places of the labels (B,) among the network's embeddings; None for a network without classes."""
        wanted = self.labels_of(numbers, seed) if labels is None else labels
        if wanted is None or self.card.labels is None:
            return None
        return torch.tensor([self.card.labels.index(label) for label in wanted], device=self.unet.device)

    def write(self, folder: Path) -> None:
        DDIMPipeline(self.unet, self.scheduler).save_pretrained(folder, safe_serialization=True)

    @staticmethod
    def read(folder: Path, card: PriorCard) -> "DiffusionPrior":
        """Of a folder. Raises LatentVAEError where diffusers cannot load it."""
        try:
            unet = UNet2DModel.from_pretrained(folder, subfolder="unet", use_safetensors=True)
            scheduler = DDIMScheduler.from_pretrained(folder, subfolder="scheduler")
            _check_fit(card, unet)
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            raise LatentVAEError(
                f"the network in {folder} cannot be loaded ({error}): make the prior again with "
                "`latentvae prior fit`."
            ) from error
        return DiffusionPrior(card, unet, scheduler)


def _check_fit(card: PriorCard, unet: UNet2DModel) -> None:
    """Raise ValueError where the card and the network are not of one prior."""
    if unet.config["in_channels"] != card.latent_shape[0]:
        raise ValueError(
            f"it takes {unet.config['in_channels']} channels, but prior.json says {card.latent_shape[0]}"
        )
    if (card.labels and len(card.labels)) != unet.config["num_class_embeds"]:
        raise ValueError(
            f"it has {unet.config['num_class_embeds']} classes, but prior.json says {card.labels}"
        )
    if not isinstance(card.fit.get("sampling_steps"), int):
        raise ValueError("prior.json lacks fit.sampling_steps")


def fit_diffusion(
    latents: LatentSet,
    settings: DiffusionSettings | None = None,
    *,
    device: str | torch.device = "cpu",
    progress: bool = True,
) -> DiffusionPrior:
    """Train a network to denoise the latents of a store; its averaged weights become the prior.

    Step n draws its images, noise and noise levels from (seed, n) alone. Ctrl-C ends the training early: what
    was learned by then becomes the prior, and its card's fit["steps_done"] is below fit["steps"].

    Raises:
        LatentVAEError: settings out of range, a loss that is not finite, or labels wanted and missing.
    """
    settings = settings or DiffusionSettings()
    check_settings(settings)
    classes = latents.classes() if settings.by_class else None
    with torch.random.fork_rng(devices=[]):  # the caller's draws go on as before
        torch.manual_seed(settings.seed)
        unet = build_unet(latents.shape, settings, len(classes) if classes else None).to(device)
    # the network counts classes from 0; labels of a store are any numbers
    places = torch.searchsorted(torch.tensor(classes), latents.labels) if classes else None
    losses = _train(unet, latents, places, settings, progress)
    fit = {
        **asdict(settings),
        "steps_done": len(losses),
        "parameters": sum(parameter.numel() for parameter in unet.parameters()),
        "loss": float(np.mean(losses[-100:])),  # of one step it depends on the noise levels drawn
    }
    return DiffusionPrior(card_of(latents, "diffusion", fit, settings.by_class), unet.cpu(), make_scheduler())


def _train(
    unet: UNet2DModel,
    latents: LatentSet,
    places: torch.Tensor | None,
    settings: DiffusionSettings,
    progress: bool = True,
) -> list[float]:
    """Train in place and leave the averaged weights; the loss of every step done, fewer after Ctrl-C."""
    optimizer = torch.optim.AdamW(unet.parameters(), lr=settings.lr, betas=(0.9, 0.99), weight_decay=0.01)
    schedule = get_cosine_schedule_with_warmup(optimizer, settings.warmup_steps, settings.steps)
    average = EMAModel(unet.parameters(), decay=settings.ema_decay)  # its decay warms up: (1 + n) / (10 + n)
    scheduler, losses, shown = make_scheduler(), list[float](), 1.0
    unet.train()
    title = f"diffusion, seed {settings.seed}"
    with tqdm(range(settings.steps), unit="step", desc=title, disable=not progress) as bar:
        try:
            for step in bar:
                loss = _loss(unet, scheduler, latents, places, settings, step)
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
                optimizer.step()
                schedule.step()
                average.step(unet.parameters())
                losses.append(loss.item())
                if not np.isfinite(losses[-1]):
                    raise LatentVAEError(f"the loss is {losses[-1]} at step {step}: lower the learning rate.")
                shown = SHOWN * shown + (1 - SHOWN) * losses[-1]
                bar.set_postfix(loss=f"{shown:.3f}", refresh=False)
        except KeyboardInterrupt:
            if not losses:  # nothing to keep
                raise
    average.copy_to(unet.parameters())
    return losses


def _loss(
    unet: UNet2DModel,
    scheduler: DDIMScheduler,
    latents: LatentSet,
    places: torch.Tensor | None,
    settings: DiffusionSettings,
    step: int,
) -> torch.Tensor:
    """Mean squared error of the predicted velocity at a step's images and noise levels."""
    x, noise, t, numbers = _batch(latents, step, settings, unet.device)
    labels = places[numbers].to(unet.device) if places is not None else None
    predicted = unet(scheduler.add_noise(x, noise, t), t, class_labels=labels).sample
    return torch.nn.functional.mse_loss(predicted.float(), scheduler.get_velocity(x, noise, t))


def _batch(
    latents: LatentSet, step: int, settings: DiffusionSettings, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Latents, noise, noise levels and image numbers of a step, from (seed, step) alone."""
    random = np.random.default_rng((settings.seed, step))
    count = settings.batch_size
    numbers = random.integers(len(latents), size=count)
    # noise twice: a sample of each posterior, so that its width is learned too, and what is to be taken away
    draws = torch.from_numpy(random.standard_normal((2, count, *latents.shape), np.float32))
    t = torch.from_numpy(random.integers(NOISE_LEVELS, size=count)).to(device)
    return latents.draw(numbers, draws[0]).to(device), draws[1].to(device), t, torch.from_numpy(numbers)


def build_unet(
    shape: tuple[int, int, int], settings: DiffusionSettings, classes: int | None = None
) -> UNet2DModel:
    """An untrained network for latents (C, h, w): as many levels as halve both sides down to 2."""
    channels, height, width = shape
    levels = 1
    while levels < 4 and height % 2**levels == width % 2**levels == 0 and min(height, width) >> levels >= 2:
        levels += 1
    small = [max(height, width) >> level <= ATTENTION_SIDE for level in range(levels)]
    return UNet2DModel(
        sample_size=(height, width) if height != width else height,
        in_channels=channels,
        out_channels=channels,
        layers_per_block=settings.layers,
        block_out_channels=tuple(settings.width * min(2, level + 1) for level in range(levels)),
        down_block_types=tuple("AttnDownBlock2D" if each else "DownBlock2D" for each in small),
        up_block_types=tuple("AttnUpBlock2D" if each else "UpBlock2D" for each in reversed(small)),
        attention_head_dim=min(32, settings.width),
        norm_num_groups=GROUPS,
        num_class_embeds=classes,
    )


def make_scheduler() -> DDIMScheduler:
    """The noise of training and the sampler: DDIM over the cosine schedule, beginning at noise alone."""
    return DDIMScheduler(
        num_train_timesteps=NOISE_LEVELS,
        beta_schedule="squaredcos_cap_v2",
        prediction_type="v_prediction",
        timestep_spacing="trailing",
        clip_sample=False,  # latents have no bounds
    )


def check_settings(settings: DiffusionSettings) -> None:
    """Raises LatentVAEError for what cannot be trained."""
    whole = {name: getattr(settings, name) for name in ("steps", "batch_size", "layers", "sampling_steps")}
    for name, value in whole.items():
        if value < 1:
            raise LatentVAEError(f"{name}={value} came; wanted 1 or more.")
    if settings.sampling_steps > NOISE_LEVELS:
        raise LatentVAEError(f"sampling_steps={settings.sampling_steps} came; wanted 1 to {NOISE_LEVELS}.")
    if settings.width < 2 * GROUPS or settings.width % GROUPS:  # groups of one channel would erase its mean
        raise LatentVAEError(f"width={settings.width} came; wanted 16 or more, a multiple of {GROUPS}.")
    if not settings.lr > 0:
        raise LatentVAEError(f"lr={settings.lr} came; wanted a number above 0.")
