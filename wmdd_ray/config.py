"""Every option of the pipeline: one frozen dataclass a stage, in one file on purpose, the reference of all options.

The docstring under a field is its `--help` text: meaning, unit, where the default is from. Bounds, and when an option leaves the
fingerprint, are declared with it (`options.py`); what stands in `__post_init__` are rules between options. A configuration
is made by a function in `recipes.py`; a variant of one is `dataclasses.replace`. `Resources` and `Reporting` say where the work
runs and who is told, never what comes out: they take no part in fingerprints.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Literal, get_args

from wmdd_ray.errors import ConfigError
from wmdd_ray.options import check, option, require
from wmdd_ray.options import refuse_secrets as refuse_secrets
from wmdd_ray.redaction import has_user

# A name that `core.architectures.build_network` knows.
Arch = str
Norm = Literal["batch", "instance"]
OptimizerName = Literal["adamw", "sgd", "muon"]
StudentLoss = Literal["kl", "mse"]
LabelKind = Literal["soft", "hard"]
Baseline = Literal["random_real", "nearest_real", "random_tiles", "nearest_tiles", "all_real"]
Schedule = Literal["cosine", "half_cosine"]
Format = Literal["auto", "digits", "imagefolder", "webdataset", "parquet", "idx", "csv", "cifar"]
Numbers = Literal["auto", "index", "index-from-1", "name"]
CurvatureForm = Literal["gradient", "loss"]
AttackName = Literal["pgd", "square", "autoattack", "cw", "mim"]
TarKeys = Literal["auto", "first-dot", "last-dot"]
READING = ("format", "label_column", "image_column", "numbers", "layout", "tar_keys")
"""Options of --source by which real images and their labels are found in the files."""
_TILE_PIXELS = 4  # smallest side of a tile
StageName = Literal[
    "squeeze", "features", "barycenters", "recover", "relabel", "assemble", "evaluate"
]


@dataclass(frozen=True, kw_only=True, slots=True)
class BucketAccess:
    """How the real images are reached where that differs from the output, which the environment tells how to reach."""

    anonymous: bool = False
    """Ask without credentials: public buckets, on a machine that has none or has some of another account."""
    requester_pays: bool = False
    """Agree to pay for the requests, as the owners of some buckets demand (on S3 slower: not by Arrow's own client)."""
    endpoint: str | None = None
    """S3: address of the store, such as `https://s3.example.org`; absent: AWS_ENDPOINT_URL_S3 or AWS_ENDPOINT_URL."""
    region: str | None = None
    """S3: region of the bucket; absent: AWS_REGION, or the profile's."""
    profile: str | None = None
    """S3: section of the AWS credentials file, which every node must have (slower: not by Arrow's own client)."""

    def __post_init__(self) -> None:
        refuse_secrets("source.bucket.endpoint", self.endpoint)
        expected = "no requester-pays and no profile beside it: both need credentials"
        alone = not (self.anonymous and (self.requester_pays or self.profile))
        require(alone, "source.bucket.anonymous", expected, self)


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceConfig:
    """How the real images are read and brought to the network's input."""

    format: Format = "auto"
    """Layout of `--data`; `auto` looks at the names under the URI."""
    image_size: int = option(32, ge=8)
    """Side of the square network input and of the distilled images, pixels."""
    resize: int = 32
    """Shorter side after resizing, before the center crop to `image_size`, pixels (256 for ImageNet, torchvision)."""
    channels: Literal[1, 3] = 3
    """Color channels of the network input: every picture mode is converted to 1 (gray) or 3 (RGB)."""
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    """Per-channel mean in [0, 1] that the network input is centered by."""
    std: tuple[float, ...] = option((0.229, 0.224, 0.225), gt=0)
    """Per-channel standard deviation in [0, 1] that the network input is divided by."""
    interpolation: Literal["bilinear", "bicubic"] = option("bilinear", absent_at="bilinear")
    """Filter of the resizing, antialiased: bilinear (torchvision's ResNets) or bicubic (most of timm's weights)."""
    exif_orientation: bool = option(True, absent_at=True)
    """Turn a picture as its EXIF data say before anything else; off, its pixels are taken as they are stored, as most training
    scripts do (torchvision's ImageFolder among them)."""
    max_bad_images: int = option(10, ge=0)
    """Images that may be unreadable (counted, named, skipped) before the run stops."""
    max_image_pixels: int = option(64_000_000, gt=0)
    """Largest width x height that is decoded; a larger header is refused as a bad image (64 MP covers ImageNet)."""
    follow_links: bool = False
    """Follow links out of the `--data` folder (a hub's cache, a subset made of links): say so only of links that are yours."""
    layout: str = option("", in_fingerprint=False)
    """Where the images of a class lie, as a path below `--data`, where the folders leave a doubt: `train/{class}`,
    `{split}/{class}`, `*/{class}`, `train/{class}_{number}.*` (file names that begin with the class). `*` is any name, or part
    of one, `{number}` digits; what ends in a folder takes all below it. Of archives and Parquet the files: `full_size/*`.
    Empty: told by the folders themselves."""
    tar_keys: TarKeys = option("auto", in_fingerprint=False)
    """Where the key of a tar's member ends: at the first dot of its name, as webdataset has it, or at the last (`img_012.05.png`).
    `auto` is the first, and stops where the last would find images that the first does not."""
    max_passed_over: float = option(0.25, ge=0, le=1, in_fingerprint=False)
    """Largest share of a folder's files that may be no image of any class, [0, 1], text beside images not counted: beyond it the
    run stops and says what they are."""
    label_column: str | None = option(None, absent_at=None)
    """Where labels are: the column of a Parquet file or a table, the key in WebDataset's `.json`, `coarse_label` of CIFAR-100.
    Absent: by its usual or declared name."""
    image_column: str | None = option(None, absent_at=None)
    """Where images are: the column of a Parquet file, the paths' of a table, the ending in WebDataset. Absent: as for labels."""
    numbers: Numbers = option("auto", absent_at="auto")
    """What a number as a label means: `index`, a place in the class names from 0 (`index-from-1`: from 1), or `name`, the class
    that is called so. `auto`: a place in the names that come with the file, else its own name, and refused in doubt."""
    bucket: BucketAccess = option(BucketAccess(), in_fingerprint=False)
    """How these images are reached in a bucket."""

    def __post_init__(self) -> None:
        check(self, "source.")
        expected = f"at least image_size {self.image_size}"
        require(self.resize >= self.image_size, "source.resize", expected, self.resize)
        for name, values in (("mean", self.mean), ("std", self.std)):
            expected = f"{self.channels} values, one a channel of --source.channels"
            require(len(values) == self.channels, f"source.{name}", expected, values)

    @property
    def shape(self) -> dict[str, int]:
        """Channels and side of the input, as a network is told them."""
        return {"channels": self.channels, "image_size": self.image_size}


@dataclass(frozen=True, kw_only=True, slots=True)
class NetworkConfig:
    """A classifier architecture, of the teacher or of a student."""

    arch: Arch = "convnet3"
    """`convnetN` is the small-image literature's N blocks (3 up to 32 px, 4 at 64, 6 at 224), `resnetap10` its ResNet-10 with
    average pooling for strides, `vit_tiny` 4 layers of width 128; then a classifier of torchvision by its name, `timm:NAME`, and
    `module:function` of your own: code that you trust, imported by every worker and called with num_classes, channels and
    image_size. A teacher needs a last Linear layer, and BatchNorm2d layers unless --recover.moments none."""
    width: int = option(64, ge=1)
    """Channels of each ConvNet block (128 in the literature); not used by the other architectures."""
    small_stem: bool = False
    """3x3 stride-1 first convolution for a strided one, and no max-pool after it, for images of 64 px and less. Networks whose
    first convolution keeps the resolution or cuts patches (ViT, Swin, ConvNeXt) have no such stem and ignore it."""
    norm: Norm = "batch"
    """Normalization of `convnetN` and `resnetap10`: BatchNorm, which a teacher must have, or the literature's InstanceNorm."""

    def __post_init__(self) -> None:
        expected = f"batch, the only one that {self.arch} has"
        require(self.norm == "batch" or self.has_norm_option, "norm", expected, self.norm)

    @property
    def has_norm_option(self) -> bool:
        """Whether `norm` may be another one than BatchNorm."""
        return self.arch.startswith("convnet") or self.arch == "resnetap10"


@dataclass(frozen=True, kw_only=True, slots=True)
class SqueezeConfig:
    """Training of the teacher on the real images."""

    network: NetworkConfig = NetworkConfig()
    """Architecture of the teacher."""
    epochs: int = option(50, ge=1)
    """Passes over the real images (50 in WMDD's reference)."""
    batch_size: int = option(128, ge=2)
    """Images of one optimizer step."""
    batch_parts: int = option(1, ge=1, absent_at=1)
    """Equal parts of a batch, each with BatchNorm statistics and random numbers of its own; gradients are summed in their order. As
    many workers as divide it share a training. Another number makes another teacher; who computes a part changes no bit."""
    optimizer: OptimizerName = option("sgd", absent_at="sgd")
    """`sgd` has Nesterov momentum; `muon` orthogonalizes the steps of the hidden layers, as in `--evaluate.optimizer`."""
    learning_rate: float = option(0.05, gt=0)
    """Peak rate; cosine to 0."""
    warmup_epochs: float = option(0.0, ge=0, absent_at=0)
    """Epochs in which the rate first rises linearly to its peak, at most `epochs`; fractions are rounded to steps."""
    momentum: float = 0.9
    """SGD momentum."""
    weight_decay: float = 5e-4
    """L2 (SGD) or decoupled (AdamW, Muon) decay of parameters with more than one dimension."""
    ema_decay: float = option(0.0, ge=0, lt=1, absent_at=0)
    """Decay a step of the weights' moving average, which becomes the teacher (`--evaluate.ema-decay`); 0 takes the last weights."""
    label_smoothing: float = option(0.0, ge=0, lt=1)
    """Mass moved from the true class to all classes."""
    crop_scale_min: float = option(0.5, gt=0, le=1)
    """Smallest area fraction of the random resized crop, (0, 1]; 1 takes whole images."""
    shift_px: int = option(0, ge=0, absent_at=0)
    """Furthest that the box of the crop is moved up or down and left or right, at random, pixels; what is outside of the image
    repeats its border (4 is the practice on CIFAR-10, with `crop_scale_min` 1)."""
    flip: bool = True
    """Random horizontal flip with probability 1/2 (off for digits: a mirrored digit is no digit)."""
    mixed_precision: bool = False
    """bfloat16 autocast of the forward pass, on CPU too; loss and optimizer stay float32."""
    curvature_weight: float = option(0.0, ge=0, absent_at=0)
    """Coefficient of the curvature of the loss around each image, for a teacher and images that are harder to attack (GUARD). A
    mean over images: the authors' lambda 100 at batch 128 is 0.78 here. 0 leaves the term out."""
    curvature_step: float = option(3.0, gt=0, only_with="curvature_weight")
    """Step along the input gradient over which the curvature is taken, L2 in normalized input units (3 in GUARD's CIFAR script)."""
    curvature_form: CurvatureForm = option("gradient", only_with="curvature_weight")
    """`gradient` is GUARD's |grad L(x + z) - grad L(x)|, by double backward; `loss`, |L(x + z) - L(x)|, its ImageNet script's."""
    curvature_ipc_power: float = option(0.0, ge=0, absent_at=0)
    """p in curvature_weight x (10 / ipc)^p; at large ipc robustness costs more clean accuracy (GUARD). The rule is ours."""
    min_top1: float = option(0.0, ge=0, lt=1)
    """Refuse a teacher below this held-out top-1, in [0, 1]; 0 is three times chance (below five classes half way to 1)."""
    check_class_order: bool = option(True, in_fingerprint=False)
    """Refuse a given teacher whose classes are shown to be in another order than the data's; one in order is refused by mistake
    once in a thousand times at most. Off, such a teacher is taken as it is, if its top-1 allows."""
    memory_limit_gib: float = option(4.0, absent_at=4.0)
    """Training images are held decoded in memory up to this size per worker; above it they are streamed every epoch, in another
    order, which makes another teacher."""

    def __post_init__(self) -> None:
        check(self, "squeeze.")
        network, power = self.network, self.curvature_ipc_power
        expected = f"at most half of the {self.batch_size} images of a batch (--squeeze.batch-size)"
        ok = self.batch_parts == 1 or 2 * self.batch_parts <= self.batch_size
        require(ok, "squeeze.batch-parts", expected, self.batch_parts)
        expected = "batch, whose inputs the images are matched by"
        require(network.norm == "batch", "squeeze.network.norm", expected, network.norm)
        expected = "0 without --squeeze.curvature-weight; give that too, or leave this out"
        ok = power == 0 or self.curvature_weight > 0
        require(ok, "squeeze.curvature-ipc-power", expected, power)
        expected = f"at most the {self.epochs} epochs that there are"
        require(
            self.warmup_epochs <= self.epochs, "squeeze.warmup-epochs", expected, self.warmup_epochs
        )

    def at_ipc(self, ipc: int) -> SqueezeConfig:
        """Return the options with the curvature weight that `curvature_ipc_power` makes of it at `ipc`."""
        weight = self.curvature_weight * (10 / ipc) ** self.curvature_ipc_power
        return replace(self, curvature_weight=weight, curvature_ipc_power=0.0)


@dataclass(frozen=True, kw_only=True, slots=True)
class FeaturesConfig:
    """The one pass over the real images that keeps features and BatchNorm moments."""

    chunk_images: int = option(512, ge=1)
    """Images of one unit of work: what a killed worker costs at most."""
    batch_size: int = option(128, ge=1)
    """Images of one forward pass inside a chunk."""
    regroup: Literal["auto", "always", "never"] = "auto"
    """Sort the features into one file a class with a Ray Data shuffle; `auto` does so when the source's files mix many classes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BarycenterConfig:
    """The weighted atoms of each class: min W2^2(sum_j w_j delta(z_j), 1/N sum_n delta(x_n))."""

    solver: Literal["lloyd", "uniform", "emd", "sinkhorn", "sliced"] = "uniform"
    """`uniform` fixes the weights to 1/K, which is what images stand for unless --recover.weighted-moments and
    --evaluate.weighted-loss count their weights; `lloyd` is exact block descent with free ones, `emd` the paper's alternation for
    them; the atoms of `sliced`, 1/K each, spread as far as the class in every direction, where the others' are means;
    `sinkhorn` draws those of `uniform` to the middle by an entropic plan."""
    max_iters: int = option(100, ge=1)
    """Most iterations of a start."""
    tol: float = option(1e-6, ge=0)
    """Stop when the relative decrease of the cost falls below this."""
    num_starts: int = option(3, ge=1)
    """Independent starts of `lloyd` (k-means++) and `uniform` (random images); the lowest cost wins. One is 0.1 to 0.8 % above the
    best of 12 on features of Fashion-MNIST and up to 3.6 % on 20 separate clusters, three up to 0.4 and 2.0 %."""
    reg: float = option(0.05, gt=0)
    """Entropic regularization of `sinkhorn`, as a fraction of the mean squared distance."""
    num_projections: int = option(100, ge=1)
    """Random directions of `sliced`."""
    margin_fraction: float = option(0.0, ge=0, le=1)
    """Share of the atoms that are the barycenter of the quarter of the class nearest to the decision boundary (ours)."""
    label_weight: float | None = option(None, ge=0, absent_at=None)
    """One barycenter of all classes, in features and label embeddings (rows of the teacher's last layer): the mean squared distance
    between classes, over that within one. Small weights let small classes share atoms; unset, each class is by itself (ours)."""

    def __post_init__(self) -> None:
        check(self, "barycenters.")
        joint = "with --barycenters.label-weight, whose descent is Lloyd's over all classes"
        alone, solver, margin = self.label_weight is None, self.solver, self.margin_fraction
        require(alone or solver == "lloyd", "barycenters.solver", f"lloyd {joint}", solver)
        require(alone or margin == 0, "barycenters.margin-fraction", f"0.0 {joint}", margin)


@dataclass(frozen=True, kw_only=True, slots=True)
class DiffusionConfig:
    """Images sampled from a diffusion model, one after another, led to what the class's earlier images left out (OTG)."""

    model: str = ""
    """A diffusers pipeline (DiT, or UNet2DModel in pixel space) with safetensors weights: a folder, a URI, the --out of
    jobs/train_diffusion.py, or the name of a repository on the Hugging Face hub, such as facebook/DiT-XL-2-256."""
    class_ids: tuple[int, ...] = option((), ge=0)
    """The model's class of each class of the data, in its order; needed where the model's class names do not tell."""
    steps: int = option(50, ge=1)
    """Denoising steps of an image (50 in IGD)."""
    eta: float = option(1.0, ge=0, le=1)
    """Noise of a step: 1 is DDPM's, 0 is DDIM's deterministic path."""
    guidance_scale: float = option(4.0, ge=0)
    """Classifier-free guidance: how far the conditional prediction is extrapolated (4 in IGD); 1 is none."""
    window: tuple[float, float] = option((0.1, 0.4), ge=0, le=1)
    """Part of the denoising in which images are guided, from noise (0) to image (1): IGD's steps 45 to 30 of 50."""
    ot_weight: float = option(0.0, ge=0)
    """beta1 of OTG: the most that a guided step changes a value of the latent (or of a pixel in [-1, 1]) along the gradient of
    the transport distance between the class's images so far and its real ones. 0 leaves it out."""
    regularization: float = option(0.1, gt=0)
    """Entropic regularization of that distance, a share of the mean distance between real latents of the class."""
    sinkhorn_iterations: int = option(50, ge=1)
    """Sinkhorn iterations of a guided step."""
    real_per_step: int = option(64, ge=1)
    """Real latents of the class that a guided step compares with, drawn anew from at most a few hundred kept."""
    diversity_weight: float = option(0.0, ge=0)
    """Most RMS change of the latent in a guided step, away from the class's nearest earlier image (IGD's deviation term)."""
    influence_weight: float = option(0.0, ge=0, absent_at=0)
    """RMS change of the latent in a guided step that turns the loss gradient in a small classifier, trained on real latents first,
    to that of the class's real latents (IGD's influence term, whose k = 5 is in a unit that we do not know). 0 leaves it out."""
    influence_epochs: tuple[int, ...] = option((0, 5, 18, 52), ge=0, only_with="influence_weight")
    """Epochs of that classifier after which gradients are compared, ascending; the last one ends its training (IGD: 0 5 18 52 for
    ImageNet-1K, 0 2 11 40 for ImageNette, 0 5 16 40 for ImageWoof)."""
    influence_latents: int = option(200, ge=1, only_with="influence_weight")
    """Most real latents of a class that the classifier is trained on and compared with (200 in IGD)."""

    def __post_init__(self) -> None:
        refuse_secrets("recover.diffusion.model", self.model)
        check(self, "recover.diffusion.")
        window, epochs, ids = self.window, self.influence_epochs, self.class_ids
        expected = "two ascending numbers in [0, 1]"
        require(window[0] < window[1], "recover.diffusion.window", expected, window)
        ascending = len(epochs) > 0 and sorted(set(epochs)) == list(epochs)
        expected = "at least one number >= 0, ascending"
        require(ascending, "recover.diffusion.influence-epochs", expected, epochs)
        expected = "different numbers >= 0, one a class of the data"
        require(len(set(ids)) == len(ids), "recover.diffusion.class-ids", expected, ids)


@dataclass(frozen=True, kw_only=True, slots=True)
class RecoverConfig:
    """Making of the distilled images: by default, optimized against the teacher's features and BatchNorm moments."""

    method: Literal["inversion", "diffusion", "real"] = option("inversion", absent_at="inversion")
    """`inversion` optimizes pixels against the teacher (WMDD); `real` keeps the real images that it would `start` from; `diffusion`
    samples a diffusion model that `diffusion.model` names, and of the options below uses images_per_group, tiles, mixed_precision
    and checkpoint_s alone."""
    diffusion: DiffusionConfig = option(DiffusionConfig(), only_with="method")
    """Options of `method diffusion`."""
    iterations: int = option(2000, ge=0)
    """Adam steps (2000 in WMDD)."""
    learning_rate: float = option(0.25, gt=0)
    """Adam rate in normalized pixel units, cosine to 0 (0.25; 0.1 for Tiny-ImageNet, WMDD)."""
    beta1: float = option(0.5, ge=0, lt=1)
    """Adam's first-moment decay (WMDD)."""
    beta2: float = option(0.9, ge=0, lt=1)
    """Adam's second-moment decay (WMDD)."""
    feature_term: Literal["wasserstein", "cross_entropy", "mean", "rbf_mmd", "none"] = "wasserstein"
    """Feature loss: image to its atom; teacher's cross-entropy; class means (linear MMD); RBF MMD to the atoms; nothing."""
    feature_weight: float = option(1.0, ge=0)
    """Coefficient of the feature term."""
    teachers: int = option(1, ge=1, absent_at=1)
    """Teachers that the images are optimized against in turn, one an iteration (G-VBSM). The others are as --relabel.teachers has
    them; what the images shall meet in those is measured on the real images of their class."""
    moments: Literal["per_class", "global", "blend", "none"] = "per_class"
    """BatchNorm target: the class's own moments (PCBN); the teacher's running ones, matched by one image of every class together
    (SRe2L); half of each loss, both of the class by itself (after EDC, which matches both by a batch); or nothing."""
    bn_weight: float = option(10.0, ge=0)
    """Coefficient of the moment term, lambda of the paper (10 to 500 in WMDD's; 1, 10, 100 compared: jobs/benches/results)."""
    weighted_moments: bool = False
    """Weight each image's share of the synthetic moments, and of the terms `mean` and `rbf_mmd`, by its atom's weight (paper eq.
    for PCBN; off in the released run). For students that weigh images too, --evaluate.weighted-loss."""
    ema_statistics: float = option(0.0, ge=0, lt=1)
    """Share of earlier iterations in the synthetic moments that are compared (0.8 in EDC, 0.4 in G-VBSM)."""
    ce_weight: float = option(0.0, ge=0)
    """Coefficient of the teacher's cross-entropy on top of the feature term (1 in the reference's README, 0 in its late runs)."""
    anchor_weight: float = option(0.0, ge=0, absent_at=0.0)
    """Coefficient of the mean squared difference between middle features of an image and of the real image that it stands for,
    both under the same crop, flip and roll; of small ones (`tiles`) to the real image at its full size (CIM)."""
    anchor_depth: float = option(0.5, ge=0, le=1, only_with="anchor_weight")
    """Which middle features: rectified, after the BatchNorm layer at this share of the depth (0 the first, 1 the last)."""
    start: Literal["noise", "nearest", "random", "mosaic", "herding"] = "nearest"
    """First iterate: noise (paper), the real image nearest to the atom, a random one, the teacher's easiest crops (RDED), or the
    images whose mean feature stays nearest to the class's (herding, Welling 2009)."""
    tiles: int = option(1, ge=1)
    """A stored image is a grid of tiles x tiles small ones, each with an atom of its own (IDC's multi-formation, 2 there)."""
    residual_blends: int = option(0, ge=0)
    """Times, evenly spread, that the images become half themselves and half their start, which must be real (3 in FADRM)."""
    mixed_precision: bool = False
    """bfloat16 autocast of the teacher's passes on any device, losses in float32 (FADRM); pays where the processor has bfloat16."""
    images_per_group: int = option(100, ge=1)
    """Images that share a forward pass: whole classes, one at least; for `moments global` one position or more of as many classes
    as there are, this many at most (100 in SRe2L). One group is one unit of work."""
    crop_scale_min: float = option(0.5, gt=0, le=1)
    """Smallest area fraction of the random resized crop during synthesis (0.08 in the reference, 0.5 in EDC)."""
    flip: bool = True
    """Random horizontal flip during synthesis."""
    roll_px: int = option(4, ge=0)
    """Largest cyclic shift during synthesis, pixels (32 at 224 px in the reference)."""
    checkpoint_s: float = option(20.0, gt=0, in_fingerprint=False)
    """A group that runs longer than this stores its state in the room, and resumes from there after a kill, seconds."""

    def __post_init__(self) -> None:
        check(self, "recover.")
        samples, model = self.method == "diffusion", self.diffusion.model
        expected = (
            "a diffusers pipeline's folder, URI or hub name; jobs/train_diffusion.py makes one"
        )
        require(model.strip() != "" or not samples, "recover.diffusion.model", expected, model)
        for name in ("ot-weight", "diversity-weight", "influence-weight"):
            weight = getattr(self.diffusion, name.replace("-", "_"))
            expected = "0 without diffusion; add --recover.method diffusion, or leave it out"
            require(weight == 0 or samples, f"recover.diffusion.{name}", expected, weight)
        most, blends = max(0, self.iterations - 1), self.residual_blends
        ok, expected = blends <= most or not self.iterations, f"in [0, {most}], below iterations"
        require(ok, "recover.residual-blends", expected, blends)
        ok, expected = (
            self.teachers == 1 or self.method == "inversion",
            "1 where nothing is optimized",
        )
        require(ok, "recover.teachers", expected, self.teachers)
        expected = "a real start for --recover.method real"
        require(self.method != "real" or self.start != "noise", "recover.start", expected, "noise")
        expected = f"a real start for --recover.residual-blends {blends}"
        require(blends == 0 or self.start != "noise", "recover.start", expected, self.start)


@dataclass(frozen=True, kw_only=True, slots=True)
class ViewConfig:
    """The random views of an image that a soft label belongs to."""

    crop_scale_min: float = option(0.5, gt=0, le=1)
    """Smallest area fraction of the random resized crop (0.08 in FKD, 0.5 in EDC)."""
    flip: bool = True
    """Random horizontal flip with probability 1/2."""
    mix: Literal["cutmix", "none"] = "cutmix"
    """How a view is mixed with its partner's view (FKD uses CutMix)."""
    mix_alpha: float = option(1.0, ge=1, le=1)
    """1, a uniform mixing share; it can be nothing else, and stands here because the fingerprints of all runs have it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RelabelConfig:
    """The teacher's soft labels of random views, stored by label epoch (FKD)."""

    epochs: int = option(300, ge=1)
    """Label epochs: views with their logits, stored for every distilled image (300 in FKD)."""
    views: ViewConfig = ViewConfig()
    """How views are drawn."""
    compression: Literal["full", "top_k"] = "full"
    """`full` keeps every logit; `top_k` keeps the largest and the mass of the rest, for students at temperature 1: at 20, the 50
    largest of 1000 keep a quarter of what labels tell (KL from uniform), and all in steps of 1 logit 99 % in 4 times the bytes."""
    precision: Literal["fp16", "int8"] = "fp16"
    """Numbers that logits are kept in: half precision, or steps below a row's largest, 255 at most."""
    step: float = 0.125
    """Size of the steps of `int8`, in logits: the error is at most half of it, and larger ones take fewer bytes."""
    stored_views: Literal["seed", "rows"] = "seed"
    """`seed` stores what views are drawn again from, to the bit, instead of the boxes (33 bytes a view)."""
    labels: Literal["stored", "online"] = "stored"
    """`online` stores no logits: the data set ships the teacher, which labels the same views in the loader."""
    top_k: int = option(10, ge=1)
    """Logits that `top_k` keeps."""
    batch_size: int = option(256, ge=1)
    """Views of one teacher pass."""
    batch_statistics: bool = False
    """Normalize by the batch's statistics, not the teacher's running ones (CV-DD's BSSL): a label then depends on its batch."""
    slice_images: int = option(4096, ge=1)
    """Images (whole classes) that one unit holds in memory and mixes among themselves, drawn anew every unit."""
    epochs_per_unit: int = option(25, ge=1)
    """Label epochs that make one unit of work and one file."""
    teachers: int = option(1, ge=1, absent_at=1)
    """Teachers whose mean logits are the labels (one in WMDD, several in CV-DD and LIA); atoms are of the first, the others are of
    the same training from other random starts. With --teacher they are taken from that run."""
    teacher_schedule: tuple[tuple[int, int], ...] = option((), absent_at=())
    """Teachers by ipc (LIA): (ipc, teachers) pairs of rising ipc, of which the last one not above --ipc counts, as `10 2 50 4`."""

    def __post_init__(self) -> None:
        check(self, "relabel.")
        pairs = self.teacher_schedule
        ipcs = [ipc for ipc, _ in pairs]
        rising = ipcs == sorted(set(ipcs)) and all(min(pair) >= 1 for pair in pairs)
        expected = "(ipc, teachers) pairs of rising ipc, both >= 1"
        require(rising, "relabel.teacher-schedule", expected, pairs)
        # Half precision holds steps from 2^-14 with all their bits.
        require(2**-14 <= self.step <= 1000, "relabel.step", "in [2^-14, 1000]", self.step)
        ok = self.labels == "stored" or not self.batch_statistics
        expected = "stored with --relabel.batch-statistics, for every loader has other batches"
        require(ok, "relabel.labels", expected, self.labels)

    def teachers_at(self, ipc: int) -> int:
        """Return the number of teachers at `ipc`."""
        reached = [teachers for first, teachers in self.teacher_schedule if first <= ipc]
        return reached[-1] if reached else self.teachers


@dataclass(frozen=True, kw_only=True, slots=True)
class AssembleConfig:
    """The data set as it is handed to others."""

    license: str = "other"
    """License identifier for the data-set card: the license of the real images decides it, so it is yours to state."""
    preview_classes: int = option(20, ge=1)
    """Most classes shown in `preview.png`."""
    preview_images: int = option(10, ge=1)
    """Most images of a class shown in `preview.png`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class HardLabelConfig:
    """What students do otherwise when they learn from the images' classes alone."""

    views: ViewConfig = ViewConfig(mix="none")
    """Views, drawn as they train: small crops mislead by hard labels, and mixtures help where crops are large (README)."""
    norm: Norm = "batch"
    """Normalization of `convnetN` and `resnetap10` students: InstanceNorm, the literature's, is better at ipc 1 (README)."""
    optimizer: OptimizerName = "adamw"
    """Optimizer, as `--evaluate.optimizer`."""
    learning_rate: float = option(1e-3, gt=0)
    """Peak rate."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluateConfig:
    """Students trained from the distilled set alone, and the baselines under the same recipe."""

    network: NetworkConfig = NetworkConfig()
    """Architecture of the students."""
    epochs: int = option(300, ge=1)
    """Passes over the images; label epochs are cycled when fewer are stored."""
    batch_size: int = option(25, ge=2)
    """Images of one optimizer step, at least 2 (BatchNorm); 25 is worth 2.7 points over 100 at ipc 10 on Fashion-MNIST."""
    optimizer: OptimizerName = "adamw"
    """`muon` orthogonalizes the steps of hidden weight matrices (Jordan et al. 2024, OGM); AdamW has all others."""
    learning_rate: float = option(1e-3, gt=0)
    """Peak rate, the same for both parts of `muon`, whose steps are scaled to the size of AdamW's (Liu et al. 2025)."""
    schedule: Schedule = "cosine"
    """How the rate falls, per step: `cosine` to 0; `half_cosine` to half the peak, (1 + cos(pi t / 2T)) / 2 (RDED, EDC)."""
    weight_decay: float = 0.01
    """Decoupled (AdamW, Muon) or L2 (SGD) decay of parameters with more than one dimension."""
    loss: StudentLoss = "kl"
    """Loss to the soft labels: KL divergence at `temperature` (FKD), or MSE of logits centered per image (G-VBSM, EDC)."""
    temperature: float = option(20.0, gt=0)
    """Temperature of the KL divergence to the soft labels (20 in FKD); `mse` has none."""
    ce_weight: float = option(0.0, ge=0)
    """Coefficient of the cross-entropy to the hard label, mixed as the view is, on top of the soft labels' loss (0.025 in EDC)."""
    sinkhorn_weight: float = option(0.0, ge=0, absent_at=0)
    """Coefficient of the entropic transport distance between a batch of the student's outputs and the teacher's, on top of the soft
    labels' loss (OTM; its kappa1 is `ce_weight`, its kappa2 the 1 of `loss mse`, its own weight not published). 0 leaves it out."""
    sinkhorn_regularization: float = option(0.1, gt=0, only_with="sinkhorn_weight")
    """Entropic regularization of that distance, a share of the mean cost in the batch (ours; SinKD has an absolute 0.1)."""
    sinkhorn_iterations: int = option(10, ge=1, only_with="sinkhorn_weight")
    """Sinkhorn iterations a step."""
    ema_decay: float = option(0.0, ge=0, lt=1)
    """Decay a step of the weights' moving average, bias-corrected, which is tested (0.99 in EDC); 0 tests the last weights."""
    mixed_precision: bool = False
    """bfloat16 autocast of the student's forward pass, on CPU too; losses, optimizer and test stay float32."""
    weighted_loss: bool = False
    """Multiply an image's loss by its atom's weight, normalized to mean 1 over the data set."""
    num_seeds: int = option(3, ge=1)
    """Students of each row; the table shows mean and standard deviation."""
    labels: tuple[LabelKind, ...] = ("soft", "hard")
    """What students learn from: the teacher's soft labels on stored views, or the classes; every row is trained with each."""
    hard: HardLabelConfig = HardLabelConfig()
    """What is different for hard labels."""
    baselines: tuple[Baseline, ...] = get_args(Baseline)
    """Real-image rows beside the distilled set, of as many stored images (but `all_real`), trained by the identical recipe; the
    `tiles` rows hold as many small real images as the distilled set has tiles, and are left out where it has none."""
    all_real_epochs: int = option(20, ge=1)
    """Passes over all real images in the `all_real` row (its data set is larger, so fewer passes are more steps)."""

    def __post_init__(self) -> None:
        check(self, "evaluate.")
        require(len(self.labels) > 0, "evaluate.labels", "soft, hard or both", self.labels)
        for name in ("ce-weight", "sinkhorn-weight"):
            weight = getattr(self, name.replace("-", "_"))
            expected = "0 without soft labels; add soft to --evaluate.labels, or leave it out"
            require("soft" in self.labels or weight == 0, f"evaluate.{name}", expected, weight)

    def for_labels(self, labels: LabelKind) -> EvaluateConfig:
        """Return the recipe of students of these labels: for hard ones with what `hard` has otherwise."""
        if labels == "soft":
            return self
        hard = self.hard
        norm = hard.norm if self.network.has_norm_option else "batch"
        changed = replace(self, network=replace(self.network, norm=norm))
        return replace(changed, optimizer=hard.optimizer, learning_rate=hard.learning_rate)


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
        require(self.images >= 1, "attack-images", ">= 1", self.images)
        require(len(self.eps) > 0, "eps", "at least one budget", self.eps)
        for text in self.eps:
            try:
                value = Fraction(text)
            except (ValueError, ZeroDivisionError):
                value = Fraction(0)
            require(0 < value < 1, "eps", "fractions between 0 and 1, as 8/255", text)
        budgets = {Fraction(text) for text in self.eps}
        require(len(budgets) == len(self.eps), "eps", "each budget once", self.eps)


@dataclass(frozen=True, kw_only=True, slots=True)
class DistillConfig:
    """One complete run."""

    recipe: str = "digits"
    """Where the defaults come from; --data alone means `auto`, which chooses by the images."""
    variant: Literal["best", "paper", "paper_weighted"] = "best"
    """`best` is what proved best here, `paper` WMDD as its authors run it, `paper_weighted` as they write it."""
    ipc: int = option(10, ge=1)
    """Distilled images per class. Several (`--ipc 1 10 50`) share teacher and features, each with a folder under --out."""
    seed: int = option(0, ge=0)
    """Seed of everything random; each unit of work derives its own from (seed, stage, unit)."""
    data: str = "digits"
    """Training images: `digits` (embedded), a path, or a URI."""
    val_data: str | None = None
    """Held-out images, where the source brings no split of its own (digits, IDX, folders `train`/`val`)."""
    val_fraction: float | None = option(None, gt=0, le=0.9)
    """Share of each class's training images that is held out, at least one of a class with two, chosen by a hash of their names as
    `jobs/prepare.py --val-fraction` does; what the source holds out itself is then not read. Absent: that, or
    --val-data. WebDataset's shards are read through for it, up to five times before the teacher begins; of many or far ones
    jobs/prepare.py puts a part aside once."""
    teacher: str | None = None
    """A committed teacher room, published weights (`torchvision:NAME`, `timm:NAME`), or a checkpoint; absent: one is trained."""
    source: SourceConfig = SourceConfig()
    squeeze: SqueezeConfig = SqueezeConfig()
    features: FeaturesConfig = FeaturesConfig()
    barycenters: BarycenterConfig = BarycenterConfig()
    recover: RecoverConfig = RecoverConfig()
    relabel: RelabelConfig = RelabelConfig()
    assemble: AssembleConfig = AssembleConfig()
    evaluate: EvaluateConfig = EvaluateConfig()

    def __post_init__(self) -> None:
        for name in ("data", "val_data", "teacher"):
            refuse_secrets(name.replace("_", "-"), getattr(self, name))
        check(self)
        expected = "none beside --val-data, whose images are held out as they are"
        alone = self.val_data is None or self.val_fraction is None
        require(alone, "val-fraction", expected, self.val_fraction)
        weight, tiles = self.squeeze.curvature_weight, self.recover.tiles
        taken = f"0 with --teacher {self.teacher}, which is taken as it is"
        expected = f"{taken}; leave --teacher out, or give one that was trained with this weight"
        require(weight == 0 or self.teacher is None, "squeeze.curvature-weight", expected, weight)
        side = self.source.image_size
        most, stored, used = side // _TILE_PIXELS, self.relabel.epochs, self.evaluate.epochs
        expected = f"at most {most}, which leaves {_TILE_PIXELS} of {side} pixels a tile"
        require(tiles <= most, "recover.tiles", expected, tiles)
        expected = f"at most the {stored} stored label epochs (--relabel.epochs), or a multiple"
        require(used <= stored or used % stored == 0, "evaluate.epochs", expected, used)

    @property
    def num_teachers(self) -> int:
        """Teachers that are trained: the first is what atoms are of, as many as there shall be make the images, and label them."""
        return max(self.num_labelers, self.recover.teachers)

    @property
    def num_labelers(self) -> int:
        """Teachers that label this run's images."""
        return self.relabel.teachers_at(self.ipc)

    @property
    def needs_norms(self) -> bool:
        """Whether BatchNorm layers of the teacher are used: by the images' moments or anchors, or by labels of batch statistics."""
        recover = self.recover
        matched = recover.moments != "none" and recover.bn_weight > 0
        by_images = recover.method == "inversion" and (matched or recover.anchor_weight > 0)
        return by_images or self.relabel.batch_statistics

    @property
    def num_atoms(self) -> int:
        """Atoms of a class, and the images that a student sees of it: ipc stored images of tiles x tiles small ones."""
        return self.ipc * self.recover.tiles**2


@dataclass(frozen=True, kw_only=True, slots=True)
class Resources:
    """Where and how wide a run is executed. Changes the time, never the result."""

    num_workers: int = option(-1, ge=-1)
    """Workers of teacher (--squeeze.batch-parts at most), recover, relabel, students; 0: the driver alone; -1: by the cluster."""
    gpus_per_worker: float = -1.0
    """GPUs of one worker, a part of one or whole ones; -1 takes one when the cluster has GPUs, else none."""
    cpus_per_worker: int = option(1, ge=1)
    """CPUs, and with them computing threads, of one worker (one: on shared cores two threads ran 4 to 7 times slower). The
    training computes on one, for more of them round in another way."""
    executor: Literal["auto", "train", "actors", "here"] = "auto"
    """Where units run: `here`, in this process without Ray; `train`, one Ray Train group, which a lost worker starts again as a
    whole; `actors`, of which a lost one costs its own unit; `auto` takes a group up to 8 workers with 4 units each, and
    on a laptop the driver alone for the features and barycenters of up to 20,000 images."""
    max_actors: int = option(1000, ge=1)
    """Most barycenter and embedding actors."""
    worker_timeout_s: float = option(3600.0, gt=0)
    """Seconds that a stage waits for its workers on a cluster that grows, before it gives up (at most 300 where nothing adds
    nodes)."""

    def __post_init__(self) -> None:
        check(self)
        gpus = self.gpus_per_worker
        require(gpus <= 1 or gpus % 1 == 0, "gpus-per-worker", "a part of one, or whole ones", gpus)


@dataclass(frozen=True, kw_only=True, slots=True)
class Reporting:
    """Who is told of a run's numbers besides the terminal and Ray's metrics. One that fails later is left out with a warning."""

    tensorboard: str | None = None
    """Folder or URI that gets a folder of TensorBoard event files, named like the last part of --out (by tensorboardX)."""
    mlflow: str | None = None
    """MLflow tracking URI, as sqlite:///mlflow.db; experiment MLFLOW_EXPERIMENT_NAME, else wmdd_ray (`pip install mlflow`)."""
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
            require(value is None or value.strip() != "", name, "where to report to", value)
