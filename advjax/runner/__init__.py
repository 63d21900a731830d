"""Many images: continuous batching on all devices, with results on disk on request."""

from advjax.runner.images import attack_images

__all__ = ["attack_images"]
