"""Loads images as arrays: MNIST, Fashion-MNIST and photographs."""

from advjax.data.loading import Dataset, load
from advjax.data.photographs import imagenet_names, load_imagenet, load_photographs

__all__ = ["Dataset", "imagenet_names", "load", "load_imagenet", "load_photographs"]
