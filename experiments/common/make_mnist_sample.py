"""Makes the sample of MNIST inside the package: `python -m experiments.common.make_mnist_sample`.

The first 500 training and the first 100 test images of each digit, in the order of
tensorflow-datasets, which mixes the classes. A few seconds; the same bytes each time.
"""

from pathlib import Path
from typing import Literal

import numpy as np

import advjax.data
from advjax.data import Dataset

PER_CLASS: dict[Literal["train", "test"], int] = {"train": 500, "test": 100}
PATH = Path(advjax.data.__file__).with_name("mnist_sample.npz")


def stratified(dataset: Dataset, per_class: int) -> Dataset:
    """Keep the first `per_class` examples of each class, in their order."""
    of_class = [np.flatnonzero(dataset.labels == c)[:per_class] for c in range(10)]
    kept = np.sort(np.concatenate(of_class))
    return dataset._replace(images=dataset.images[kept], labels=dataset.labels[kept])


def main(path: Path = PATH) -> None:
    """Write the sample, with 8-bit pixels."""
    arrays = {}
    for split, per_class in PER_CLASS.items():
        sample = stratified(advjax.data.load("mnist", split, source="tfds"), per_class)
        arrays[f"{split}_images"] = np.rint(sample.images * 255).astype(np.uint8)
        arrays[f"{split}_labels"] = sample.labels.astype(np.uint8)
    np.savez_compressed(path, **arrays)
    print(f"{path}: {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
