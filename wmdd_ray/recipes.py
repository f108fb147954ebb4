"""Complete, named configurations. A recipe is a function of ipc; a variant of one is `dataclasses.replace`.

`digits`, `fashion_mnist` and `cifar10` were tuned and run for this repository, `tiny_imagenet` once with other options
(jobs/benches/results). The ImageNet recipes have not been run here: they carry the same kinds of choices with the numbers that were
published since WMDD (`_TOUCHED_UP`, `_STUDENT`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from wmdd_ray.config import (
    BarycenterConfig,
    Baseline,
    DiffusionConfig,
    DistillConfig,
    EvaluateConfig,
    FeaturesConfig,
    HardLabelConfig,
    NetworkConfig,
    RecoverConfig,
    RelabelConfig,
    SourceConfig,
    SqueezeConfig,
    ViewConfig,
)
from wmdd_ray.errors import ConfigError

_IMAGENET_MEAN = (0.485, 0.456, 0.406)
_IMAGENET_STD = (0.229, 0.224, 0.225)


# A fifth of the label epochs, in steps of 1 logit: 45 times smaller than FKD's, for at most 0.2 points (jobs/benches/results).
_SMALL_LABELS = RelabelConfig(epochs=60, precision="int8", step=1.0)

# For --recover.method diffusion with a model of jobs/train_diffusion.py.
_SMALL_UNET = DiffusionConfig(steps=25, guidance_scale=2.0)

# DiT of ImageNet at 256 pixels, by its name on the Hugging Face hub; steps, scale and window are IGD's. Not run here.
_DIT = DiffusionConfig(model="facebook/DiT-XL-2-256", steps=50, guidance_scale=4.0)
# ImageNette's classes, in the order of their WordNet ids, among ImageNet's.
_NETTE = (0, 217, 482, 491, 497, 566, 569, 571, 574, 701)
_DIT_NETTE = replace(_DIT, class_ids=_NETTE, influence_epochs=(0, 2, 11, 40))


def digits(ipc: int) -> DistillConfig:
    """Return the embedded default: scikit-learn's 8x8 digits at 16 pixels, sized for minutes on two cores."""
    network = NetworkConfig(arch="convnet3", width=32)
    return DistillConfig(
        recipe="digits",
        ipc=ipc,
        data="digits",
        source=SourceConfig(
            format="digits", image_size=16, resize=16, channels=1, mean=(0.3053,), std=(0.3533,)
        ),
        squeeze=SqueezeConfig(
            network=network, epochs=20, batch_size=64, crop_scale_min=0.7, flip=False
        ),
        # What the tables of digits were measured with.
        barycenters=BarycenterConfig(solver="lloyd", num_starts=1),
        recover=RecoverConfig(
            iterations=100,
            learning_rate=0.05,
            bn_weight=1.0,
            images_per_group=40,
            crop_scale_min=0.7,
            flip=False,
            roll_px=1,
            diffusion=_SMALL_UNET,
        ),
        relabel=replace(
            _SMALL_LABELS,
            epochs=40,
            epochs_per_unit=20,
            views=ViewConfig(crop_scale_min=0.5, flip=False),
        ),
        evaluate=EvaluateConfig(
            network=network,
            epochs=200,
            optimizer="muon",
            learning_rate=0.005,
            hard=HardLabelConfig(
                views=ViewConfig(crop_scale_min=0.7, flip=False, mix="none"),
                norm="instance",
            ),
        ),
    )


def fashion_mnist(ipc: int) -> DistillConfig:
    """Return Fashion-MNIST (IDX files) at its own 28 pixels, sized for two cores: a narrow ConvNet-3.

    Below ten images a class each stored image holds four small ones that are optimized at length: more pictures are worth
    more than sharper ones. Ten are whole real images, touched up, at atoms that spread as far as the class does
    (jobs/benches/results).
    """
    network = NetworkConfig(arch="convnet3", width=32)
    barycenters = BarycenterConfig(solver="lloyd" if ipc < 10 else "sliced", num_starts=1)
    if ipc < 10:
        recover = RecoverConfig(tiles=2, crop_scale_min=0.5, roll_px=2, diffusion=_SMALL_UNET)
    else:
        recover = RecoverConfig(
            iterations=200,
            learning_rate=0.02,
            bn_weight=1.0,
            crop_scale_min=0.5,
            roll_px=2,
            diffusion=_SMALL_UNET,
        )
    return DistillConfig(
        recipe="fashion_mnist",
        ipc=ipc,
        data="fashion-mnist",
        source=SourceConfig(
            format="idx", image_size=28, resize=28, channels=1, mean=(0.2860,), std=(0.3530,)
        ),
        features=FeaturesConfig(chunk_images=2048),
        squeeze=SqueezeConfig(network=network, epochs=8, batch_size=128, crop_scale_min=0.7),
        barycenters=barycenters,
        recover=recover,
        relabel=replace(_SMALL_LABELS, views=ViewConfig(crop_scale_min=0.25)),
        evaluate=EvaluateConfig(
            network=network,
            epochs=300,
            optimizer="muon",
            learning_rate=0.005,
            hard=HardLabelConfig(
                views=ViewConfig(crop_scale_min=0.8, mix="cutmix"), norm="instance"
            ),
        ),
    )


def cifar10(ipc: int) -> DistillConfig:
    """Return CIFAR-10 at its own 32 pixels with the literature's ConvNet-3 of width 128, which two cores can train.

    For a ResNet-18 give `--squeeze.network.arch resnet18 --squeeze.network.small-stem` (and the same of `--evaluate.network`).
    """
    return _cifar("cifar10", ipc, mean=(0.4914, 0.4822, 0.4465), std=(0.2470, 0.2435, 0.2616))


def cifar100(ipc: int) -> DistillConfig:
    """Return CIFAR-100 with all that `cifar10` has. Not run here."""
    return _cifar("cifar100", ipc, mean=(0.5071, 0.4866, 0.4409), std=(0.2673, 0.2564, 0.2762))


def _cifar(
    name: str, ipc: int, *, mean: tuple[float, ...], std: tuple[float, ...]
) -> DistillConfig:
    """Return the recipe of `fashion_mnist` with another teacher and more labels, on images of 32 pixels and three channels.

    The teacher is trained a quarter of the time that its own accuracy would ask for: one that has learned the training images by
    heart has little to say about them. Four small pictures in each stored image are worth more than a whole one at ten images a
    class too, with as many views and labels in all (jobs/benches/results).
    """
    like, network = fashion_mnist(ipc), NetworkConfig(arch="convnet3", width=128)
    is_tiled = 10 <= ipc < 50
    epochs = 75 if is_tiled else 300
    return replace(
        like,
        recipe=name,
        data=name,
        source=SourceConfig(image_size=32, resize=32, mean=mean, std=std),
        squeeze=SqueezeConfig(
            network=network,
            epochs=5,
            batch_size=128,
            optimizer="muon",
            learning_rate=0.01,
            warmup_epochs=1.0,
            weight_decay=0.01,
            crop_scale_min=1.0,
            shift_px=4,
            mixed_precision=True,
        ),
        recover=replace(like.recover, tiles=2) if is_tiled else like.recover,
        relabel=replace(like.relabel, epochs=epochs),
        evaluate=replace(like.evaluate, epochs=epochs, network=network, mixed_precision=True),
    )


def imagenette(ipc: int) -> DistillConfig:
    """Return ImageNette (10 classes of ImageNet) at 224 pixels with ResNet-18: WMDD's teacher, a recipe of today."""
    return _imagenet_like("imagenette", ipc, squeeze=_WMDD_SQUEEZE, bn_weight=10.0)


def imagenet1k(ipc: int) -> DistillConfig:
    """Return ImageNet-1K at 224 pixels with ResNet-18; give `--teacher torchvision:ResNet18_Weights...`."""
    return _imagenet_like("imagenet1k", ipc, squeeze=_WMDD_SQUEEZE, bn_weight=500.0)


def tiny_imagenet(ipc: int) -> DistillConfig:
    """Return Tiny-ImageNet at its own 64 pixels with a small-stem ResNet-18 (the reference upscales it to 224)."""
    network = NetworkConfig(arch="resnet18", small_stem=True)
    return DistillConfig(
        recipe="tiny_imagenet",
        ipc=ipc,
        data="tiny-imagenet",
        source=SourceConfig(image_size=64, resize=64, mean=_IMAGENET_MEAN, std=_IMAGENET_STD),
        squeeze=SqueezeConfig(
            network=network,
            epochs=50,
            batch_size=128,
            learning_rate=0.1,
            warmup_epochs=2,
            weight_decay=1e-4,
            crop_scale_min=0.25,
            mixed_precision=True,
        ),
        recover=replace(_TOUCHED_UP, bn_weight=300.0, roll_px=8),
        relabel=RelabelConfig(precision="int8", step=1.0),
        evaluate=replace(_STUDENT, network=network, all_real_epochs=50),
    )


# Squeeze of the reference's run script: SGD 0.025, batch 32, 50 epochs, scaled here to batch 256.
_WMDD_SQUEEZE = SqueezeConfig(
    network=NetworkConfig(arch="resnet18"),
    epochs=50,
    batch_size=256,
    learning_rate=0.2,
    weight_decay=1e-4,
    crop_scale_min=0.08,
    mixed_precision=True,
)

# EDC's synthesis, 48.6 % on ImageNet-1K at ipc 10 where WMDD has 38.2: a start from the teacher's easiest crops (RDED), short and
# gentle optimization with small crops left out, half global and half per-class moments that run over the iterations; bfloat16
# as in FADRM. Its images are pulled to the atoms as well, which is ours.
_TOUCHED_UP = RecoverConfig(
    start="mosaic",
    iterations=1000,
    learning_rate=0.05,
    moments="blend",
    ema_statistics=0.8,
    crop_scale_min=0.5,
    mixed_precision=True,
    checkpoint_s=120.0,
)

# One student of the set and one of random real images: `full_table` has eighteen, which cost six times what ImageNet-1K's set does.
# Small batches, a rate that ends at half its peak and averaged weights (RDED, EDC: the same SRe2L images read 21.3 or 40.2 %);
# hidden weights by Muon (OGM: 39.4 -> 47.0 %). KL at temperature 20, FKD's: labels of all classes in steps of 1 logit keep 99 %
# of what they tell there, in 108 bytes a view of 200 classes and 524 of 1000.
_STUDENT = EvaluateConfig(
    batch_size=50,
    optimizer="muon",
    schedule="half_cosine",
    ema_decay=0.99,
    mixed_precision=True,
    num_seeds=1,
    labels=("soft",),
    baselines=("random_real",),
)


_FULL_ROWS: tuple[Baseline, ...] = ("random_real", "nearest_real")


def _imagenet_like(
    name: str, ipc: int, *, squeeze: SqueezeConfig, bn_weight: float
) -> DistillConfig:
    return DistillConfig(
        recipe=name,
        ipc=ipc,
        data=name,
        source=SourceConfig(image_size=224, resize=256, mean=_IMAGENET_MEAN, std=_IMAGENET_STD),
        squeeze=squeeze,
        recover=replace(
            _TOUCHED_UP,
            bn_weight=bn_weight,
            roll_px=32,
            diffusion=_DIT_NETTE if name == "imagenette" else _DIT,
        ),
        relabel=RelabelConfig(precision="int8", step=1.0),
        evaluate=replace(_STUDENT, network=NetworkConfig(arch="resnet18")),
    )


RECIPES: dict[str, Callable[[int], DistillConfig]] = {
    recipe.__name__: recipe
    for recipe in (
        digits,
        fashion_mnist,
        cifar10,
        cifar100,
        imagenette,
        tiny_imagenet,
        imagenet1k,
    )
}


def recipe_of(name: str, ipc: int, variant: str = "best") -> DistillConfig:
    """Return a recipe at `ipc` images per class; a ConfigError lists the names and the variants there are."""
    if name not in RECIPES:
        raise ConfigError(
            f"--recipe: expected one of {', '.join(RECIPES)}, or auto with --data, got {name!r}"
        )
    return variant_of(RECIPES[name](ipc), variant)


def full_table(config: DistillConfig) -> DistillConfig:
    """Return a configuration that trains the table of which results are reported, where its own is smaller.

    That is three seeds by soft and by hard labels, of the set and of random and nearest real images.
    """
    own = config.evaluate
    rows = (*own.baselines, *(row for row in _FULL_ROWS if row not in own.baselines))
    seeds = max(3, own.num_seeds)
    evaluate = replace(own, num_seeds=seeds, labels=("soft", "hard"), baselines=rows)
    return replace(config, evaluate=evaluate)


def variant_of(best: DistillConfig, variant: str) -> DistillConfig:
    """Return a variant of a configuration, with its data and networks; a ConfigError lists those that there are."""
    if variant not in ("best", "paper", "paper_weighted"):
        raise ConfigError(f"--variant: expected best, paper or paper_weighted, got {variant!r}")
    if variant == "best":
        return best
    return _as_published(best, is_weighted=variant == "paper_weighted")


def _as_published(best: DistillConfig, *, is_weighted: bool) -> DistillConfig:
    """Return WMDD as it was published, with the recipe's data, networks and teacher; lambda is one of the paper's, 10 to 500.

    Noise start, Wasserstein and per-class BatchNorm terms without cross-entropy, Adam at 0.25 (Tiny-ImageNet 0.1) for 2000
    iterations; FKD's labels of 300 epochs, whole logits in half precision; students by AdamW at 1e-3 in batches of 100, KL at
    temperature 20 (the paper and its authors' scripts). The rolls are as wide as 32 of 224 pixels. `paper` is what the authors'
    script runs: atoms of equal weight. `paper_weighted` is what the paper writes: free weights, by the solver that finds the
    minimum, which count in the moments and in the students' loss. Each image has a crop of its own, where the authors' scripts
    draw one for all.
    """
    size = best.source.image_size
    return replace(
        best,
        variant="paper_weighted" if is_weighted else "paper",
        barycenters=BarycenterConfig(
            solver="lloyd" if is_weighted else "uniform",
            max_iters=100,
            tol=1e-6,
            num_starts=1,
            margin_fraction=0.0,
            label_weight=None,
        ),
        recover=RecoverConfig(
            method="inversion",
            iterations=2000,
            learning_rate=0.1 if best.recipe == "tiny_imagenet" else 0.25,
            beta1=0.5,
            beta2=0.9,
            feature_term="wasserstein",
            feature_weight=1.0,
            moments="per_class",
            bn_weight={"tiny_imagenet": 300.0, "imagenet1k": 500.0}.get(best.recipe, 10.0),
            weighted_moments=is_weighted,
            ema_statistics=0.0,
            ce_weight=0.0,
            anchor_weight=0.0,
            start="noise",
            tiles=1,
            residual_blends=0,
            teachers=1,
            mixed_precision=False,
            images_per_group=best.recover.images_per_group,
            crop_scale_min=0.08,
            flip=best.recover.flip,
            roll_px=max(1, size // 7),
            checkpoint_s=best.recover.checkpoint_s,
        ),
        relabel=replace(
            best.relabel,
            epochs=300,
            views=ViewConfig(crop_scale_min=0.08, flip=best.relabel.views.flip, mix="cutmix"),
            compression="full",
            precision="fp16",
            labels="stored",
            batch_statistics=False,
            teachers=1,
            teacher_schedule=(),
        ),
        evaluate=EvaluateConfig(
            network=best.evaluate.network,
            epochs=300,
            batch_size=100,
            optimizer="adamw",
            learning_rate=1e-3,
            schedule="cosine",
            weight_decay=0.01,
            loss="kl",
            temperature=20.0,
            ce_weight=0.0,
            sinkhorn_weight=0.0,
            ema_decay=0.0,
            mixed_precision=False,
            weighted_loss=is_weighted,
            num_seeds=best.evaluate.num_seeds,
            labels=best.evaluate.labels,
            hard=best.evaluate.hard,
            baselines=best.evaluate.baselines,
            all_real_epochs=best.evaluate.all_real_epochs,
        ),
    )
