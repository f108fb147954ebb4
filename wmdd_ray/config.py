"""Every option of the pipeline: one frozen dataclass a stage, validated when made.

One file on purpose: it is the reference of all options, in the order of the stages, and each class is read by itself. The
docstring under a field is its `--help` text: meaning, unit, and where the default comes from. A complete
configuration is made by a function in `recipes.py`; a variant of one is `dataclasses.replace`. `Resources` and `Reporting`
are kept apart because they say where the work runs and who is told, never what comes out: they take no part in fingerprints.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import Literal, get_args

from wmdd_ray.errors import ConfigError
from wmdd_ray.redaction import has_user, uri_fault

Arch = Literal["convnet3", "resnet18", "resnet50", "mobilenet_v2", "vit_tiny"]
Norm = Literal["batch", "instance"]
OptimizerName = Literal["adamw", "sgd", "muon"]
StudentLoss = Literal["kl", "mse"]
LabelKind = Literal["soft", "hard"]
Baseline = Literal["random_real", "nearest_real", "random_tiles", "nearest_tiles", "all_real"]
Schedule = Literal["cosine", "half_cosine"]
CurvatureForm = Literal["gradient", "loss"]
AttackName = Literal["pgd", "square", "autoattack", "cw", "mim"]
# Smallest side of a tile, pixels.
_TILE_PIXELS = 4
StageName = Literal[
    "squeeze", "features", "barycenters", "recover", "relabel", "assemble", "evaluate"
]


def _require(ok: bool, option: str, expected: str, got: object) -> None:
    if not ok:
        raise ConfigError(f"--{option}: expected {expected}, got {got!r}")


def refuse_secrets(option: str, uri: str | None) -> None:
    """Refuse a URI with a password or a query: plans, logs, messages and the list of processes would show it."""
    fault = uri_fault(uri or "")
    if fault is not None:
        raise ConfigError(f"--{option}: {fault}")


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceConfig:
    """How the real images are read and brought to the network's input."""

    format: Literal["auto", "digits", "imagefolder", "webdataset", "parquet", "idx", "csv"] = "auto"
    """Layout of `--data`; `auto` looks at the names under the URI."""
    image_size: int = 32
    """Side of the square network input and of the distilled images, pixels."""
    resize: int = 32
    """Shorter side after resizing, before the center crop to `image_size`, pixels (256 for ImageNet, torchvision)."""
    channels: Literal[1, 3] = 3
    """Color channels of the network input: every picture mode is converted to 1 (gray) or 3 (RGB)."""
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    """Per-channel mean in [0, 1] that the network input is centered by."""
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    """Per-channel standard deviation in [0, 1] that the network input is divided by."""
    max_bad_images: int = 10
    """Images that may be unreadable (counted, named, skipped) before the run stops."""
    max_image_pixels: int = 64_000_000
    """Largest width x height that is decoded; a larger header is refused as a bad image (64 MP covers ImageNet)."""
    follow_links: bool = False
    """Follow links out of the `--data` folder (a hub's cache, a subset made of links): say so only of links that are yours."""

    def __post_init__(self) -> None:
        _require(self.image_size >= 8, "source.image-size", "at least 8 pixels", self.image_size)
        _require(
            self.resize >= self.image_size,
            "source.resize",
            f"at least image_size {self.image_size}",
            self.resize,
        )
        for name, values in (("mean", self.mean), ("std", self.std)):
            _require(
                len(values) == self.channels,
                f"source.{name}",
                f"{self.channels} values, one a channel of --source.channels",
                values,
            )
        _require(min(self.std) > 0, "source.std", "positive values", self.std)
        _require(self.max_bad_images >= 0, "source.max-bad-images", ">= 0", self.max_bad_images)
        _require(self.max_image_pixels > 0, "source.max-image-pixels", "> 0", self.max_image_pixels)


@dataclass(frozen=True, kw_only=True, slots=True)
class NetworkConfig:
    """A classifier architecture, of the teacher or of a student."""

    arch: Arch = "convnet3"
    """`convnet3` is the small-image literature's three-block network (here with BatchNorm); the others are torchvision's;
    `vit_tiny`, its VisionTransformer with 4 layers of width 128 on 7 x 7 patches, can be a student only: it has no BatchNorm."""
    width: int = 64
    """Channels of each ConvNet-3 block (128 in the literature); not used by the other architectures."""
    small_stem: bool = False
    """3x3 stride-1 first convolution without max-pool (ResNet) or stride 1 (MobileNetV2), for images of 64 px and less; the
    other architectures have no stem and ignore it."""
    norm: Norm = "batch"
    """Normalization of `convnet3`: BatchNorm, which a teacher must have, or the literature's InstanceNorm."""

    def __post_init__(self) -> None:
        _require(self.width >= 1, "width", ">= 1", self.width)
        _require(self.norm in get_args(Norm), "norm", f"one of {get_args(Norm)}", self.norm)
        _require(
            self.norm == "batch" or self.arch == "convnet3",
            "norm",
            f"batch, the only one that {self.arch} has",
            self.norm,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class SqueezeConfig:
    """Training of the teacher on the real images."""

    network: NetworkConfig = field(default_factory=NetworkConfig)
    """Architecture of the teacher."""
    epochs: int = 50
    """Passes over the real images (50 in WMDD's reference)."""
    batch_size: int = 128
    """Images of one optimizer step, summed over the workers."""
    learning_rate: float = 0.05
    """Peak rate of SGD with Nesterov momentum; cosine to 0."""
    momentum: float = 0.9
    """SGD momentum."""
    weight_decay: float = 5e-4
    """L2 penalty on all parameters with more than one dimension."""
    label_smoothing: float = 0.0
    """Mass moved from the true class to all classes."""
    crop_scale_min: float = 0.5
    """Smallest area fraction of the random resized crop, (0, 1]."""
    flip: bool = True
    """Random horizontal flip with probability 1/2 (off for digits: a mirrored digit is no digit)."""
    mixed_precision: bool = False
    """bfloat16 autocast of the forward pass, on CPU too; loss and optimizer stay float32. On in the recipes from 64 px up
    (Tiny-ImageNet, ImageNette, ImageNet-1K)."""
    curvature_weight: float = 0.0
    """Coefficient of the curvature of the loss around each image, which makes the teacher, and what is distilled by it, harder to
    attack (GUARD). A mean over images: the authors' lambda 100 at batch 128 is 0.78 here. 0 leaves the term out."""
    curvature_step: float = 3.0
    """Length of the step along the input gradient over which the curvature is taken, L2 in normalized input units (3 in GUARD's
    CIFAR script, a twentieth of an image's own length there)."""
    curvature_form: CurvatureForm = "gradient"
    """What is penalized: `gradient` is GUARD's published |grad L(x + z) - grad L(x)|, by double backward; `loss` is
    |L(x + z) - L(x)|, which the authors' ImageNet script computes instead, at their weight of 1e-4."""
    curvature_ipc_power: float = 0.0
    """p in curvature_weight x (10 / ipc)^p, so that the weight is that of ipc 10. GUARD finds that robustness pays at small ipc and
    costs clean accuracy at large (ImageNet-1K: +6.0 at ipc 10, -6.9 at 50) and gives no rule; this one is ours. 0 is no rule."""
    min_top1: float = 0.0
    """Refuse a teacher below this held-out top-1, in [0, 1]; 0 means three times chance level, and with fewer than five
    classes half way from chance to 1."""
    memory_limit_gib: float = 4.0
    """Training images are held decoded in memory up to this size per worker; above it they are streamed every epoch."""

    def __post_init__(self) -> None:
        _require(
            self.network.arch != "vit_tiny",
            "squeeze.network.arch",
            "a network with BatchNorm, whose inputs the images are matched by",
            self.network.arch,
        )
        _require(
            self.network.norm == "batch",
            "squeeze.network.norm",
            "batch, whose inputs the images are matched by",
            self.network.norm,
        )
        _require(self.epochs >= 1, "squeeze.epochs", ">= 1", self.epochs)
        _require(self.batch_size >= 2, "squeeze.batch-size", ">= 2", self.batch_size)
        _require(self.learning_rate > 0, "squeeze.learning-rate", "> 0", self.learning_rate)
        _require(
            0 < self.crop_scale_min <= 1,
            "squeeze.crop-scale-min",
            "in (0, 1]",
            self.crop_scale_min,
        )
        _require(
            0 <= self.label_smoothing < 1,
            "squeeze.label-smoothing",
            "in [0, 1)",
            self.label_smoothing,
        )
        _require(0 <= self.min_top1 < 1, "squeeze.min-top1", "in [0, 1)", self.min_top1)
        for name in ("curvature_weight", "curvature_ipc_power"):
            value = getattr(self, name)
            option = f"squeeze.{name.replace('_', '-')}"
            _require(0 <= value < float("inf"), option, "a finite number >= 0", value)
        _require(
            self.curvature_weight > 0 or self.curvature_ipc_power == 0,
            "squeeze.curvature-ipc-power",
            "0 without --squeeze.curvature-weight, of whose value at ipc 10 it makes that of --ipc; give that too",
            self.curvature_ipc_power,
        )
        step = self.curvature_step
        _require(0 < step < float("inf"), "squeeze.curvature-step", "a finite number > 0", step)
        forms = get_args(CurvatureForm)
        _require(
            self.curvature_form in forms,
            "squeeze.curvature-form",
            f"one of {', '.join(forms)}",
            self.curvature_form,
        )

    def at_ipc(self, ipc: int) -> SqueezeConfig:
        """Return the options with the curvature weight that `curvature_ipc_power` makes of it at `ipc`."""
        weight = self.curvature_weight * (10 / ipc) ** self.curvature_ipc_power
        return replace(self, curvature_weight=weight, curvature_ipc_power=0.0)


@dataclass(frozen=True, kw_only=True, slots=True)
class FeaturesConfig:
    """The one pass over the real images that keeps features and BatchNorm moments."""

    chunk_images: int = 512
    """Images of one unit of work: what a killed worker costs at most."""
    batch_size: int = 128
    """Images of one forward pass inside a chunk."""
    regroup: Literal["auto", "always", "never"] = "auto"
    """Sort the features into one file a class with a Ray Data shuffle; `auto` does so when the source's files mix many classes."""

    def __post_init__(self) -> None:
        _require(self.chunk_images >= 1, "features.chunk-images", ">= 1", self.chunk_images)
        _require(self.batch_size >= 1, "features.batch-size", ">= 1", self.batch_size)


@dataclass(frozen=True, kw_only=True, slots=True)
class BarycenterConfig:
    """The weighted atoms of each class: min W2^2(sum_j w_j delta(z_j), 1/N sum_n delta(x_n))."""

    solver: Literal["lloyd", "uniform", "emd", "sinkhorn", "sliced"] = "lloyd"
    """`lloyd` is exact block descent with free weights; `uniform` fixes them to 1/K; `emd` is the paper's alternation; the atoms of
    `sliced`, 1/K each, spread as far as the class in every direction, where the others' are means."""
    max_iters: int = 100
    """Most iterations of a start."""
    tol: float = 1e-6
    """Stop when the relative decrease of the cost falls below this."""
    num_starts: int = 1
    """Independent k-means++ starts of `lloyd` and `uniform`; the lowest cost wins."""
    reg: float = 0.05
    """Entropic regularization of `sinkhorn`, as a fraction of the mean squared distance."""
    num_projections: int = 100
    """Random directions of `sliced`."""
    margin_fraction: float = 0.0
    """Share of the atoms that are the barycenter of the quarter of the class nearest to the decision boundary (ours)."""
    label_weight: float | None = None
    """Take the barycenter of all classes at once in the space of features and label embeddings (the rows of the teacher's last
    layer), whose mean squared distance between classes is this times that of features within a class. A small weight lets
    classes of few images share atoms with their neighbors; unset, as with a large one, each class is by itself (ours)."""

    def __post_init__(self) -> None:
        for name in ("max_iters", "num_starts", "num_projections"):
            value = getattr(self, name)
            _require(value >= 1, f"barycenters.{name.replace('_', '-')}", ">= 1", value)
        _require(self.tol >= 0, "barycenters.tol", ">= 0", self.tol)
        _require(self.reg > 0, "barycenters.reg", "> 0", self.reg)
        _require(
            0 <= self.margin_fraction <= 1,
            "barycenters.margin-fraction",
            "in [0, 1]",
            self.margin_fraction,
        )
        if self.label_weight is None:
            return
        _require(self.label_weight >= 0, "barycenters.label-weight", ">= 0", self.label_weight)
        for name, value, needed in (
            ("solver", self.solver, "lloyd"),
            ("margin-fraction", self.margin_fraction, 0.0),
        ):
            _require(
                value == needed,
                f"barycenters.{name}",
                f"{needed} with --barycenters.label-weight, whose descent is Lloyd's over all classes",
                value,
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class DiffusionConfig:
    """Images sampled from a diffusion model, one after another, led to what the class's earlier images left out (OTG)."""

    model: str = ""
    """A diffusers pipeline (DiT, or UNet2DModel in pixel space) with safetensors weights: a folder, a URI, the --out of
    jobs/train_diffusion.py, or the name of a repository on the Hugging Face hub, such as facebook/DiT-XL-2-256."""
    class_ids: tuple[int, ...] = ()
    """The model's class of each class of the data, in its order; needed where the model's class names do not tell."""
    steps: int = 50
    """Denoising steps of an image (50 in IGD)."""
    eta: float = 1.0
    """Noise of a step: 1 is DDPM's, 0 is DDIM's deterministic path."""
    guidance_scale: float = 4.0
    """Classifier-free guidance: how far the conditional prediction is extrapolated (4 in IGD); 1 is none."""
    window: tuple[float, float] = (0.1, 0.4)
    """Part of the denoising in which images are guided, from noise (0) to image (1): IGD's steps 45 to 30 of 50."""
    ot_weight: float = 0.0
    """beta1 of OTG: the most that a guided step changes a value of the latent (or of a pixel in [-1, 1]) along the gradient of
    the transport distance between the class's images so far and its real ones. 0 samples the model as it is."""
    regularization: float = 0.1
    """Entropic regularization of that distance, a share of the mean distance between real latents of the class."""
    sinkhorn_iterations: int = 50
    """Sinkhorn iterations of a guided step."""
    real_per_step: int = 64
    """Real latents of the class that a guided step compares with, drawn anew from at most a few hundred kept."""
    diversity_weight: float = 0.0
    """Root mean square change of a value of the latent, at most, that a guided step makes away from the nearest earlier image of
    the class by cosine similarity (IGD's deviation term). 0 leaves it out."""
    influence_weight: float = 0.0
    """Root mean square change of a value of the latent that a guided step makes to train as the class does: it turns the loss
    gradient in a small classifier, trained on real latents first, to that of the class's real latents (IGD's influence term, whose
    k = 5 is in a unit that we do not know). 0 leaves it out."""
    influence_epochs: tuple[int, ...] = (0, 5, 18, 52)
    """Epochs of that classifier's training after which the gradients are compared, ascending; 0 is untrained, and the last one ends
    the training (IGD: 0 5 18 52 for ImageNet-1K, 0 2 11 40 for ImageNette, 0 5 16 40 for ImageWoof)."""
    influence_latents: int = 200
    """Real latents of a class, at most, by which the classifier is trained and the class's gradient taken (200 in IGD for the
    latter); of at most a few hundred kept."""

    def __post_init__(self) -> None:
        refuse_secrets("recover.diffusion.model", self.model)
        for name in ("steps", "sinkhorn_iterations", "real_per_step", "influence_latents"):
            value = getattr(self, name)
            _require(value >= 1, f"recover.diffusion.{name.replace('_', '-')}", ">= 1", value)
        _require(0 <= self.eta <= 1, "recover.diffusion.eta", "in [0, 1]", self.eta)
        begin, end = self.window
        _require(
            0 <= begin < end <= 1,
            "recover.diffusion.window",
            "two ascending numbers in [0, 1]",
            self.window,
        )
        for name in ("guidance_scale", "ot_weight", "diversity_weight", "influence_weight"):
            value = getattr(self, name)
            option = f"recover.diffusion.{name.replace('_', '-')}"
            _require(0 <= value < float("inf"), option, "a finite number >= 0", value)
        reg = self.regularization
        option = "recover.diffusion.regularization"
        _require(0 < reg < float("inf"), option, "a finite number > 0", reg)
        epochs = self.influence_epochs
        _require(
            len(epochs) > 0 and epochs[0] >= 0 and sorted(set(epochs)) == list(epochs),
            "recover.diffusion.influence-epochs",
            "at least one number >= 0, ascending",
            epochs,
        )
        ids = self.class_ids
        _require(
            len(set(ids)) == len(ids) and min(ids, default=0) >= 0,
            "recover.diffusion.class-ids",
            "different numbers >= 0, one a class of the data",
            ids,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class RecoverConfig:
    """Making of the distilled images: by default, optimized against the teacher's features and BatchNorm moments."""

    method: Literal["inversion", "diffusion"] = "inversion"
    """`inversion` optimizes pixels against the teacher (WMDD); `diffusion` samples a diffusion model that `diffusion.model` names,
    and of the options below uses images_per_group, tiles, mixed_precision and checkpoint_s alone."""
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    """Options of `method diffusion`."""
    iterations: int = 2000
    """Adam steps (2000 in WMDD)."""
    learning_rate: float = 0.25
    """Adam rate in normalized pixel units, cosine to 0 (0.25; 0.1 for Tiny-ImageNet, WMDD)."""
    beta1: float = 0.5
    """Adam's first-moment decay (WMDD)."""
    beta2: float = 0.9
    """Adam's second-moment decay (WMDD)."""
    feature_term: Literal["wasserstein", "cross_entropy", "mean", "rbf_mmd", "none"] = "wasserstein"
    """Feature loss: image to its atom; teacher's cross-entropy; class means (linear MMD); RBF MMD to the atoms; nothing."""
    feature_weight: float = 1.0
    """Coefficient of the feature term."""
    moments: Literal["per_class", "global", "blend", "none"] = "per_class"
    """BatchNorm target: the class's own moments (PCBN), the teacher's running ones (SRe2L), half of each loss (EDC), or nothing."""
    bn_weight: float = 10.0
    """Coefficient of the moment term, lambda of the paper (10 to 500 in WMDD's; on Fashion-MNIST 10 is the best of 1, 10, 100 from
    noise, and 1 is 0.6 points better from real images by hard labels: README)."""
    weighted_moments: bool = False
    """Weight each image's share of the synthetic moments by its atom's weight (paper eq. for PCBN; off in the released run)."""
    ema_statistics: float = 0.0
    """Share of earlier iterations in the synthetic moments that are compared (0.8 in EDC, 0.4 in G-VBSM)."""
    ce_weight: float = 0.0
    """Coefficient of the teacher's cross-entropy on top of the feature term (1 in the reference's README, 0 in its late runs)."""
    start: Literal["noise", "nearest", "random", "mosaic"] = "nearest"
    """First iterate: noise (paper), the real image nearest to the atom, a random one, or the teacher's easiest crops (RDED)."""
    tiles: int = 1
    """A stored image is a grid of tiles x tiles small ones, each with an atom of its own (IDC's multi-formation, 2 there)."""
    residual_blends: int = 0
    """Times, evenly spread, that the images become half themselves and half their start, which must be real (3 in FADRM)."""
    mixed_precision: bool = False
    """bfloat16 autocast of the teacher's passes on any device, losses in float32 (FADRM); pays where the processor has bfloat16."""
    images_per_group: int = 100
    """Classes that share a forward pass: max(1, images_per_group // ipc). One group is one unit of work."""
    crop_scale_min: float = 0.5
    """Smallest area fraction of the random resized crop during synthesis (0.08 in the reference, 0.5 in EDC)."""
    flip: bool = True
    """Random horizontal flip during synthesis."""
    roll_px: int = 4
    """Largest cyclic shift during synthesis, pixels (32 at 224 px in the reference)."""
    checkpoint_s: float = 20.0
    """A group that runs longer than this stores its state in the room, and resumes from there after a kill, seconds."""

    def __post_init__(self) -> None:
        methods = ("inversion", "diffusion")
        _require(self.method in methods, "recover.method", "inversion or diffusion", self.method)
        _require(
            self.method == "inversion" or self.diffusion.model.strip() != "",
            "recover.diffusion.model",
            "a folder, URI or hub name of a diffusers pipeline for --recover.method diffusion (jobs/train_diffusion.py makes one)",
            self.diffusion.model,
        )
        for name in ("ot_weight", "diversity_weight", "influence_weight"):
            value = getattr(self.diffusion, name)
            _require(
                self.method == "diffusion" or value == 0,
                f"recover.diffusion.{name.replace('_', '-')}",
                f"0 with --recover.method {self.method}, which samples no diffusion model; add --recover.method diffusion, or "
                "leave it out",
                value,
            )
        _require(self.iterations >= 0, "recover.iterations", ">= 0", self.iterations)
        _require(self.learning_rate > 0, "recover.learning-rate", "> 0", self.learning_rate)
        for name in ("beta1", "beta2", "ema_statistics"):
            value = getattr(self, name)
            _require(0 <= value < 1, f"recover.{name.replace('_', '-')}", "in [0, 1)", value)
        _require(self.tiles >= 1, "recover.tiles", ">= 1", self.tiles)
        most_blends = max(0, self.iterations - 1)
        _require(
            0 <= self.residual_blends <= most_blends or self.iterations == 0,
            "recover.residual-blends",
            f"in [0, {most_blends}], one less than the iterations",
            self.residual_blends,
        )
        _require(
            self.residual_blends == 0 or self.start != "noise",
            "recover.start",
            f"a real start for --recover.residual-blends {self.residual_blends}",
            self.start,
        )
        for name in ("feature_weight", "bn_weight", "ce_weight", "roll_px"):
            value = getattr(self, name)
            _require(value >= 0, f"recover.{name.replace('_', '-')}", ">= 0", value)
        _require(
            0 < self.crop_scale_min <= 1,
            "recover.crop-scale-min",
            "in (0, 1]",
            self.crop_scale_min,
        )
        _require(
            self.images_per_group >= 1, "recover.images-per-group", ">= 1", self.images_per_group
        )
        _require(self.checkpoint_s > 0, "recover.checkpoint-s", "> 0", self.checkpoint_s)


@dataclass(frozen=True, kw_only=True, slots=True)
class ViewConfig:
    """The random views of an image that a soft label belongs to."""

    crop_scale_min: float = 0.5
    """Smallest area fraction of the random resized crop (0.08 in FKD, 0.5 in EDC)."""
    flip: bool = True
    """Random horizontal flip with probability 1/2."""
    mix: Literal["cutmix", "mixup", "none"] = "cutmix"
    """How a view is mixed with its partner's view (FKD uses CutMix)."""
    mix_alpha: float = 1.0
    """Beta(alpha, alpha) parameter of the mixing share."""

    def __post_init__(self) -> None:
        _require(
            0 < self.crop_scale_min <= 1,
            "relabel.views.crop-scale-min or --evaluate.hard.views.crop-scale-min",
            "in (0, 1]",
            self.crop_scale_min,
        )
        _require(
            self.mix_alpha > 0,
            "relabel.views.mix-alpha or --evaluate.hard.views.mix-alpha",
            "> 0",
            self.mix_alpha,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class RelabelConfig:
    """The teacher's soft labels of random views, stored by label epoch (FKD)."""

    epochs: int = 300
    """Label epochs: views with their logits, stored for every distilled image (300 in FKD)."""
    views: ViewConfig = field(default_factory=ViewConfig)
    """How views are drawn."""
    compression: Literal["full", "top_k"] = "full"
    """`full` keeps every logit; `top_k` keeps the largest and the mass of the rest."""
    precision: Literal["fp16", "int8"] = "fp16"
    """Numbers that logits are kept in: half precision, or steps below a row's largest, 255 at most."""
    step: float = 0.125
    """Size of the steps of `int8`, in logits; the error is at most half of it, and larger steps take fewer bytes. A twentieth of
    the students' temperature (1 at FKD's 20) cost up to 0.2 points on Fashion-MNIST (README)."""
    stored_views: Literal["seed", "rows"] = "seed"
    """`seed` stores what views are drawn again from, to the bit, instead of the boxes (33 bytes a view); rows are kept with mixing
    shares from a Beta distribution other than --relabel.views.mix-alpha 1, which machines may round differently."""
    labels: Literal["stored", "online"] = "stored"
    """`online` stores no logits: the data set ships the teacher, and whoever trains on it computes them in the loader, on the
    views that stored ones would have."""
    top_k: int = 10
    """Logits that `top_k` keeps."""
    batch_size: int = 256
    """Views of one teacher pass."""
    batch_statistics: bool = False
    """Normalize by the batch's statistics, not the teacher's running ones (CV-DD's BSSL): a label then depends on its batch."""
    slice_images: int = 4096
    """Images (whole classes) that one unit holds in memory and mixes among themselves, drawn anew every unit."""
    epochs_per_unit: int = 25
    """Label epochs that make one unit of work and one file."""
    teachers: int = 1
    """Teachers whose mean logits are the labels: the one that images are made for, and more of the same training from other random
    starts. With --teacher they are taken from that run. One, as in WMDD; the mean of several, as in CV-DD and LIA."""
    teacher_schedule: tuple[tuple[int, int], ...] = ()
    """Teachers by ipc, as LIA has few at small ipc and more at large: (ipc, teachers) pairs of rising ipc, of which the last one
    not above --ipc counts; below the first, `teachers`. `10 2 50 4` is 2 from 10 images a class on, and 4 from 50."""

    def __post_init__(self) -> None:
        for name in (
            "epochs",
            "top_k",
            "batch_size",
            "slice_images",
            "epochs_per_unit",
            "teachers",
        ):
            value = getattr(self, name)
            _require(value >= 1, f"relabel.{name.replace('_', '-')}", ">= 1", value)
        ipcs = [ipc for ipc, _ in self.teacher_schedule]
        _require(
            ipcs == sorted(set(ipcs)) and all(min(pair) >= 1 for pair in self.teacher_schedule),
            "relabel.teacher-schedule",
            "(ipc, teachers) pairs of rising ipc, both >= 1",
            self.teacher_schedule,
        )
        # Half precision holds steps from 2^-14 with all their bits.
        _require(2**-14 <= self.step <= 1000, "relabel.step", "in [2^-14, 1000]", self.step)
        for option in ("precision", "stored_views", "labels", "compression"):
            value = getattr(self, option)
            names = {
                "precision": ("fp16", "int8"),
                "stored_views": ("seed", "rows"),
                "labels": ("stored", "online"),
                "compression": ("full", "top_k"),
            }[option]
            _require(
                value in names,
                f"relabel.{option.replace('_', '-')}",
                f"one of {', '.join(names)}",
                value,
            )
        _require(
            self.labels == "stored" or not self.batch_statistics,
            "relabel.labels",
            "stored with --relabel.batch-statistics, whose labels depend on their batch, which is another in every loader",
            self.labels,
        )

    def teachers_at(self, ipc: int) -> int:
        """Return the number of teachers at `ipc`."""
        reached = [teachers for first, teachers in self.teacher_schedule if first <= ipc]
        return reached[-1] if reached else self.teachers


@dataclass(frozen=True, kw_only=True, slots=True)
class AssembleConfig:
    """The data set as it is handed to others."""

    license: str = "other"
    """License identifier for the data-set card: the license of the real images decides it, so it is yours to state."""
    preview_classes: int = 20
    """Most classes shown in `preview.png`."""
    preview_images: int = 10
    """Most images of a class shown in `preview.png`."""

    def __post_init__(self) -> None:
        _require(
            self.preview_classes >= 1, "assemble.preview-classes", ">= 1", self.preview_classes
        )
        _require(self.preview_images >= 1, "assemble.preview-images", ">= 1", self.preview_images)


@dataclass(frozen=True, kw_only=True, slots=True)
class HardLabelConfig:
    """What students do otherwise when they learn from the images' classes alone."""

    views: ViewConfig = field(default_factory=lambda: ViewConfig(mix="none"))
    """Views, drawn as they train: small crops say much by soft labels and mislead by hard ones. Mixtures help where the crops are
    large: on Fashion-MNIST at ipc 10, CutMix of crops of 80 % of the area and more is 3 points better than these."""
    norm: Norm = "batch"
    """Normalization of `convnet3` students. InstanceNorm, the literature's, is worth 6 points at ipc 1 on Fashion-MNIST by hard
    labels, where a batch is all there is, and costs 2 by soft ones."""
    optimizer: OptimizerName = "adamw"
    """Optimizer, as `--evaluate.optimizer`."""
    learning_rate: float = 1e-3
    """Peak rate."""

    def __post_init__(self) -> None:
        _require(self.learning_rate > 0, "evaluate.hard.learning-rate", "> 0", self.learning_rate)
        for name, kind in (("norm", Norm), ("optimizer", OptimizerName)):
            names, value = get_args(kind), getattr(self, name)
            _require(value in names, f"evaluate.hard.{name}", f"one of {', '.join(names)}", value)


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluateConfig:
    """Students trained from the distilled set alone, and the baselines under the same recipe."""

    network: NetworkConfig = field(default_factory=NetworkConfig)
    """Architecture of the students."""
    epochs: int = 300
    """Passes over the images; label epochs are cycled when fewer are stored."""
    batch_size: int = 25
    """Images of one optimizer step (25 instead of 100 is worth 2.7 points at ipc 10 on Fashion-MNIST: README, ablation)."""
    optimizer: OptimizerName = "adamw"
    """Student optimizer. `muon` orthogonalizes the steps of the hidden weight matrices (Jordan et al. 2024) and leaves the first
    layer, the classifier, biases and norms to AdamW; OGM (CVPR 2026) reports 39.4 -> 47.0 by it on ImageNet-1K at ipc 10."""
    learning_rate: float = 1e-3
    """Peak rate, the same for both parts of `muon`, whose steps are scaled to the size of AdamW's (Liu et al. 2025)."""
    schedule: Schedule = "cosine"
    """How the rate falls, per step: `cosine` to 0; `half_cosine` to half the peak, (1 + cos(pi t / 2T)) / 2 (RDED, EDC)."""
    weight_decay: float = 0.01
    """Decoupled (AdamW, Muon) or L2 (SGD) decay of parameters with more than one dimension."""
    loss: StudentLoss = "kl"
    """Loss to the soft labels: KL divergence at `temperature` (FKD), or mean squared error between logits that are centered
    per image (G-VBSM, EDC)."""
    temperature: float = 20.0
    """Temperature of the KL divergence to the soft labels (20 in FKD); `mse` has none."""
    ce_weight: float = 0.0
    """Coefficient of the cross-entropy to the hard label, mixed as the view is, on top of the soft labels' loss (0.025 in EDC)."""
    sinkhorn_weight: float = 0.0
    """Coefficient of the entropic optimal-transport distance between a batch of the student's outputs and the teacher's of the same
    views, on top of the soft labels' loss (OTM; its kappa1 is `ce_weight`, its kappa2 the 1 of `loss mse`; its own weight is not
    published). With `mse`, 0.1 and 1 made no measurable difference on Fashion-MNIST at ipc 10; beside the small gradients of `kl`
    0.01 cost 2 points. 0 leaves it out."""
    sinkhorn_regularization: float = 0.1
    """Entropic regularization of that distance, a share of the mean cost in the batch (ours; SinKD has an absolute 0.1 where the
    outputs are probabilities at temperature 2)."""
    sinkhorn_iterations: int = 10
    """Sinkhorn iterations a step."""
    ema_decay: float = 0.0
    """Decay a step of the weights' moving average, which is what is tested (0.99 in EDC); bias-corrected as Adam's moments are,
    so that the random start has no part in it; 0 tests the last weights."""
    mixed_precision: bool = False
    """bfloat16 autocast of the student's forward pass, on CPU too (2 to 2.5 times the steps per second with AVX512-BF16 on
    ConvNet-3); losses, optimizer and test stay float32."""
    weighted_loss: bool = False
    """Multiply an image's loss by its atom's weight, normalized to mean 1 over the data set."""
    num_seeds: int = 3
    """Students of each row; the table shows mean and standard deviation."""
    labels: tuple[LabelKind, ...] = ("soft", "hard")
    """Labels that students learn from: the teacher's soft ones on the stored views, or the images' classes. Every row is trained
    with each: soft labels alone hide how much of an accuracy is the labels'."""
    hard: HardLabelConfig = field(default_factory=HardLabelConfig)
    """What is different for hard labels."""
    baselines: tuple[Baseline, ...] = (
        *("random_real", "nearest_real", "random_tiles", "nearest_tiles", "all_real"),
    )
    """Real-image rows beside the distilled set, of as many stored images (but `all_real`), trained by the identical recipe; the
    `tiles` rows hold as many small real images as the distilled set has tiles, and are left out where it has none."""
    all_real_epochs: int = 20
    """Passes over all real images in the `all_real` row (its data set is larger, so fewer passes are more steps)."""

    def __post_init__(self) -> None:
        for name in ("epochs", "num_seeds", "all_real_epochs"):
            value = getattr(self, name)
            _require(value >= 1, f"evaluate.{name.replace('_', '-')}", ">= 1", value)
        _require(len(self.labels) > 0, "evaluate.labels", "soft, hard or both", self.labels)
        _require(self.batch_size >= 2, "evaluate.batch-size", ">= 2 (BatchNorm)", self.batch_size)
        _require(self.learning_rate > 0, "evaluate.learning-rate", "> 0", self.learning_rate)
        _require(self.temperature > 0, "evaluate.temperature", "> 0", self.temperature)
        _require(self.ce_weight >= 0, "evaluate.ce-weight", ">= 0", self.ce_weight)
        _require(0 <= self.ema_decay < 1, "evaluate.ema-decay", "in [0, 1)", self.ema_decay)
        weight, reg = self.sinkhorn_weight, self.sinkhorn_regularization
        _require(0 <= weight < float("inf"), "evaluate.sinkhorn-weight", "finite, >= 0", weight)
        _require(0 < reg < float("inf"), "evaluate.sinkhorn-regularization", "finite, > 0", reg)
        _require(
            self.sinkhorn_iterations >= 1,
            "evaluate.sinkhorn-iterations",
            ">= 1",
            self.sinkhorn_iterations,
        )
        for name in ("ce_weight", "sinkhorn_weight"):
            _require(
                "soft" in self.labels or getattr(self, name) == 0,
                f"evaluate.{name.replace('_', '-')}",
                "0 for students of hard labels alone, for it adds to the loss to soft ones; add soft to --evaluate.labels, or "
                "leave it out",
                getattr(self, name),
            )
        for name, kind in (
            ("optimizer", OptimizerName),
            ("schedule", Schedule),
            ("loss", StudentLoss),
        ):
            names, value = get_args(kind), getattr(self, name)
            _require(value in names, f"evaluate.{name}", f"one of {', '.join(names)}", value)

    def for_labels(self, labels: LabelKind) -> EvaluateConfig:
        """Return the recipe of students of these labels: for hard ones with what `hard` has otherwise."""
        if labels == "soft":
            return self
        norm = self.hard.norm if self.network.arch == "convnet3" else "batch"
        return replace(
            self,
            network=replace(self.network, norm=norm),
            optimizer=self.hard.optimizer,
            learning_rate=self.hard.learning_rate,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class AttackConfig:
    """Attacks on trained students, in [0, 1] pixel space."""

    names: tuple[AttackName, ...] = ()
    """`pgd` (100 steps), `square`, `autoattack` (standard), `cw` (L2), `mim`."""
    eps: tuple[str, ...] = ("1/255", "2/255", "8/255")
    """Largest change of a pixel (L-infinity), as fractions of its range: `8/255` or `0.03`."""
    images: int = 1000
    """Held-out images that are attacked: as many of each class as the number allows, by the seed. All where there are fewer."""

    def __post_init__(self) -> None:
        _require(self.images >= 1, "attack-images", ">= 1", self.images)
        _require(len(self.eps) > 0, "eps", "at least one budget", self.eps)
        for text in self.eps:
            try:
                value = Fraction(text)
            except (ValueError, ZeroDivisionError):
                value = Fraction(0)
            _require(0 < value < 1, "eps", "fractions between 0 and 1, as 8/255", text)
        values = [Fraction(text) for text in self.eps]
        _require(len(set(values)) == len(values), "eps", "each budget once", self.eps)


@dataclass(frozen=True, kw_only=True, slots=True)
class DistillConfig:
    """One complete run."""

    recipe: str = "digits"
    """Name of the recipe that the defaults come from."""
    variant: Literal["best", "paper"] = "best"
    """Which defaults: `best` is what proved best (README), `paper` is WMDD as it was published."""
    ipc: int = 10
    """Distilled images per class."""
    seed: int = 0
    """Seed of everything random; each unit of work derives its own from (seed, stage, unit)."""
    data: str = "digits"
    """Training images: `digits` (embedded), a path, or a URI."""
    val_data: str | None = None
    """Held-out images; not needed where the source brings its own split (digits, IDX, folders `train`/`val`)."""
    teacher: str | None = None
    """A committed teacher room, `torchvision:WEIGHTS`, or a checkpoint file; trained by `squeeze` when absent."""
    source: SourceConfig = field(default_factory=SourceConfig)
    squeeze: SqueezeConfig = field(default_factory=SqueezeConfig)
    features: FeaturesConfig = field(default_factory=FeaturesConfig)
    barycenters: BarycenterConfig = field(default_factory=BarycenterConfig)
    recover: RecoverConfig = field(default_factory=RecoverConfig)
    relabel: RelabelConfig = field(default_factory=RelabelConfig)
    assemble: AssembleConfig = field(default_factory=AssembleConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)

    def __post_init__(self) -> None:
        for option in ("data", "val_data", "teacher"):
            refuse_secrets(option.replace("_", "-"), getattr(self, option))
        _require(self.ipc >= 1, "ipc", ">= 1", self.ipc)
        _require(self.seed >= 0, "seed", ">= 0", self.seed)
        _require(
            self.teacher is None or self.squeeze.curvature_weight == 0,
            "squeeze.curvature-weight",
            f"0 with --teacher {self.teacher}, which is taken as it is; to have a robust one, leave --teacher out, or give a run "
            "whose own teacher was trained with this weight",
            self.squeeze.curvature_weight,
        )
        most_tiles = self.source.image_size // _TILE_PIXELS
        _require(
            self.recover.tiles <= most_tiles,
            "recover.tiles",
            f"at most {most_tiles}, which leaves {_TILE_PIXELS} of {self.source.image_size} pixels a tile",
            self.recover.tiles,
        )
        stored, used = self.relabel.epochs, self.evaluate.epochs
        _require(
            used <= stored or used % stored == 0,
            "evaluate.epochs",
            f"at most the {stored} stored label epochs (--relabel.epochs) or a multiple of them",
            used,
        )

    @property
    def num_teachers(self) -> int:
        """Teachers that label this run's images; the first of them is the one that the images are made for."""
        return self.relabel.teachers_at(self.ipc)

    @property
    def num_atoms(self) -> int:
        """Atoms of a class, and the images that a student sees of it: ipc stored images of tiles x tiles small ones."""
        return self.ipc * self.recover.tiles**2


@dataclass(frozen=True, kw_only=True, slots=True)
class Resources:
    """Where and how wide a run is executed. Changes the time, never the result."""

    num_workers: int = -1
    """Workers of the training, recover, relabel and student stages; 0 runs them in the driver; -1 decides by the cluster."""
    gpus_per_worker: float = -1.0
    """GPUs of one worker; -1 takes one when the cluster has GPUs, else none."""
    cpus_per_worker: int = 1
    """CPUs, and with them computing threads, of one worker (one: on shared cores two threads ran 4 to 7 times slower)."""
    executor: Literal["auto", "train", "actors"] = "auto"
    """What the workers are: one Ray Train group, which a lost worker starts again as a whole, or isolated actors, of which a lost
    one costs its own unit; auto takes a group up to 8 workers with 4 units each, where recover is 93 to 97 % efficient at 5 %
    of the nodes lost an hour (ImageNet, simulated; at 64 workers and ipc 100 81 against 97 %)."""
    max_actors: int = 1000
    """Most barycenter and embedding actors."""

    def __post_init__(self) -> None:
        _require(self.num_workers >= -1, "num-workers", ">= 0, or -1 for auto", self.num_workers)
        _require(self.cpus_per_worker >= 1, "cpus-per-worker", ">= 1", self.cpus_per_worker)
        _require(self.max_actors >= 1, "max-actors", ">= 1", self.max_actors)


@dataclass(frozen=True, kw_only=True, slots=True)
class Reporting:
    """Who is told of a run's numbers while it runs, besides the terminal and Ray's own metrics. Never changes the result.

    A tracker that is not installed is an error at once; one that fails later is left out with a warning.
    """

    tensorboard: str | None = None
    """Folder or URI that gets a folder of TensorBoard event files, named like the last part of --out (needs tensorboardX, which
    Ray Train brings along)."""
    mlflow: str | None = None
    """MLflow tracking URI, such as http://host:5000 or sqlite:///mlflow.db; its experiment is MLFLOW_EXPERIMENT_NAME, else wmdd_ray
    (needs `pip install mlflow`)."""
    wandb: str | None = None
    """Weights & Biases PROJECT or ENTITY/PROJECT, with WANDB_API_KEY, or WANDB_MODE=offline (needs `pip install wandb`)."""

    def __post_init__(self) -> None:
        refuse_secrets("tensorboard", self.tensorboard)
        # A database's URI may have a query; the password is what must not be repeated.
        if has_user(self.mlflow or ""):
            raise ConfigError(
                "--mlflow: expected a URI without a password, which would be repeated in logs and files; pass http://host:5000, "
                "and credentials by MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
            )
        for name in ("tensorboard", "mlflow", "wandb"):
            value = getattr(self, name)
            _require(value is None or value.strip() != "", name, "where to report to", value)
