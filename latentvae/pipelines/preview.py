"""Pictures of every step of a diffusion pipeline while it runs: the clean latents it heads for, decoded."""

import functools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from PIL import Image

from latentvae.base.errors import LatentVAEError
from latentvae.images.saving import save_picture, to_pil
from latentvae.models.loading import bundled, load
from latentvae.models.spaces import decode_scaled, space_of
from latentvae.pipelines.checks import SwapError, find_denoiser, find_vae, packs

PACKED = 2  # Flux makes one token of 2 x 2 latent pixels


class Preview:
    """A `callback_on_step_end` that shows what the picture will be, step by step.

    Latents are noisy until the last step; the estimate of the clean ones is a picture from the first on. It
    follows from what the scheduler is given (latents and the denoiser's output, guidance included), so the
    scheduler's `step` is listened to while the pipeline runs. Nothing of the result changes.

    Use `preview`. As a context manager, or by `close`, the pipeline is left as it was.
    """

    def __init__(
        self,
        pipe: Any,
        output: str | Path | None,
        vae: AutoencoderKL,
        every: int,
        on_picture: Callable[[int, Image.Image], object] | None,
    ) -> None:
        self.pipe, self.vae, self.every, self.on_picture = pipe, vae, every, on_picture
        self.folder = None if output is None else Path(output)
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
        self.picture: Image.Image | None = None
        self.seconds = 0.0  # spent here since the start
        self._began = time.perf_counter()
        self._clean: torch.Tensor | None = None
        self._ids: torch.Tensor | None = None  # Flux's: rows and columns of tokens
        self._scheduler_step = pipe.scheduler.step
        pipe.scheduler.step = self._listening()
        self._hook = None
        if packs(pipe):
            _, denoiser = find_denoiser(pipe)
            self._hook = denoiser.register_forward_pre_hook(self._remember_ids, with_kwargs=True)

    def __call__(self, pipe: Any, step: int, timestep: Any, arguments: dict[str, Any]) -> dict[str, Any]:
        """What diffusers calls after every step; returns the arguments as they came."""
        start = time.perf_counter()
        if self._clean is not None and step % self.every == 0:
            self.picture = self._draw(self._clean)
            if self.folder is not None:
                save_picture(self.picture, self.folder / f"step-{step:04d}.png")
            if self.on_picture is not None:
                self.on_picture(step, self.picture)
        self.seconds += time.perf_counter() - start
        return arguments

    @property
    def share(self) -> float:
        """Of the time since `preview` was called, how much went into pictures: 0 to 1."""
        return self.seconds / max(time.perf_counter() - self._began, 1e-9)

    def close(self) -> None:
        """Stop listening."""
        self.pipe.scheduler.__dict__.pop("step", None)
        if self._hook is not None:
            self._hook.remove()

    def __enter__(self) -> "Preview":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _listening(self) -> Callable[..., Any]:
        """The scheduler's step, with a look at what it is given."""

        # with its signature: pipelines look into it for `eta` and `generator`
        @functools.wraps(self._scheduler_step)
        def step(
            model_output: torch.Tensor, timestep: Any, sample: torch.Tensor, *rest: Any, **more: Any
        ) -> Any:
            start = time.perf_counter()
            self._clean = predicted_clean(self.pipe.scheduler, model_output, timestep, sample)
            self.seconds += time.perf_counter() - start
            return self._scheduler_step(model_output, timestep, sample, *rest, **more)

        return step

    def _remember_ids(self, module: Any, arguments: Any, named: dict[str, Any]) -> None:
        self._ids = named.get("img_ids")

    @torch.no_grad()
    def _draw(self, latents: torch.Tensor) -> Image.Image:
        if latents.ndim == 3:
            latents = self._unpack(latents)
        images = (
            decode_scaled(self.vae, latents[:, : self.vae.config["latent_channels"]])
            .float()
            .clamp(-1, 1)
            .cpu()
        )
        return to_pil(torch.cat(list(images), 2))  # of a batch side by side

    def _unpack(self, tokens: torch.Tensor) -> torch.Tensor:
        """Flux's tokens (B, rows * columns, 4 c) as latents (B, c, 2 rows, 2 columns)."""
        batch, count, channels = tokens.shape
        if self._ids is None:
            raise LatentVAEError(
                "the pipeline packs its latents, and its denoiser was not told their places."
            )
        own = self._ids.reshape(-1, 3)[:count]  # of an image that is edited there are more
        rows, columns = (int(own[:, axis].max()) + 1 for axis in (1, 2))
        parts = tokens.view(batch, rows, columns, channels // PACKED**2, PACKED, PACKED)
        return parts.permute(0, 3, 1, 4, 2, 5).reshape(batch, -1, PACKED * rows, PACKED * columns)


def preview(
    pipe: Any,
    output: str | Path | None = None,
    *,
    vae: AutoencoderKL | str | None = None,
    every: int = 1,
    on_picture: Callable[[int, Image.Image], object] | None = None,
) -> Preview:
    """Pictures of every step: `pipe(prompt, callback_on_step_end=latentvae.preview(pipe, "previews/"))`.

    Args:
        pipe: SD, SDXL, SD3, FLUX and others whose scheduler predicts noise, velocity, flow or the sample.
        output: folder for step-0000.png, ...; None writes nothing.
        vae: what decodes; its decoder must speak the latent space of the pipeline. A name or a model; None
            takes the bundled model of the space that the pipeline's VAE names, else the pipeline's own VAE.
        every: draw only each so many steps.
        on_picture: called with the step and its picture.

    Returns:
        The callback; its `picture` is the newest, `share` the part of the time that pictures took, `close()`
        ends it.

    Raises:
        SwapError: not a pipeline with a VAE and a scheduler.
    """
    if every < 1:
        raise LatentVAEError(f"every={every} came; wanted 1 or more steps.")
    _, own = find_vae(pipe)
    if getattr(pipe, "scheduler", None) is None:
        raise SwapError(f"{type(pipe).__name__} has no scheduler, whose steps could be shown.")
    if vae is None:
        vae = _small_sibling(own)
    if isinstance(vae, str):
        vae = load(vae, dtype=own.dtype, device=own.device)
    return Preview(pipe, output, vae, every, on_picture)


def _small_sibling(own: AutoencoderKL) -> AutoencoderKL | str:
    space = space_of(own)
    name = f"{space.name}-small" if space else ""
    return name if name in bundled() else own


def predicted_clean(
    scheduler: Any, model_output: torch.Tensor, timestep: Any, sample: torch.Tensor
) -> torch.Tensor:
    """The clean latents that a scheduler's step heads for, before it is taken.

    Args:
        scheduler: any of diffusers' whose config has a prediction_type, or a flow-matching one.
        model_output: of the denoiser, guidance applied.
        timestep: as the scheduler gets it.
        sample: noisy latents, of the same shape.
    """
    config = scheduler.config
    if "FlowMatch" in type(scheduler).__name__ or config.get("use_flow_sigmas"):
        return sample - _sigma(scheduler, timestep).to(sample) * model_output  # x = (1 - s) x0 + s noise
    kind = config.get("prediction_type", "epsilon")
    if kind == "sample":
        return model_output
    if _counts_in_sigmas(scheduler):
        sigma = _sigma(scheduler, timestep).to(sample)  # x = x0 + sigma noise
        if kind == "v_prediction":
            return sample / (sigma**2 + 1) - model_output * sigma / (sigma**2 + 1).sqrt()
        return sample - sigma * model_output
    kept = scheduler.alphas_cumprod[int(timestep)].to(sample)  # x = sqrt(kept) x0 + sqrt(1 - kept) noise
    if kind == "v_prediction":
        return kept.sqrt() * sample - (1 - kept).sqrt() * model_output
    return (sample - (1 - kept).sqrt() * model_output) / kept.sqrt()


def _counts_in_sigmas(scheduler: Any) -> bool:
    """Whether its latents grow with sigma (Euler, Heun, LMS, ...); DDIM's and DPM++'s keep unit variance."""
    return hasattr(scheduler, "sigmas") and not hasattr(scheduler, "lower_order_nums")


def _sigma(scheduler: Any, timestep: Any) -> torch.Tensor:
    """Of the step that is about to be taken."""
    if scheduler.step_index is None:
        scheduler._init_step_index(timestep)
    return scheduler.sigmas[scheduler.step_index]
