"""How the experiments print and save what they found."""

import json
import sys
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Key

from advjax import data

Source = Literal["auto", "tfds", "embedded"]
Row = dict[str, Any]
"""A row of a table, as it goes into the JSON file."""


def mnist(source: Source) -> tuple[data.Dataset, data.Dataset]:
    """Loads the training and the test digits, both from one source, and says which."""
    with warnings.catch_warnings(record=True) as caught:
        train = data.load("mnist", "train", source=source)
    for warning in caught:
        print(f"Note: {warning.message}", file=sys.stderr)
    test = data.load("mnist", "test", source="tfds" if train.source == "tfds" else "embedded")
    where = {"tfds": "the full set", "embedded": "the sample inside the package"}[train.source]
    print(
        f"MNIST, {where}: {len(train.labels):,} training and {len(test.labels):,} test images.",
        flush=True,
    )
    return train, test


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Lays out cells in columns, the first column to the left and the others to the right."""
    lines = [list(header), *map(list, rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join(
        "  ".join(
            cell.rjust(width) if i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def percent(share: float) -> str:
    """A share in [0, 1] as percent: "1.64 %"."""
    return f"{100 * share:.2f} %"


def bootstrap(
    key: Key[Array, ""], values: Float[ArrayLike, " n"], *, resamples: int = 10_000
) -> tuple[float, float]:
    """The 95 % percentile bootstrap interval of the mean.

    Args:
        key: For the resampling.
        values: A sample.
        resamples: How often to resample it.

    Returns:
        The lower and the upper end.
    """
    values = jnp.asarray(values)
    means = jnp.mean(jax.random.choice(key, values, (resamples, len(values))), axis=1)
    low, high = jnp.quantile(means, jnp.array([0.025, 0.975]))
    return float(low), float(high)


def save_json(path: Path, content: Mapping[str, Any]) -> None:
    """Writes the numbers, beside the versions that gave them."""
    made_with = {"jax": jax.__version__, "device": jax.devices()[0].device_kind}
    path.write_text(json.dumps({**content, "made_with": made_with}, indent=2) + "\n")


def saved(files: Mapping[Path, str]) -> str:
    """Says where everything was saved, and what it is."""
    width = max(len(str(path)) for path in files)
    return "\n".join(["Saved", *(f"  {path!s:{width}}  {what}" for path, what in files.items())])
