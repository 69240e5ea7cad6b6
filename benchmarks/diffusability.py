"""Is the latent space easy to diffuse? What the equivariance term gains a diffusion model, and what it costs.

    OMP_NUM_THREADS=2 python benchmarks/diffusability.py --train ../shared/photos/train \\
        --val ../shared/photos/val --lpips ../shared/lpips --json docs/diffusability.json

Two VAEs, equal but for `regularise.equivariance.probability`, then on the latents of each the same small
unconditional diffusion model for the same steps, with several seeds. Latents are normalised to mean 0 and
variance 1 per channel, so that the denoising losses (of v, on images not trained on, mean over noise levels)
compare. The Fréchet distance is that of LPIPS-alex features, pooled over positions, of decoded samples to
those of training crops: not FID, and comparable within this table only. The rows of photographs say how near
it can come.
"""

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ablations
import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DModel
from diffusers.optimization import get_cosine_schedule_with_warmup
from diffusers.training_utils import EMAModel
from machine import DEVICE, machine
from torch.nn.functional import mse_loss
from tqdm import tqdm

import latentvae
from latentvae.images.drawing import grid
from latentvae.images.reading import find_images, load_image
from latentvae.measure.lpips import LPIPS, load_lpips
from latentvae.measure.rfid import FeatureStatistics, frechet_distance
from latentvae.models.latents import reconstruct
from latentvae.training.recipes import load_config

TERM = "regularise.equivariance.probability"
SIDE = 128  # px of the crops that are encoded
BATCH = 32
LEVELS = 1000
Row = dict[str, Any]


@dataclass
class Latents:
    """Normalised latents (N, C, h, w), and how to undo it."""

    train: torch.Tensor
    val: torch.Tensor
    mean: torch.Tensor  # (C, 1, 1)
    std: torch.Tensor

    def denormalise(self, latents: torch.Tensor) -> torch.Tensor:
        """As the VAE's decoder wants them."""
        return latents * self.std + self.mean


def crops(folder: str) -> torch.Tensor:
    """(N, 3, SIDE, SIDE): the middle of every image."""
    found = []
    for path in tqdm(find_images(folder), desc="decoding", leave=False):
        image = load_image(path)
        top, left = ((side - SIDE) // 2 for side in image.shape[-2:])
        if min(top, left) >= 0:
            found.append(image[:, top : top + SIDE, left : left + SIDE])
    return torch.stack(found)


@torch.no_grad()
def encode(vae: AutoencoderKL, images: torch.Tensor, title: str) -> torch.Tensor:
    """The posterior's modes."""
    parts = images.split(BATCH)
    return torch.cat([latentvae.encode(vae, part)[0].mode() for part in tqdm(parts, desc=title, leave=False)])


def latents_of(vae: AutoencoderKL, train: torch.Tensor, val: torch.Tensor) -> Latents:
    """Both sets, normalised by the training set's figures."""
    one, other = encode(vae, train, "encoding"), encode(vae, val, "encoding")
    mean, std = one.mean((0, 2, 3))[:, None, None], one.std((0, 2, 3))[:, None, None]
    return Latents((one - mean) / std, (other - mean) / std, mean, std)


def noise_schedule() -> DDIMScheduler:
    """Cosine, v-prediction, ending at noise alone."""
    return DDIMScheduler(
        num_train_timesteps=LEVELS,
        beta_schedule="squaredcos_cap_v2",
        prediction_type="v_prediction",
        timestep_spacing="trailing",
        clip_sample=False,
    )


def diffusion_model(latents: torch.Tensor, steps: int, seed: int) -> UNet2DModel:
    """A small network trained to denoise; its averaged weights."""
    torch.manual_seed(seed)
    channels, side = latents.shape[1], latents.shape[-1]
    unet = UNet2DModel(
        sample_size=side,
        in_channels=channels,
        out_channels=channels,
        block_out_channels=(32, 64, 64),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=32,
        norm_num_groups=8,
    )
    unet.to(DEVICE, memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-3, betas=(0.9, 0.99), weight_decay=0.01)
    rate = get_cosine_schedule_with_warmup(optimizer, steps // 20, steps)
    average, schedule = EMAModel(unet.parameters(), decay=0.99), noise_schedule()
    for _ in tqdm(range(steps), desc=f"diffusion, seed {seed}", leave=False):
        x = latents[torch.randint(len(latents), (BATCH,))].to(DEVICE)
        loss = denoising_loss(unet, schedule, x, torch.randint(LEVELS, (BATCH,)), torch.randn(x.shape))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        rate.step()
        average.step(unet.parameters())
    average.copy_to(unet.parameters())
    return unet.eval()


def denoising_loss(
    unet: UNet2DModel, schedule: DDIMScheduler, x: torch.Tensor, levels: torch.Tensor, noise: torch.Tensor
) -> torch.Tensor:
    """Mean squared error of v."""
    levels, noise = levels.to(x.device), noise.to(x.device)
    predicted = unet(schedule.add_noise(x, noise, levels), levels).sample
    return mse_loss(predicted, schedule.get_velocity(x, noise, levels))


@torch.no_grad()
def validation_loss(unet: UNet2DModel, latents: torch.Tensor) -> float:
    """On every image, at evenly spread noise levels, with the same noise for every model."""
    generator, schedule, losses = torch.Generator().manual_seed(0), noise_schedule(), []
    for part in latents.split(BATCH):
        levels = torch.linspace(0, LEVELS - 1, len(part)).long()
        noise = torch.randn(part.shape, generator=generator)
        losses += [denoising_loss(unet, schedule, part.to(DEVICE), levels, noise).item()] * len(part)
    return float(np.mean(losses))


@torch.no_grad()
def samples(
    unet: UNet2DModel, vae: AutoencoderKL, latents: Latents, count: int, sampling_steps: int
) -> torch.Tensor:
    """Decoded samples, (count, 3, SIDE, SIDE) in [-1, 1], the same starting noise for every model."""
    schedule, generator, images = noise_schedule(), torch.Generator().manual_seed(1), []
    schedule.set_timesteps(sampling_steps)
    for start in tqdm(range(0, count, BATCH), desc="sampling", leave=False):
        shape = (min(BATCH, count - start), *latents.train.shape[1:])
        x = torch.randn(shape, generator=generator).to(DEVICE)
        for t in schedule.timesteps:
            x = schedule.step(unet(x, t).sample, t, x, eta=0.0).prev_sample
        images.append(vae.decode(latents.denormalise(x)).sample.clamp(-1, 1))
    return torch.cat(images)


@torch.no_grad()
def statistics(lpips: LPIPS, images: torch.Tensor) -> FeatureStatistics:
    """Of LPIPS's features of all layers, each averaged over positions."""
    found = None
    for part in images.split(BATCH):
        features = torch.cat([layer.mean((2, 3)) for layer in lpips.features(part)], dim=1)
        found = found or FeatureStatistics(features.shape[1])
        found.add(features)
    assert found is not None
    return found


def distance(one: FeatureStatistics, other: FeatureStatistics) -> float:
    """Fréchet distance."""
    return frechet_distance(one.mean, one.covariance, other.mean, other.covariance)


def vae_runs(arguments: argparse.Namespace) -> dict[float, Path]:
    """The run folders of both VAEs by the term's probability, trained unless they are there."""
    if arguments.existing:
        found = {folder: load_config(folder / "config.yaml") for folder in arguments.existing}
        return {config.regularise.equivariance.probability: folder for folder, config in found.items()}
    runs = {}
    for probability in (0.0, arguments.probability):
        name = f"equivariance-{probability:g}"
        if ablations.run(name, [f"{TERM}={probability}", *arguments.vae], arguments):
            raise SystemExit(f"the VAE {name} was not trained; the reason is above.")
        runs[probability] = arguments.runs / name
    return runs


def measure(arguments: argparse.Namespace) -> list[Row]:
    """Every row of the table."""
    runs, lpips = vae_runs(arguments), load_lpips("alex", arguments.lpips)
    train, val = crops(arguments.train), crops(arguments.val)
    wanted = statistics(lpips, train)
    # as many photographs as samples: the distance grows as there are fewer
    some = val[torch.linspace(0, len(val) - 1, min(arguments.samples, len(val))).long()]
    rows = [{"name": "photographs not trained on", "frechet": distance(statistics(lpips, some), wanted)}]
    for probability, folder in runs.items():
        figures = ablations.read_run(folder)
        vae = latentvae.load(folder / "vae", device=DEVICE)
        latents = latents_of(vae, train, val)
        with torch.no_grad():
            rebuilt = torch.cat([reconstruct(vae, part).reconstructions for part in some.split(BATCH)])
        found = distance(statistics(lpips, rebuilt), wanted)
        rows.append({"name": f"their reconstructions, equivariance {probability:g}", "frechet": found})
        for seed in range(arguments.seeds):
            row, images = diffuse(vae, latents, seed, arguments)
            rows.append(
                {"probability": probability, "psnr": figures["psnr"], "lpips": figures["lpips"], **row}
            )
            rows[-1]["name"] = f"samples, equivariance {probability:g}, seed {seed}"
            rows[-1]["frechet"] = distance(statistics(lpips, images), wanted)
            print(rows[-1], flush=True)
            if arguments.pictures:
                draw(images, rows[-1]["name"], arguments.pictures / f"{folder.name}-{seed}.png")
    return rows


def diffuse(
    vae: AutoencoderKL, latents: Latents, seed: int, arguments: argparse.Namespace
) -> tuple[Row, torch.Tensor]:
    """One diffusion model: its loss and size, and decoded samples."""
    unet = diffusion_model(latents.train, arguments.diffusion_steps, seed)
    images = samples(unet, vae, latents, arguments.samples, arguments.sampling_steps)
    parameters = sum(parameter.numel() for parameter in unet.parameters())
    return {"loss": validation_loss(unet, latents.val), "parameters": parameters}, images


def draw(images: torch.Tensor, title: str, path: Path) -> None:
    """The first dozen samples."""
    path.parent.mkdir(parents=True, exist_ok=True)
    shown = images[:12].reshape(-1, 6, *images.shape[1:])
    grid([list(line) for line in shown], [title, *[""] * 5]).save(path)


def report(rows: list[Row]) -> str:
    """The table in Markdown, and the means over seeds with their spread."""
    lines = ["| | VAE: PSNR, dB | LPIPS | denoising loss | Fréchet distance |", "|---|---|---|---|---|"]
    for row in rows:
        cells = [f"{row[key]:{form}}" if key in row else "" for key, form in FORMS.items()]
        lines.append(f"| {' | '.join([row['name'], *cells])} |")
    runs = [row for row in rows if "loss" in row]
    for probability in dict.fromkeys(row["probability"] for row in runs):
        seeds = [row for row in runs if row["probability"] == probability]
        values = {key: [row[key] for row in seeds] for key in ("loss", "frechet")}
        cells = [f"{np.mean(v):{FORMS[k]}} ± {(max(v) - min(v)) / 2:{FORMS[k]}}" for k, v in values.items()]
        vae = f"{seeds[0]['psnr']:.2f} | {seeds[0]['lpips']:.3f}"
        lines.append(
            f"| **mean of {len(seeds)} seeds, equivariance {probability:g}** | {vae} | {' | '.join(cells)} |"
        )
    return "\n".join(lines)


FORMS = {"psnr": ".2f", "lpips": ".3f", "loss": ".4f", "frechet": ".4f"}


def main() -> None:
    """Train, measure, and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--train", required=True, help="folder of images")
    parser.add_argument("--val", required=True, help="folder of other images")
    parser.add_argument("--lpips", required=True, help="folder of LPIPS backbone weights")
    parser.add_argument(
        "--runs", type=Path, default=Path("runs/diffusability"), help="folder of the VAEs' runs"
    )
    parser.add_argument("--config", default="f8c4-small")
    parser.add_argument("--vae", nargs="*", default=VAE, help="settings of both VAEs")
    parser.add_argument("--steps", type=int, default=200, help="of the VAEs")
    parser.add_argument(
        "--existing", type=Path, nargs=2, metavar="RUN", help="two runs that are there, instead of training"
    )
    parser.add_argument("--probability", type=float, default=0.5, help="of the equivariance term")
    parser.add_argument("--diffusion-steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, default=2, help="of the diffusion model")
    parser.add_argument("--samples", type=int, default=192)
    parser.add_argument("--sampling-steps", type=int, default=20)
    parser.add_argument("--json", type=Path, help="also write the figures here")
    parser.add_argument("--pictures", type=Path, help="also draw a few samples of each into this folder")
    parser.set_defaults(set=[], val_images=48)
    arguments = parser.parse_args()
    rows = measure(arguments)
    print(report(rows))
    if arguments.json:
        arguments.json.write_text(json.dumps({"machine": machine(), "rows": rows}, indent=1) + "\n")


VAE = ["model.overrides={block_out_channels: [16, 16, 32, 64]}", "data.crop=64", "train.batch_size=8"]

if __name__ == "__main__":
    main()
