"""Image data sets as arrays: MNIST and Fashion-MNIST, and a sample of MNIST inside the package."""

from advjax.data.loading import Dataset, load

__all__ = ["Dataset", "load"]
