"""Pictures of every step of a diffusion pipeline while it runs: the clean latents it heads for, decoded."""

import functools
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from PIL import Image

from latentvae.base.errors import LatentVAEError
from latentvae.base.files import make_folder
from latentvae.images.saving import save_picture, to_pil
from latentvae.models.latents import Scaling
from latentvae.models.loading import load
from latentvae.models.shipped import bundled
from latentvae.models.spaces import Autoencoder, latent_shape, load_autoencoder, space_name, space_of
from latentvae.pipelines.agree import measure_agreement
from latentvae.pipelines.checks import SwapError, find_denoiser, find_vae, packs, pipeline_scaling

logger = logging.getLogger(__name__)

PACKED = 2  # Flux makes one token of 2 x 2 latent pixels
UNKNOWN_HALF_STEPS = ("DPMSolverSDEScheduler",)  # does not keep where its second half-step is


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
        vae: Autoencoder,
        scaling: Scaling,
        every: int,
        on_picture: Callable[[int, Image.Image], object] | None,
    ) -> None:
        self.pipe, self.vae, self.scaling = pipe, vae, scaling
        self.every, self.on_picture = every, on_picture
        self.folder = None if output is None else make_folder(Path(output))
        self.picture: Image.Image | None = None
        self.seconds = 0.0  # spent here since the start
        self._began = time.perf_counter()
        self._clean: torch.Tensor | None = None
        self._ids: torch.Tensor | None = None  # Flux's: rows and columns of tokens
        self._warned = False
        self._hook = None
        if packs(pipe):
            _, denoiser = find_denoiser(pipe)
            self._hook = denoiser.register_forward_pre_hook(self._remember_ids, with_kwargs=True)
        self._listen()

    def __call__(self, pipe: Any, step: int, timestep: Any, arguments: dict[str, Any]) -> dict[str, Any]:
        """What diffusers calls after every step; returns the arguments as they came."""
        if pipe.scheduler is not self.scheduler:  # exchanged since: go on with the new one
            self._stop_listening()
            self._listen()
        if self._clean is None or step % self.every:
            return arguments
        with self._counted():
            try:
                self._show(step, self._clean)
            except (LatentVAEError, RuntimeError) as error:  # a picture less, not a generation lost
                if not self._warned:
                    logger.warning("no preview of step %d: %s", step, error)
                self._warned = True
        self._clean = None
        return arguments

    @property
    def share(self) -> float:
        """Of the time since `preview` was called, how much went into pictures: 0 to 1."""
        return self.seconds / max(time.perf_counter() - self._began, 1e-9)

    def close(self) -> None:
        """Stop listening."""
        self._stop_listening()
        if self._hook is not None:
            self._hook.remove()

    def __enter__(self) -> "Preview":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _listen(self) -> None:
        """Put a look at what it is given before the scheduler's step."""
        self.scheduler = self.pipe.scheduler
        original = self.scheduler.step

        # with its signature: pipelines look into it for `eta` and `generator`
        @functools.wraps(original)
        def step(
            model_output: torch.Tensor, timestep: Any, sample: torch.Tensor, *rest: Any, **more: Any
        ) -> Any:
            with self._counted():
                self._clean = predicted_clean(self.scheduler, model_output, timestep, sample)
            return original(model_output, timestep, sample, *rest, **more)

        self._step = step
        step.preview = self  # type: ignore[attr-defined]
        self.scheduler.step = step

    def _stop_listening(self) -> None:
        if vars(self.scheduler).get("step") is self._step:
            del self.scheduler.step

    @contextmanager
    def _counted(self) -> Iterator[None]:
        """Count the time inside as ours; what a GPU still computes of the denoiser is waited for before."""
        if self.vae.device.type != "cpu":
            torch.accelerator.synchronize()
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds += time.perf_counter() - start

    def _remember_ids(self, module: Any, arguments: Any, named: dict[str, Any]) -> None:
        self._ids = named.get("img_ids")

    def _show(self, step: int, latents: torch.Tensor) -> None:
        self.picture = self._draw(latents)
        if self.folder is not None:
            save_picture(self.picture, self.folder / f"step-{step:04d}.png")
        if self.on_picture is not None:
            self.on_picture(step, self.picture)

    @torch.no_grad()
    def _draw(self, latents: torch.Tensor) -> Image.Image:
        if latents.ndim == 3:
            latents = self._unpack(latents)
        # float32 first: a factor of 5 in half precision would round twice
        unscaled = self.scaling.unscale(latents[:, : self.vae.config["latent_channels"]].float())
        images = self.vae.decode(unscaled.to(self.vae.device, self.vae.dtype)).sample
        return to_pil(torch.cat(list(images.float().clamp(-1, 1).cpu()), 2))  # of a batch side by side

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
    vae: Autoencoder | str | None = None,
    every: int = 1,
    on_picture: Callable[[int, Image.Image], object] | None = None,
) -> Preview:
    """Pictures of every step: `pipe(prompt, callback_on_step_end=latentvae.preview(pipe, "previews/"))`.

    Args:
        pipe: SD, SDXL, SD3, FLUX and others whose scheduler predicts noise, velocity, flow or the sample.
        output: folder for step-0000.png, ...; None writes nothing.
        vae: what decodes; its decoder must speak the latent space of the pipeline. A model, or what `swap`
            takes by name; None
            takes the bundled model of the space that the pipeline's VAE names, if it draws that VAE's
            latents, else the pipeline's own VAE.
        every: draw only each so many steps.
        on_picture: called with the step and its picture.

    Returns:
        The callback; its `picture` is the newest, `share` the part of the time that pictures took, `close()`
        ends it. An earlier one of the same pipeline ends when the next is made.

    Raises:
        LatentVAEError: not a pipeline with a VAE, a scheduler that says no clean latents, or a VAE of the
            pipeline's that cannot be used beside it.
    """
    if every < 1:
        raise LatentVAEError(f"every={every} came; wanted 1 or more steps.")
    _, own = find_vae(pipe)
    _check_scheduler(pipe)
    earlier = getattr(pipe.scheduler.step, "preview", None)
    if earlier is not None:
        earlier.close()
    device = torch.device(getattr(pipe, "_execution_device", own.device))
    chosen: Any = vae if vae is not None else _small_sibling(own, device) or own
    if isinstance(chosen, str):
        dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
        chosen = load_autoencoder(chosen, device=device, dtype=dtype)
    if chosen is own:
        _check_own(own)
        return Preview(pipe, output, own, pipeline_scaling(pipe, own), every, on_picture)
    _check_channels(own, chosen)
    return Preview(pipe, output, chosen, Scaling.of(chosen.config), every, on_picture)


def _check_scheduler(pipe: Any) -> None:
    scheduler = getattr(pipe, "scheduler", None)
    if scheduler is None:
        raise SwapError(f"{type(pipe).__name__} has no scheduler, whose steps could be shown.")
    name = type(scheduler).__name__
    told = "prediction_type" in scheduler.config or "FlowMatch" in name
    if not told or name in UNKNOWN_HALF_STEPS:
        raise SwapError(
            f"{name} does not say what the clean latents of a step are. Use another scheduler, such as "
            "EulerDiscreteScheduler or DPMSolverMultistepScheduler."
        )


def _check_own(own: Any) -> None:
    """The pipeline's own VAE decodes, but not where that would disturb the pipeline or give no picture."""
    if not isinstance(own, AutoencoderKL | AutoencoderTiny):
        raise SwapError(f"the pipeline has a {type(own).__name__}, which previews cannot use. Name a vae=.")
    if any(hasattr(module, "_hf_hook") for module in own.modules()) or own.device.type == "meta":
        raise SwapError("the pipeline's VAE is offloaded, and each preview would move it. Name a vae=.")
    if own.dtype == torch.float16 and own.config.get("force_upcast"):
        raise SwapError(
            "the pipeline's VAE says that float16 overflows (force_upcast), so its previews would be black. "
            "Name a vae=, or keep it in bfloat16 or float32."
        )


def _check_channels(own: Any, chosen: Autoencoder) -> None:
    """Refuse a VAE that would decode the first of several more channels, or find too few."""
    if not isinstance(own, AutoencoderKL | AutoencoderTiny):
        return
    (wanted, ratio), (channels, other) = latent_shape(own), latent_shape(chosen)
    if (wanted, ratio) != (channels, other):
        raise SwapError(
            f"a VAE of {channels} latent channels at 1/{other} ({space_name(chosen)}) cannot draw latents of "
            f"{wanted} at 1/{ratio} ({space_name(own)}), this pipeline's. Name one of the pipeline's space."
        )


def _small_sibling(own: Any, device: torch.device) -> AutoencoderKL | None:
    """The bundled model of the space that a VAE's factors name, if it draws that VAE's latents."""
    space = space_of(own)
    name = f"{space.name}-small" if space else ""
    if name not in bundled() or own.device.type == "meta":
        return None
    small = load(name, device=device)
    # the factors of SD are also AutoencoderKL's defaults, so that many a VAE claims to be of its space
    scalings = (Scaling.of(own.config), Scaling.of(small.config))
    if not measure_agreement(own, small, scalings, device=device).decodes:
        return None
    return small if device.type == "cpu" else small.to(torch.bfloat16)


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
    if hasattr(scheduler, "precondition_outputs"):  # EDM's denoisers give neither noise nor velocity
        return scheduler.precondition_outputs(sample, model_output, _sigma(scheduler, timestep).to(sample))
    if "FlowMatch" in type(scheduler).__name__ or config.get("use_flow_sigmas"):
        return sample - _sigma(scheduler, timestep).to(sample) * model_output  # x = (1 - s) x0 + s noise
    kind = config.get("prediction_type", "epsilon")
    if kind in ("sample", "original_sample"):
        return model_output
    if hasattr(scheduler, "sigmas"):  # whose times may lie between those of the table
        kept = 1 / (1 + _sigma(scheduler, timestep).to(sample) ** 2)
    else:
        kept = scheduler.alphas_cumprod[int(timestep)].to(sample)
    if _counts_in_sigmas(scheduler):
        sample = sample * kept.sqrt()  # from x0 + sigma noise
    # sample = sqrt(kept) x0 + sqrt(1 - kept) noise
    if kind == "v_prediction":
        return kept.sqrt() * sample - (1 - kept).sqrt() * model_output
    return (sample - (1 - kept).sqrt() * model_output) / kept.sqrt()


def _counts_in_sigmas(scheduler: Any) -> bool:
    """Whether its latents grow with sigma (Euler, Heun, LMS, ...); DDIM's and DPM++'s keep unit variance."""
    return hasattr(scheduler, "sigmas") and not hasattr(scheduler, "convert_model_output")


def _sigma(scheduler: Any, timestep: Any) -> torch.Tensor:
    """Of the step that is about to be taken."""
    if scheduler.step_index is None:
        scheduler._init_step_index(timestep)
    if type(scheduler).__name__ == "KDPM2DiscreteScheduler" and not scheduler.state_in_first_order:
        return scheduler.sigmas_interpol[scheduler.step_index]  # its second half-step starts in between
    return scheduler.sigmas[scheduler.step_index]
