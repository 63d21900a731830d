"""Images as arrays: loads MNIST, Fashion-MNIST and photographs, and saves images as PNG files."""

from advjax.data.loading import Dataset, load
from advjax.data.photographs import imagenet_names, load_imagenet, load_photographs
from advjax.data.saving import save_images

__all__ = [
    "Dataset",
    "imagenet_names",
    "load",
    "load_imagenet",
    "load_photographs",
    "save_images",
]
