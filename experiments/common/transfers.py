"""What Tables 2 and 4 have in common: sets of distorted images, and which networks err on them."""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.stats
from jaxtyping import Array, Float, Key

from advjax import metrics, transfer
from advjax.attacks import Attack
from advjax.types import Box, LogitsFn
from experiments.common import markdown, networks, paper, statistics
from experiments.common.measure import Content, Row, grouped
from experiments.common.victims import Victims, attack_victims

NOISE = "noise of the same RMS"
SIGNS = "random signs"
CONTROLS = (NOISE, SIGNS)


class Images(NamedTuple):
    """A set of distorted images: a row of a table."""

    kind: str
    """The name of the attack or of the control."""
    made_for: str | None
    """The network that was attacked; for a control, the network whose attack it accompanies."""
    xs: Float[Array | np.ndarray, "n *shape"]


Found = dict[tuple[str, str | None], list[Row]]
"""The rows of every seed, by kind and network."""


# --- measuring -------------------------------------------------------------------------------


def adversarial(
    make: Callable[[LogitsFn], Attack], network: networks.Network, chosen: Victims
) -> Images:
    """Attack a network."""
    attack, name = make(network.logits_fn), make.__name__
    return Images(
        name, network.name, attack_victims(attack, chosen, f"{network.name}: {name}").x_adv
    )


def controls(key: Key[Array, ""], chosen: Victims, images: Images) -> list[Images]:
    """Noise with the RMS of each distortion, and the distortions with random signs."""
    noise_keys, sign_keys = jax.random.split(key, (2, len(images.xs)))
    rms = jax.vmap(metrics.distortion)(chosen.images, images.xs)
    noise = jax.vmap(transfer.gaussian)(noise_keys, chosen.images, rms)
    signs = jax.vmap(transfer.random_signs)(sign_keys, chosen.images, images.xs)
    return [Images(NOISE, images.made_for, noise), Images(SIGNS, images.made_for, signs)]


def gaussian(
    key: Key[Array, ""], chosen: Victims, stddev: float, *, clipped: bool = False
) -> Images:
    """The paper's control: noise of one standard deviation, clipped to the box or not."""
    add = functools.partial(transfer.gaussian, rms=stddev, box=Box() if clipped else None)
    keys = jax.random.split(key, len(chosen.images))
    kind = gaussian_kind(stddev) + (", clipped" if clipped else "")
    return Images(kind, None, jax.vmap(add)(keys, chosen.images))


def gaussian_kind(stddev: float) -> str:
    """The paper's name for a row of noise."""
    return f"Gaussian {stddev:g}"


def magnified(chosen: Victims, images: Images, rms: float) -> Images:
    """The same distortions, each scaled to an RMS; they may leave the box, as in the paper."""
    xs = jax.vmap(functools.partial(transfer.magnify, rms=rms))(chosen.images, images.xs)
    return Images(magnified_kind(images.kind, rms), images.made_for, xs)


def magnified_kind(kind: str, rms: float) -> str:
    """The name of a kind of images whose distortions were scaled to an RMS."""
    return f"{kind} at {rms:g}"


def count(columns: Mapping[str, networks.Network], chosen: Victims, sets: Sequence[Images]) -> Row:
    """Count the images of each set that each network gets wrong.

    They are counted among all images, among the first 256, and among those whose originals the
    network gets right.
    """
    few = slice(statistics.PAPER_IMAGES)
    stacks = [jnp.asarray(images.xs) for images in sets]
    matrix = functools.partial(
        transfer.transfer_matrix, [network.logits_fn for network in columns.values()]
    )
    counts = {
        "": matrix(stacks, chosen.labels),
        "_256": matrix([xs[few] for xs in stacks], chosen.labels[few]),
        "_net": matrix(stacks, chosen.labels, xs=chosen.images),
    }
    rows = []
    for i, images in enumerate(sets):
        rms = jax.vmap(metrics.distortion)(chosen.images, stacks[i])
        row = {"kind": images.kind, "made_for": images.made_for, "distortion": float(rms.mean())}
        for of, found in counts.items():
            row[f"wrong{of}"] = np.asarray(found.wrong[i]).tolist()
            row[f"total{of}"] = np.asarray(found.total[i]).tolist()
        rows.append(row)
    return {"nets": list(columns), "rows": rows}


# --- over seeds ------------------------------------------------------------------------------


def by_row(content: Content) -> tuple[list[str], Found]:
    """The columns, and the rows of all seeds."""
    return content["runs"][0]["nets"], grouped(content, "kind", "made_for")


def rates(rows: Sequence[Row], of: str = "") -> list[statistics.Estimate]:
    """The error of each column; `of` is "_256" for the first images, "_net" for net transfer."""
    columns = range(len(rows[0]["wrong"]))
    return [
        statistics.fraction(
            *([row[f"{what}{of}"][i] for row in rows] for what in ("wrong", "total"))
        )
        for i in columns
    ]


def table(
    columns: Sequence[str],
    lines: Mapping[str, Sequence[Row]],
    printed: Mapping[str, paper.Transfer],
    *,
    of: str = "",
) -> str:
    """Errors in percent with intervals; in brackets the paper's, with ✓ where they agree.

    Args:
        columns: The networks.
        lines: The rows of each line, one per seed. A line with the name of one of the paper's is
            compared with it.
        printed: The paper's lines.
        of: Among which images: see `rates`.
    """

    def line(title: str, rows: Sequence[Row]) -> Iterator[str]:
        yield title
        for name, rate in zip(columns, rates(rows, of), strict=True):
            text = markdown.percent(rate, 1, unit="")
            if title in printed:
                mark = "✓" if statistics.agrees(rate, printed[title].errors[name] / 100) else "✗"
                text += f" ({printed[title].errors[name]:g} {mark})"
            yield text
        text = f"{np.mean([row['distortion'] for row in rows]):.3f}"
        yield text + (f" ({printed[title].distortion:g})" if title in printed else "")

    return markdown.grid(
        ("errors, % (paper)", *columns, "distortion"),
        (tuple(line(title, rows)) for title, rows in lines.items()),
    )


def agreement(
    columns: Sequence[str], found: Found, kind: str, printed: Mapping[str, paper.Transfer]
) -> tuple[int, int]:
    """How many rates between different networks, for the first images, agree with the paper's."""
    marks = [
        statistics.agrees(rates(found[kind, row], "_256")[i], printed[row].errors[column] / 100)
        for row, i, column in _different(columns)
    ]
    return sum(marks), len(marks)


class Above(NamedTuple):
    """Transfer between different networks compared with a control's."""

    transfer: statistics.Estimate
    """The mean over all pairs of networks."""
    control: statistics.Estimate
    p_value: float
    """Student's one-sided paired test of the means over seeds."""
    significant: int
    """In how many pairs p < 0.05 by Fisher's exact test with Holm's correction."""
    pairs: int

    def __str__(self) -> str:
        return (
            f"{markdown.percent(self.transfer, 1)} against {markdown.percent(self.control, 1)} "
            f"(p = {self.p_value:.1g}), in {self.significant} of {self.pairs} pairs of networks "
            "significant on its own"
        )


def above(columns: Sequence[str], found: Found, kind: str, control: str) -> Above:
    """Test whether networks err more on the images of a kind than on a control.

    The test of a pair ignores that both counts are over the same images, which is conservative.
    """
    p_values, pairs = [], []
    for row, i, _ in _different(columns):
        both = [found.get((one, row)) or found[one, None] for one in (kind, control)]
        counts = [[(seed["wrong"][i], seed["total"][i]) for seed in rows] for rows in both]
        pairs.append([[wrong / total for wrong, total in rows] for rows in counts])
        sums = [(sum(wrong for wrong, _ in rows), sum(n - k for k, n in rows)) for rows in counts]
        p_values.append(scipy.stats.fisher_exact(sums, "greater").pvalue)
    means, others = np.mean(pairs, axis=0)
    ordered = np.sort(p_values) * np.arange(len(p_values), 0, -1)
    return Above(
        statistics.mean(means),
        statistics.mean(others),
        float(scipy.stats.ttest_rel(means, others, alternative="greater").pvalue),
        int((np.maximum.accumulate(ordered) < 0.05).sum()),
        len(p_values),
    )


def span(printed: Mapping[str, paper.Transfer], rows: Sequence[str], columns: Sequence[str]) -> str:
    """The range of the rates that the paper prints between different networks."""
    rates = [printed[row].errors[column] for row in rows for column in columns if row != column]
    return f"{min(rates):g} to {max(rates):g} %"


def misled(
    columns: Sequence[str], found: Found, kind: str, row: str, others: Sequence[str]
) -> list[float]:
    """The mean error of some networks on the images of a row, for each seed."""
    places = [i for i, name in enumerate(columns) if name in others]
    return [
        float(np.mean([seed["wrong"][i] / seed["total"][i] for i in places]))
        for seed in found[kind, row]
    ]


def _different(columns: Sequence[str]) -> Iterator[tuple[str, int, str]]:
    """The off-diagonal cells: the row's network, and the column's index and network."""
    for row in columns:
        for i, column in enumerate(columns):
            if row != column:
                yield row, i, column
