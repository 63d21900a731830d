"""Transfer between training sets (table 4; 3 min; MNIST or a sample).

The networks are those of Table 3. Test images are distorted for each, towards random other classes.
A cell is the fraction that the column's network then gets wrong. For the lower half of the table
each distortion is scaled to an RMS of 0.1, after which it may leave the box. Read literally, the
printed formula makes it 28 times smaller; this is shown too. A distortion above 0.1 is scaled down,
and may then not even mislead the network that it was made for, for which the paper prints 100 %.
The figure shows other lengths.
"""

from collections.abc import Sequence

import jax
import numpy as np
from matplotlib.figure import Figure

from experiments.common import paper, transfers
from experiments.common.claims import Claim
from experiments.common.halves import divide, train_on_halves
from experiments.common.measure import Arrays, Content, Row
from experiments.common.options import Digits, VictimOptions
from experiments.common.victims import ATTACKS, random_victims

CURVE = (0.02, 0.04, 0.06, 0.08, 0.1, 0.15, 0.2, 0.3)
STDDEVS = (0.06, 0.1)
MAGNIFIED = 0.1
LITERAL = MAGNIFIED / 28
"""The RMS over 28 x 28 pixels of a distortion of L2 length 0.1."""


class Options(VictimOptions):
    """Distorts test images for each network of Table 4, and shows them to the others."""


def measure(options: Options, digits: Digits, seed: int) -> Row:
    """Count how many of the distorted images each network gets wrong."""
    key = jax.random.key(seed)
    chosen = random_victims(key, digits.test, options.images)
    trained = train_on_halves(seed, divide(seed, digits.train), steps=options.steps)
    rows = [transfers.Images("clean", None, chosen.images)]
    for i, network in enumerate(trained.values()):
        for attack in ATTACKS:
            found = transfers.adversarial(attack, network, chosen)
            lengths = (LITERAL, *CURVE)
            rows += [found, *(transfers.magnified(chosen, found, rms) for rms in lengths)]
            if attack is ATTACKS[0]:
                rows += transfers.controls(jax.random.fold_in(key, i), chosen, found)
    rows += [transfers.gaussian(key, chosen, rms) for rms in CURVE]
    rows += [transfers.gaussian(key, chosen, rms, clipped=True) for rms in STDDEVS]
    return transfers.count(trained, chosen, rows)


def describe(content: Content) -> str:
    """Both halves of Table 4 for each attack, for all images and for the first 256; controls."""
    columns, found = transfers.by_row(content)
    n = f"{content['config']['images']:,}"

    def table(kind: str, stddev: float | None, of: str = "") -> str:
        lines = {name: found[kind, name] for name in columns}
        if stddev is not None:
            noise = transfers.gaussian_kind(stddev)
            lines |= {one: found[one, None] for one in ("clean", noise, f"{noise}, clipped")}
        halves = {STDDEVS[0]: paper.TABLE4, STDDEVS[1]: paper.TABLE4_MAGNIFIED}
        printed = {} if of == "_net" or stddev is None else halves[stddev]
        return transfers.table(columns, lines, printed, of=of)

    parts = []
    for attack in (attack.__name__ for attack in ATTACKS):
        large = transfers.magnified_kind(attack, MAGNIFIED)
        parts += [
            f"Test images distorted by `{attack}` for the row's network, {n} per seed:",
            table(attack, STDDEVS[0]),
            f"Scaled to an RMS of {MAGNIFIED:g}:",
            table(large, STDDEVS[1]),
            f"The printed formula read literally, an RMS of {LITERAL:.4f}:",
            table(transfers.magnified_kind(attack, LITERAL), None),
            "The first two again, of the first 256 of each seed:",
            table(attack, STDDEVS[0], "_256"),
            table(large, STDDEVS[1], "_256"),
            "Net transfer, among the images that the column's network gets right:",
            table(attack, STDDEVS[0], "_net"),
        ]
    for control in transfers.CONTROLS:
        parts += [f"Control for `lbfgs`, {control}:", table(control, None)]
    parts.append("![Errors of the other networks against the RMS of the distortion](table4.png)")
    return "\n\n".join(parts)


def claims(content: Content) -> list[Claim]:
    """Examples transfer between training sets, and more when magnified, unlike noise."""
    columns, found = transfers.by_row(content)
    noise, signs = (transfers.above(columns, found, "lbfgs", one) for one in transfers.CONTROLS)
    large = transfers.magnified_kind("lbfgs", MAGNIFIED)
    noise_row = transfers.gaussian_kind(MAGNIFIED)
    magnified = transfers.above(columns, found, large, noise_row)
    agreeing, cells = transfers.agreement(columns, found, "lbfgs", paper.TABLE4)
    more, more_cells = transfers.agreement(columns, found, large, paper.TABLE4_MAGNIFIED)
    return [
        Claim(
            "Adversarial examples mislead networks that were trained on other images",
            transfers.span(paper.TABLE4, columns, columns),
            f"more than noise of the same RMS: {noise}; than the same distortion with random "
            f"signs: {signs}",
            "holds" if max(noise.p_value, signs.p_value) < 0.05 else "does not hold",
        ),
        Claim(
            "Scaled to an RMS of 0.1 they mislead them far more than noise does",
            f"{transfers.span(paper.TABLE4_MAGNIFIED, columns, columns)} against "
            f"{transfers.span(paper.TABLE4_MAGNIFIED, [noise_row], columns)}",
            str(magnified),
            "holds" if magnified.p_value < 0.05 else "does not hold",
        ),
        Claim(
            "Table 4 as printed",
            f"{cells + more_cells} rates between different networks",
            f"{agreeing} of {cells} agree, and {more} of the {more_cells} scaled ones",
            "holds" if agreeing + more == cells + more_cells else "holds in part",
        ),
    ]


def draw(content: Content, arrays: Arrays) -> dict[str, Figure]:
    """Errors against the RMS of scaled distortions, for each kind of pair of networks."""
    del arrays
    columns, found = transfers.by_row(content)
    itself, other = "the network itself", "trained on other images"
    sibling = "another architecture, trained on the same images"
    sorts: dict[str, list[tuple[str, int]]] = {itself: [], sibling: [], other: []}
    for row in columns:
        for i, column in enumerate(columns):
            elsewhere = row.endswith("'") != column.endswith("'")
            name = other if elsewhere else itself if row == column else sibling
            sorts[name].append((row, i))

    figure = Figure(figsize=(6.4, 4), dpi=100, layout="constrained")
    axes = figure.add_subplot()
    for label, cells in sorts.items():
        kinds = [transfers.magnified_kind("lbfgs", rms) for rms in CURVE]
        axes.plot(CURVE, [_error(found, kind, cells) for kind in kinds], "o-", label=label)
    kinds = [transfers.gaussian_kind(rms) for rms in CURVE]
    noise = [_error(found, kind, [(None, i) for i in range(len(columns))]) for kind in kinds]
    axes.plot(CURVE, noise, "s--", color="0.5", label="Gaussian noise, any network")
    axes.set(
        xlabel="RMS of the scaled distortion",
        ylabel="error, %",
        title="Test images distorted for one network, shown to",
        ylim=(0, 101),
    )
    axes.legend()
    axes.grid(alpha=0.3)
    return {"table4.png": figure}


def _error(found: transfers.Found, kind: str, cells: Sequence[tuple[str | None, int]]) -> float:
    """The mean over cells and seeds, in percent."""
    return 100 * float(
        np.mean(
            [seed["wrong"][i] / seed["total"][i] for row, i in cells for seed in found[kind, row]]
        )
    )
