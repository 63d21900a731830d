"""Transfer between networks (table 2; 5 min; MNIST or a sample).

Training images are distorted for each network, towards random other classes. A cell is the fraction
that the column's network then gets wrong. As in the paper, this includes the images that it gets
wrong anyway: the row "clean" shows how many these are, and net transfer leaves them out. Each seed
retrains the networks and draws other images. Its first 256 are also shown separately, since the
paper seems to have used 256. The paper's control is noise of a fixed standard deviation. We add two
stricter ones: noise with the RMS of each image's adversarial distortion, and the adversarial
distortion with random signs.
"""

from typing import Any

import jax

from experiments.common import markdown, networks, paper, statistics, transfers
from experiments.common.claims import Claim
from experiments.common.measure import Content, Row
from experiments.common.options import Digits, VictimOptions
from experiments.common.victims import ATTACKS, random_victims

STDDEVS = (0.1, 0.3)


class Options(VictimOptions):
    """Distorts training images for each network of Table 1, and shows them to all the others."""


def measure(options: Options, digits: Digits, seed: int) -> Row:
    """Count how many of the distorted images each network gets wrong."""
    key = jax.random.key(seed)
    chosen = random_victims(jax.random.fold_in(key, 2), digits.train, options.images)
    trained = {
        name: networks.load_or_train(key, name, digits.train, steps=options.steps)
        for name in networks.table1(options.quick)
    }
    rows = [transfers.Images("clean", None, chosen.images)]
    for i, network in enumerate(trained.values()):
        found = [transfers.adversarial(attack, network, chosen) for attack in ATTACKS]
        rows += [*found, *transfers.controls(jax.random.fold_in(key, i), chosen, found[0])]
    for stddev in STDDEVS:
        for clipped in (False, True):
            rows.append(transfers.gaussian(key, chosen, stddev, clipped=clipped))
    return transfers.count(trained, chosen, rows)


def describe(content: Content) -> str:
    """Table 2 for each attack, for all images and for the first 256; net transfer; controls."""
    columns, found = transfers.by_row(content)
    noise = {kind: rows for (kind, made_for), rows in found.items() if made_for is None}
    n = f"{content['config']['images']:,}"

    def table(kind: str, of: str = "", others: Any = noise) -> str:
        printed = {} if of == "_net" or kind in transfers.CONTROLS else paper.TABLE2
        lines = {name: found[kind, name] for name in columns}
        return transfers.table(columns, lines | others, printed, of=of)

    parts = []
    for attack in (attack.__name__ for attack in ATTACKS):
        parts += [
            f"Training images distorted by `{attack}` for the row's network, {n} per seed:",
            table(attack),
            "Of the first 256 of each seed:",
            table(attack, "_256"),
            "Net transfer, among the images that the column's network gets right:",
            table(attack, "_net"),
        ]
    for control in transfers.CONTROLS:
        parts += [f"Control for `lbfgs`, {control}:", table(control, others={})]
    return "\n\n".join(parts)


def claims(content: Content) -> list[Claim]:
    """Transfer exceeds the controls, weight decay increases it; how many numbers agree."""
    columns, found = transfers.by_row(content)
    noise, signs = (transfers.above(columns, found, "lbfgs", one) for one in transfers.CONTROLS)
    linear = [name for name in columns if name.startswith("FC10(")]
    others = [name for name in columns if name not in linear]
    by_decay = [transfers.misled(columns, found, "lbfgs", name, others) for name in linear]
    ordered = sum(list(seed) == sorted(seed) for seed in zip(*by_decay, strict=True))
    seeds = len(content["runs"])
    agreeing, cells = transfers.agreement(columns, found, "lbfgs", paper.TABLE2)
    return [
        Claim(
            "A relatively large fraction of adversarial examples misleads networks with other "
            "architectures and hyper-parameters",
            transfers.span(paper.TABLE2, columns, columns),
            f"more than noise of the same RMS: {noise}; than the same distortion with random "
            f"signs: {signs}",
            "holds" if max(noise.p_value, signs.p_value) < 0.05 else "does not hold",
        ),
        Claim(
            "Examples made for a linear network with more weight decay mislead other networks more",
            "; ".join(transfers.span(paper.TABLE2, [name], others) for name in linear)
            + " of the non-linear networks",
            "; ".join(markdown.percent(statistics.mean(some), 1) for some in by_decay)
            + f" of them, in this order for {ordered} of {seeds} seeds",
            "holds" if ordered == seeds else "does not hold",
        ),
        Claim(
            "Table 2 as printed",
            f"{cells} rates between different networks",
            f"{agreeing} of {cells} agree: the intervals meet",
            "holds" if agreeing == cells else "holds in part",
        ),
    ]
