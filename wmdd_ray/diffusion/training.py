"""What a diffusion model of our own is trained by; without torch, which a wrong option should not have to wait for."""

from __future__ import annotations

from dataclasses import dataclass

from wmdd_ray.options import check, option


@dataclass(frozen=True, kw_only=True)
class Training:
    """What the weights depend on, beside the images."""

    widths: tuple[int, ...] = (16, 32, 64)
    """Channels at the image's resolution, at its half, and so on; multiples of 8. The last one has attention."""
    layers: int = option(1, ge=1)
    """Blocks at each resolution."""
    epochs: int = option(100, ge=1)
    """Passes over the images; of Fashion-MNIST 3 are as many steps."""
    batch_size: int = option(64, ge=1)
    """Images of a step."""
    learning_rate: float = option(2e-3, gt=0)
    """Peak rate of AdamW; cosine to 0."""
    ema_decay: float = option(0.995, ge=0, lt=1)
    """Decay a step of the weights' moving average, which is what is kept."""
    drop_class: float = option(0.1, ge=0, lt=1)
    """Share of the labels that are left out, for --recover.diffusion.guidance-scale (0.1 in DiT)."""
    flip: bool = False
    """Mirror half of the images (off for digits: a mirrored digit is no digit)."""
    seed: int = option(0, ge=0, lt=2**63)
    """Seed of everything random."""

    def __post_init__(self) -> None:
        check(self)
