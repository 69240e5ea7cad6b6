"""What a training run is told, section by section. Every default carries its reason."""

from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field

Beta = Annotated[float, Field(ge=0, lt=1)]
Percentile = Annotated[float, Field(ge=0, le=100)]
Share = Annotated[float, Field(gt=0, le=1)]
AugmentName = Literal["colour", "translation", "cutout"]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", validate_default=True, allow_inf_nan=False)


class ModelConfig(Section):
    """Which VAE, where its first weights come from, and what of it is trained."""

    preset: str = "f8c4-small"
    overrides: dict[str, Any] = {}  # AutoencoderKL arguments, e.g. latent_channels: 8
    # start from these weights (folder, file, bundled name, hub id); None: from scratch
    init: str | None = None
    # full; decoder_only: latents stay as they are, bit for bit; distil: into the teacher's latent space
    mode: Literal["full", "decoder_only", "distil"] = "full"
    # of distil: any AutoencoderKL or AutoencoderTiny with latents of the same shape
    teacher: str | None = None
    # whose latents an AutoencoderTiny speaks, which does not say so itself; None: as its config says
    space: Literal["sd", "sdxl", "sd3", "flux"] | None = None
    freeze: list[str] = []  # patterns of parameter names that stay as they are, e.g. "*.norm*"


class DataConfig(Section):
    """Images, and the crops drawn from them."""

    # A folder of images, .tar shards or .parquet files, one such file, a dataset saved with save_to_disk,
    # or a pattern such as shards/{000..011}.tar. The only setting without a default that works.
    train: str | None = None
    # Of a dataset: the column with the images; of .tar shards: the members' extension. None: found by type.
    column: str | None = None
    val: str | None = None  # None: hold out `val_images` of the training folder, at most a tenth of it
    val_images: int = Field(24, ge=1)  # enough for a mean that moves by less than 0.1 dB between runs
    val_size: int = Field(256, ge=16)  # centre crops of this size, so that they batch
    # of one-channel scans: the samples that become black and white, e.g. [0, 4095] for 12 bits in 16-bit
    # files. None: what the files' type can hold. The export states it, `decode` and `reconstruct` undo it
    range: tuple[float, float] | None = None
    # measure `range` at the start: these percentiles of the training images' samples, e.g. [0.1, 99.9]
    percentiles: tuple[Percentile, Percentile] | None = None
    # px; a VAE is local, so many small crops teach more per second than few large ones
    crop: int = Field(64, ge=16)
    short_side: int | None = Field(None, ge=16)  # resize images to this short side first; None: as they are
    # sides of crops as shares of an image's short side, drawn between these two and scaled down to `crop`:
    # 0.25, 1 shows fine detail and whole scenes. Never scaled up. None: crops at the image's own scale
    zoom: tuple[Share, Share] | None = None
    # crops of about `crop` x `crop` pixels up to so many times as wide as high, or as high as wide: one shape
    # for each step, drawn. 1: squares, which compile once
    max_aspect: float = Field(1.0, ge=1, le=2)
    # of .tar shards: go through so many at a time, drawn anew for each epoch, whose images are shuffled
    # together; each is read once an epoch, and from an address fetched as a whole. None: all images shuffled,
    # and each fetched on its own, which small images behind a slow connection wait for
    shuffle_shards: int | None = Field(None, ge=1)
    horizontal_flip: bool = True  # free data: photographs have no handedness
    in_memory: bool = False  # decode everything once; for sets that fit in RAM
    workers: int = Field(1, ge=0)  # processes that decode; 0 is enough with in_memory


class LossConfig(Section):
    """Weights of the terms; their reductions are stated in latentvae/training/losses.py."""

    pixel: Literal["l1", "l2", "charbonnier"] = "l1"  # L1: less blur than L2 at the same PSNR
    kl_weight: float = Field(1e-6, ge=0)  # LDM's: keeps latents near unit scale and costs no detail
    perceptual_weight: float = Field(1.0, ge=0)  # LDM's; 0 leaves LPIPS out
    perceptual_net: Literal["vgg", "squeeze", "alex"] = "vgg"  # LDM's; squeeze is several times faster
    perceptual_weights: str | None = None  # backbone file or folder; None: torchvision's cache
    kl_warmup_steps: int = Field(
        0, ge=0
    )  # at 1e-6 the KL term cannot collapse anything; raise with kl_weight
    free_bits: float = Field(
        0.0, ge=0
    )  # nats per latent pixel that a channel may cost before the KL term acts
    distil_weight: float = Field(1.0, ge=0)  # latents have unit variance when scaled, images half of that


class DistilConfig(Section):
    """How a student learns a teacher's latent space; only with model.mode=distil."""

    # both, or one half alone (the other is given by model.init, or by transplant): each is a problem of its
    # own, and the encoder's passes cost a quarter of the decoder's. A linear start maps both ends even so
    learn: Literal["both", "encoder", "decoder"] = "both"
    # with model.init: map its latents to the teacher's by least squares first; saves thousands of crops
    linear_start: bool = True
    # begin as the teacher, an AutoencoderTiny: its convolutions are placed in the student's resnets, and only
    # the outermost levels are learned from nothing; with model.preset f8c4-deep or f8c16-deep
    transplant: bool = False
    # of what was transplanted: share of optim.lr, and the first steps, in which it waits for what is new
    transplanted_lr: float = Field(0.1, ge=0, le=1)
    hold_steps: int = Field(200, ge=0)
    # teacher: its picture of its own latents, a function of what the decoder is shown: nothing to guess
    target: Literal["teacher", "original"] = "teacher"
    # folder where the teacher's latents and pictures of whole training images are kept, made once (3.5 bytes
    # a pixel with 4 channels, 5 with 16); None: the teacher runs in every step, a quarter of a CPU's work
    cache: str | None = None
    turn_step: int | None = Field(None, ge=0)  # step from which the target turns to the original; None: never
    turn_steps: int = Field(1000, ge=1)  # over so many steps: a sudden turn unlearns
    l1_weight: float = Field(1.0, ge=0)  # of |difference| of scaled latents, beside its square
    logvar: float = Field(-10.0, ge=-30, le=20)  # of posteriors, where the teacher has none


class AdversarialConfig(Section):
    """The discriminator and its part in the loss; off unless disc_weight is set."""

    disc_weight: float = Field(0.0, ge=0)  # LDM: 0.5; 0 leaves the discriminator out
    disc_start: int = Field(0, ge=0)  # optimizer step; a generator that still blurs teaches it nothing
    disc_ramp: int = Field(500, ge=0)  # steps from 0 to disc_weight: a sudden start ruins reconstructions
    lr: float = Field(2e-4, gt=0)  # below the VAE's, or it wins
    # judge by the features of a frozen vision transformer of transformers (folder or hub id, such as
    # facebook/dinov2-small), not by pixels; the one of regularise.align.model is loaded once for both
    features: str | None = None
    width: int = Field(64, ge=8)  # LDM's
    layers: int = Field(3, ge=1, le=5)  # patches of 70 px; with features: how many of the model's are judged
    # begin as the discriminator of another run: its folder, the folder `discriminator` in it, or a checkpoint
    init: str | None = None
    # ties logits to the other side's moving average (LeCam, Tseng et al. 2021): for few images; MAGVIT: 0.001
    lecam_weight: float = Field(0.0, ge=0)
    # what real and fake images go through before they are judged (DiffAugment, Zhao et al. 2020), so that a
    # discriminator does not learn few images by heart: any of colour, translation, cutout
    augment: list[AugmentName] = []


class EquivarianceConfig(Section):
    """The same scaling and rotation of latents and target: makes latents easier to diffuse (EQ-VAE)."""

    probability: float = Field(0.0, ge=0, le=1)  # EQ-VAE: 0.5; 0 is off
    min_scale: int = Field(8, ge=1)  # in 32nds: EQ-VAE's quarter
    max_scale: int = Field(31, ge=1)  # in 32nds: just below full size


class MaskConfig(Section):
    """Hidden parts of the input, with the loss on all pixels, so that the model learns to fill them in."""

    probability: float = Field(0.0, ge=0, le=1)  # share of images; 0 is off
    max_share: float = Field(0.5, gt=0, le=1)  # of the pixels of one image


class AlignConfig(Section):
    """Latents that resemble a vision foundation model's features: easier to diffuse (VA-VAE)."""

    weight: float = Field(0.0, ge=0)  # of the pull of the other losses on the latents; VA-VAE: 0.1; 0 is off
    model: str = (
        "facebook/dinov2-small"  # of transformers: folder or hub id; a small one is a tenth of a large
    )
    cosine_margin: float = Field(0.5, ge=0, le=2)  # VA-VAE's: what is nearer than that is near enough
    distance_margin: float = Field(0.25, ge=0, le=2)  # VA-VAE's


class RegulariseConfig(Section):
    """Regularisers of the latent space, all off by default: each costs some PSNR."""

    latent_noise: float = Field(
        0.0, ge=0
    )  # std in latent units, for decoders that must bear diffusion's errors
    equivariance: EquivarianceConfig = EquivarianceConfig()
    mask: MaskConfig = MaskConfig()
    align: AlignConfig = AlignConfig()


class OptimConfig(Section):
    """Optimizer and schedule."""

    name: Literal["muon", "adamw"] = "muon"  # Muon on kernels: clearly ahead of AdamW at equal steps
    lr: float = Field(1e-3, gt=0)  # Muon's updates are scaled to AdamW's size, so one rate serves both
    betas: tuple[Beta, Beta] = (0.9, 0.99)  # 0.99: short runs cannot wait for an average over 1000 steps
    weight_decay: float = Field(0.01, ge=0)  # kernels only: norms undo their scale, but the step size sees it
    warmup_steps: int = Field(100, ge=0)  # Adam's second moments are noise before
    schedule: Literal["cosine", "constant"] = "cosine"  # the decay is worth half a dB at the end
    decay_steps: int | None = Field(None, ge=1)  # cosine over the last so many steps; None: after the warm-up
    final_lr: float = Field(0.01, ge=0, le=1)  # share of lr left at the end
    # from scratch the norm falls from 3 to 1: shortens the first steps, and later only what stands out
    max_grad_norm: float = Field(1.0, gt=0)


class TrainConfig(Section):
    """The loop."""

    max_steps: int = Field(10_000, ge=1)  # optimizer steps
    # of the clock, from the start: then save and stop with exit code 4, to be resumed; for borrowed time
    max_minutes: float | None = Field(None, gt=0)
    batch_size: int = Field(32, ge=1)  # images per process and forward pass
    accumulation: int = Field(1, ge=1)  # forward passes per optimizer step
    # bf16: of autocast, with fp32 master weights; fp64: to prove what rounding would hide; auto: bf16 where
    # the hardware computes it, else fp32, as emulated bf16 is four times slower than fp32. fp16: for GPUs
    # without bf16 (before Ampere); losses are scaled, or small gradients would vanish. Not what auto takes:
    # a VAE's activations can overflow in fp16, which no scale prevents
    precision: Literal["auto", "bf16", "fp16", "fp32", "fp64"] = "auto"
    channels_last: bool = True  # several times faster convolutions on CPU and tensor cores
    gradient_checkpointing: bool = False  # a third slower, far less memory
    compile: bool = False  # pays on GPUs; minutes of compiling on a CPU gain a few per cent
    # of CUDA: try which algorithm is fastest for a size, once; crops have one size or few, so it pays at once
    cudnn_benchmark: bool = True
    # of CUDA: 19-bit products in what autocast leaves in fp32 (Muon's matrices), several times faster; bf16
    # autocast rounds more. false: fp32 to its last bit
    tf32: bool = True
    ema_decay: float = Field(0.999, ge=0, lt=1)  # averages the last thousand steps; warms up in shorter runs
    log_every: int = Field(10, ge=1)
    validate_every: int = Field(500, ge=1)
    # validations without a better figure (LPIPS, or else PSNR) after which a run ends early, exported as at
    # its end; None: never. With a cosine the last steps bring the most, so set optim.schedule=constant too
    patience: int | None = Field(None, ge=1)
    save_every: int = Field(500, ge=1)
    keep_checkpoints: int = Field(2, ge=1)  # two: if the newest is damaged there is another
    max_bad_steps: int = Field(10, ge=1)  # NaN or inf so many times in a row is no accident
    # that processes wait for one another: while one lists or decodes its share, or exports, the others do
    timeout_minutes: float = Field(60, gt=0)
    tracker: str = "tensorboard"  # or another of Accelerate's: wandb, mlflow, comet_ml, ...; none: only files

    @property
    def dtype(self) -> torch.dtype:
        """Of master weights and images."""
        return torch.float64 if self.precision == "fp64" else torch.float32

    @property
    def memory_format(self) -> torch.memory_format:
        """Of weights and images."""
        return torch.channels_last if self.channels_last else torch.contiguous_format


class StageConfig(Section):
    """One part of a run in stages: it begins with the averaged weights of the part before."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9-]*$")  # of its folder, stages/01-NAME, and on the card
    steps: int = Field(ge=1)  # train.max_steps
    overrides: dict[str, Any] = {}  # sections as in the file, over those that all stages share


class Config(Section):
    """A whole training run."""

    output: str = "runs/latentvae"
    seed: int = Field(0, ge=0, lt=2**63)  # what both torch's and numpy's generators take
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    loss: LossConfig = LossConfig()
    distil: DistilConfig = DistilConfig()
    adversarial: AdversarialConfig = AdversarialConfig()
    regularise: RegulariseConfig = RegulariseConfig()
    optim: OptimConfig = OptimConfig()
    train: TrainConfig = TrainConfig()
    stages: list[StageConfig] = []  # one after the other, each with the settings above and its own over them

    def stage(self, number: int) -> "Config":
        """The settings of one stage, from 0, as a run of its own."""
        stage, tree = self.stages[number], self.model_dump(exclude={"stages"})
        # other crops in each, unless a stage says which
        tree["seed"] += number
        _merge(tree, stage.overrides)
        own = Config.model_validate(tree)  # before anything is put into sections, which may be none
        own.train.max_steps = stage.steps
        own.output = self.stage_folder(number)
        if number:
            own.model.init, own.model.overrides = f"{self.stage_folder(number - 1)}/vae", {}
            if own.model.teacher is not None:
                own.distil.linear_start = False  # its latents are the teacher's already
        return own

    def stage_folder(self, number: int) -> str:
        """Where a stage, from 0, writes."""
        return str(Path(self.output) / "stages" / f"{number + 1:02d}-{self.stages[number].name}")


def _merge(tree: dict[str, Any], over: dict[str, Any]) -> None:
    """Put settings over others, section by section, in place."""
    for name, value in over.items():
        if isinstance(value, dict) and isinstance(tree.get(name), dict):
            _merge(tree[name], value)
        else:
            tree[name] = value
