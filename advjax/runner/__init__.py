"""Many images: continuous batches, on every device, durable if asked to be."""

from advjax.runner.images import attack_images

__all__ = ["attack_images"]
