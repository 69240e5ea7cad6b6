"""Files in LDM's names, loaded by the code of the programs that people load them with.

    python benchmarks/clients.py SOURCES [PROGRAM ...]

SOURCES holds the programs' source trees, as far as they can be had, the rest is left out: flux, ComfyUI,
stable-diffusion-webui (with repositories/stable-diffusion-stability-ai), stable-diffusion-webui-forge (with
huggingface_guess beside it), sd-scripts. Packages that they import and that are not installed are stood in
for; einops is needed. Each reader runs in a process of its own, on one CPU thread.

Prints a Markdown table: what latentvae says of a model, what the program does, and how far the means of its
posterior and its pictures are from diffusers'. Random weights of Stable Diffusion's size, 64 px.
"""

import argparse
import importlib
import importlib.abc
import importlib.machinery
import inspect
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import MagicMock

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file

import latentvae
from latentvae.models.formats.adapting import adapt
from latentvae.models.formats.programs import Reader, judge, mended, readers_of

Function = Callable[[torch.Tensor], torch.Tensor]
Loaded = tuple[Function, Function]  # pictures in [-1, 1] to the posterior's means, and latents to pictures

NEWER = "033046c"  # of ComfyUI, read and not run
NONE = {"use_quant_conv": False, "use_post_quant_conv": False}
CASES: dict[str, dict[str, Any]] = {
    "4 channels": {},
    "4, no quant convolutions": NONE,
    "4, no attention": {"mid_block_add_attention": False},
    "4, 16 norm groups": {"norm_num_groups": 16},
    "16": {"latent_channels": 16},
    "16, no quant convolutions": {"latent_channels": 16, **NONE},
    "16, three layers": {"latent_channels": 16, "layers_per_block": 3, **NONE},
    "32, no quant convolutions": {"latent_channels": 32, **NONE},
}


# --- the programs ----------------------------------------------------------------------------------------


# of what programs do without where it is missing, and must see to be so
FASTER = ("xformers", "flash_attn", "sageattention", "bitsandbytes", "torch", "torch_directml")
FASTER += ("intel_extension_for_pytorch", "torch_npu", "torch_mlu")


class StandIn(ModuleType):
    """A package that is not installed and that no VAE needs: any attribute is there, as a class."""

    __path__ = ()  # so that it has submodules

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if name == "LightningModule":
            return torch.nn.Module
        return type(name, (MagicMock,), {}) if name[:1].isupper() else MagicMock()


class StandIns(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Comes last among the finders, so that it stands in for what no other found and the program asks for."""

    def __init__(self, sources: Path, own: tuple[str, ...]) -> None:
        self.sources = str(sources.resolve())
        self.absent = (*own, *FASTER)

    def find_spec(self, name: str, *_: Any) -> importlib.machinery.ModuleSpec | None:
        frame = inspect.currentframe()
        frame = frame.f_back if frame else None
        while frame and "importlib" in frame.f_code.co_filename:
            frame = frame.f_back
        if frame is None or not frame.f_code.co_filename.startswith(self.sources):
            return None  # an installed package asks, which can do without
        if name.split(".", maxsplit=1)[0] in self.absent:
            return None
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        return StandIn(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        pass


def enter(sources: Path, *folders: str, own: tuple[str, ...]) -> None:
    """Import from these folders, and from stand-ins what is nowhere."""
    sys.path[:0] = [str(sources / folder) for folder in folders]
    sys.argv = sys.argv[:1]
    sys.meta_path.append(StandIns(sources, own))


def flux(sources: Path, file: Path, used_with: str) -> Loaded:
    enter(sources, "flux/src", own=("flux",))
    os.environ["FLUX_AE"] = str(file)
    model = importlib.import_module("flux.util").load_ae("flux-dev", device="cpu")
    scale, shift = model.scale_factor, model.shift_factor
    return lambda x: model.encode(x) / scale + shift, lambda z: model.decode((z - shift) * scale)


def comfyui(sources: Path, file: Path, used_with: str) -> Loaded:
    enter(sources, "ComfyUI", own=("comfy",))
    importlib.import_module("comfy.cli_args").args.cpu = True
    weights = importlib.import_module("comfy.utils").load_torch_file(str(file))
    vae = importlib.import_module("comfy.sd").VAE(sd=weights, dtype=torch.float32)
    # its images are (B, H, W, C) in [0, 1]
    return (
        lambda x: vae.encode((x.movedim(1, -1) + 1) / 2),
        lambda z: vae.decode(z).movedim(-1, 1) * 2 - 1,
    )


# of A1111's own modules those that make its page, or read its options
UI = ("shared", "paths", "devices", "script_callbacks", "sd_models", "extra_networks", "lowvram")
UI += ("sd_hijack", "hashes")


def a1111(sources: Path, file: Path, used_with: str) -> Loaded:
    webui = "stable-diffusion-webui"
    enter(sources, webui, f"{webui}/repositories/stable-diffusion-stability-ai", own=("ldm", "modules"))
    for name in UI:
        sys.modules[f"modules.{name}"] = StandIn(name)
    sys.modules["modules.paths"].models_path = ""
    sys.modules["modules.models.sd3.mmdit"] = StandIn("mmdit")
    sd_vae = importlib.import_module("modules.sd_vae")
    if used_with == "SD 3":
        vae = importlib.import_module("modules.models.sd3.sd3_impls").SDVAE()
    else:
        shape = {"double_z": True, "z_channels": 4, "in_channels": 3, "out_ch": 3, "ch": 128, "dropout": 0.0}
        shape |= {"resolution": 256, "ch_mult": [1, 2, 4, 4], "num_res_blocks": 2, "attn_resolutions": []}
        module = importlib.import_module("ldm.models.autoencoder")
        vae = module.AutoencoderKL(shape, {"target": "torch.nn.Identity"}, 4)
    sys.modules["modules.sd_models"].read_state_dict = lambda path, map_location: load_file(path)
    sys.modules["modules.devices"].dtype_vae = torch.float32
    model = type("Model", (), {"first_stage_model": vae})
    sd_vae._load_vae_dict(model, sd_vae.load_vae_dict(str(file), "cpu"))
    if used_with == "SD 3":
        return lambda x: vae.encoder(x).chunk(2, dim=1)[0], vae.decode
    return lambda x: vae.encode(x).mode(), vae.decode


def forge(sources: Path, file: Path, used_with: str) -> Loaded:
    webui, own = "stable-diffusion-webui-forge", ("backend", "huggingface_guess")
    enter(sources, webui, f"{webui}/packages_3rdparty", "huggingface_guess", own=own)
    sys.argv += ["--always-cpu", "--vae-in-fp32"]
    load = importlib.import_module("backend.loader").load_huggingface_component
    repository = {
        "SD 3": "stabilityai/stable-diffusion-3-medium-diffusers",
        "FLUX.1": "black-forest-labs/FLUX.1-dev",
    }.get(used_with, "runwayml/stable-diffusion-v1-5")
    folder = str(sources / webui / "backend/huggingface" / repository)
    vae = load(None, "vae", "diffusers", "AutoencoderKL", folder, load_file(file))
    return lambda x: vae.encode(x, lambda posterior: posterior.mode()), vae.decode


def sd_scripts(sources: Path, file: Path, used_with: str) -> Loaded:
    enter(sources, "sd-scripts", own=("library",))
    if used_with == "SD 3":
        vae = importlib.import_module("library.sd3_utils").load_vae(str(file), torch.float32, "cpu")
        return lambda x: vae.encoder(x).chunk(2, dim=1)[0], vae.decode
    if used_with == "FLUX.1":
        model = importlib.import_module("library.flux_utils").load_ae(str(file), torch.float32, "cpu")
        return lambda x: model.encoder(x).chunk(2, dim=1)[0], model.decoder
    model = importlib.import_module("library.model_util").load_vae(str(file), torch.float32)
    return lambda x: model.encode(x).latent_dist.mode(), lambda z: model.decode(z).sample


CLIENTS = {
    "flux": ("flux", flux),
    "comfyui": ("ComfyUI", comfyui),
    "a1111": ("stable-diffusion-webui", a1111),
    "forge": ("stable-diffusion-webui-forge", forge),
    "sd-scripts": ("sd-scripts", sd_scripts),
}


# --- what they do ----------------------------------------------------------------------------------------


def build(changes: dict[str, Any]) -> AutoencoderKL:
    """A random model, quant convolutions unlike identities; no bias after the latents, so that it folds."""
    torch.manual_seed(0)
    vae = latentvae.build("f8c4", **changes).eval().requires_grad_(False)
    if vae.post_quant_conv is not None:
        torch.nn.init.zeros_(vae.post_quant_conv.bias)
    return vae


@dataclass
class Job:
    """A file for a reader, and what is to come of it."""

    case: str
    way: str
    said: str
    folder: Path


@torch.no_grad()
def child(sources: Path, program: str, used_with: str, folders: list[Path]) -> None:
    """Load files with one program, and print for each how far it is from what diffusers computed."""
    torch.set_num_threads(1)
    for folder in folders:
        wanted = load_file(folder.parent / "wanted.safetensors")
        try:
            encode, decode = CLIENTS[program][1](sources, folder / "vae.safetensors", used_with)
            means, picture = encode(wanted["picture"]), decode(wanted["means"]).clamp(-1, 1)
            off: Any = [
                (means - wanted["means"]).abs().max().item(),
                (picture - wanted["shown"]).abs().max().item(),
            ]
            off.append(wanted["means"].abs().max().item())
        except (RuntimeError, KeyError, ValueError, NotImplementedError, AssertionError) as error:
            off = f"{type(error).__name__}: {' '.join(str(error).split())[:80]}"
        print("RESULT " + json.dumps(off), flush=True)


@torch.no_grad()
def write_case(case: str, readers: list[Reader], folder: Path) -> Iterator[tuple[Reader, Job]]:
    """Write a model's files, as it is and as `--for` changes it, and what diffusers computes with it."""
    vae = build(CASES[case])
    picture = F.interpolate(torch.rand(1, 3, 8, 8) * 2 - 1, scale_factor=8, mode="bicubic").clamp(-1, 1)
    means = vae.encode(picture).latent_dist.mean.contiguous()
    shown = vae.decode(means).sample.clamp(-1, 1).contiguous()
    written: dict[str, Path] = {}
    for reader in readers:
        if reader.channels not in (None, vae.config["latent_channels"]):
            continue
        ways = {"as it is": vae}
        if judge(vae.config, reader)[0] != "right" and mended(vae.config, reader.program):
            adapted, done = adapt(vae, reader.program)
            ways |= {f"--for {reader.program}": adapted} if done else {}
        for way, model in ways.items():
            shape = json.dumps({**model.config, "_name_or_path": ""}, default=str)
            if shape not in written:  # once for all programs that take the same
                written[shape] = folder / str(len(written))
                latentvae.save(model, written[shape] / "vae.safetensors", "ldm")
            yield reader, Job(case, way, judge(model.config, reader)[0], written[shape])
    if written:
        save_file({"picture": picture, "means": means, "shown": shown}, folder / "wanted.safetensors")


def measure(sources: Path, programs: list[str]) -> list[tuple[str, ...]]:
    """Rows of the table, each also on stderr as it comes."""
    # of the version that is not among SOURCES nothing is found
    readers = [reader for program in programs for reader in readers_of(program) if reader.version != NEWER]
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        jobs = [
            job
            for number, case in enumerate(CASES)
            for job in write_case(case, readers, Path(folder) / str(number))
        ]
        for reader in readers:
            own = [job for other, job in jobs if other is reader]
            for job, found in zip(own, attempt(sources, reader, own), strict=True):
                name = f"{reader.name} {reader.version}" + f", {reader.used_with}" * bool(reader.used_with)
                rows.append((job.case, name, job.way, job.said, *found))
                print(*rows[-1], sep=" | ", file=sys.stderr, flush=True)
    return rows


def attempt(sources: Path, reader: Reader, jobs: list[Job]) -> Iterator[tuple[str, ...]]:
    """What one reader makes of its files, in a process of its own, and how far off that is."""
    line = [sys.executable, __file__, str(sources), "--child", reader.program, reader.used_with]
    line += [str(job.folder) for job in jobs]
    out = subprocess.run(line, capture_output=True, text=True, check=False)
    found = [json.loads(text[7:]) for text in out.stdout.splitlines() if text.startswith("RESULT ")]
    if len(found) != len(jobs):
        raise SystemExit(f"{reader.program} could not be run:\n{out.stderr[-3000:]}")
    for off in found:
        if isinstance(off, str):
            yield "refused", off, ""
        else:
            right = off[0] <= 1e-3 * off[2] and off[1] <= 1e-3
            yield "right" if right else "wrong", f"{off[0]:.2g}", f"{off[1]:.2g}"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("sources", type=Path)
    parser.add_argument("programs", nargs="*", help=f"of {', '.join(CLIENTS)}")
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        child(arguments.sources, *arguments.child[:2], [Path(name) for name in arguments.child[2:]])
        return
    there = [name for name, (folder, _) in CLIENTS.items() if (arguments.sources / folder).is_dir()]
    rows = measure(arguments.sources, arguments.programs or there)
    print("| latents | program | file | said | found | means off | pictures off |\n" + "|---" * 7 + "|")
    for row in rows:
        print("| " + " | ".join(row) + " |")
    if any(row[3] != row[4] for row in rows):
        raise SystemExit("what is said is not what was found")


if __name__ == "__main__":
    main()
