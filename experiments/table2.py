"""Whether what misleads one net misleads another (table 2; 5 min; MNIST or a sample).

Training images are distorted for each net, towards random other classes; a cell is the share that
the column's net then gets wrong, as in the paper with the images that it gets wrong anyway: the
first row shows how many these are, and net transfer leaves them out. Each seed trains the nets anew
and draws other images; its first 256 are also shown by themselves, as many as the paper seems to
have used. Beside the paper's control, noise of a fixed stddev, stand two closer ones: noise as far
from each image as its adversarial one, and the adversarial distortion with its signs drawn anew.
"""

from pathlib import Path
from typing import Any

import jax

from experiments.common import measure as results
from experiments.common import networks, paper, transfers
from experiments.table1 import ATTACKS, NETS

STDDEVS = (0.1, 0.3)


def main(
    *,
    images: int = 1000,
    seeds: int = 5,
    dataset: results.Name = "mnist",
    source: results.Source = "auto",
    out: Path = Path("results"),
    quick: bool = False,
    reuse: bool = False,
) -> dict[str, Any]:
    """Distorts training images for each net of Table 1, and asks all the others.

    Args:
        images: How many training images to attack for each seed.
        seeds: How many times to train and to draw.
        dataset: The data set.
        source: Where it comes from: tensorflow-datasets, the sample of MNIST inside the package, or
            the first of both that can be had.
        out: The folder for the numbers.
        quick: Two nets, briefly trained, and two seeds, on the sample: a minute, for a trial.
        reuse: Whether to take the numbers in `out`, if they are of the same options.
    """
    train, test = results.load(dataset, source, quick=quick)
    images, seeds = (64, 2) if quick else (images, seeds)

    def measure(seed: int) -> results.Row:
        key = jax.random.key(seed)
        chosen = networks.random_victims(jax.random.fold_in(key, 2), train, images)
        trained = {
            name: networks.load_or_train(
                name, train.images, train.labels, key=key, steps=300 if quick else None
            )
            for name in (NETS[:4:3] if quick else NETS)
        }
        rows = [transfers.Images("clean", None, chosen.images)]
        for i, net in enumerate(trained.values()):
            found = [transfers.adversarial(attack, net, chosen) for attack in ATTACKS]
            rows += [*found, *transfers.controls(jax.random.fold_in(key, i), chosen, found[0])]
        for stddev in STDDEVS:
            for clipped in (False, True):
                rows.append(transfers.gaussian(key, chosen, stddev, clipped=clipped))
        return transfers.count(trained, chosen, rows)

    content = results.measure(
        "table2",
        measure,
        seeds=seeds,
        config={"images": images, "dataset": dataset, "quick": quick},
        splits=(train, test),
        out=out,
        reuse=reuse,
    )
    results.show("table2", describe(content), out)
    return content


def describe(content: dict[str, Any]) -> str:
    """Table 2 for each attack, of all images and of the first 256; controls; net transfer."""
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
            f"Training images distorted by `{attack}` for the row's net, {n} of each seed:",
            table(attack),
            "Of the first 256 of each seed:",
            table(attack, "_256"),
            "Net transfer, of those images that the column's net had right:",
            table(attack, "_net"),
        ]
    for control in transfers.CONTROLS:
        parts += [f"Control for `lbfgs`, {control}:", table(control, others={})]
    return "\n\n".join(parts)


def claims(content: dict[str, Any]) -> list[results.Claim]:
    """Transfer beyond controls; more from nets of more decay; how often the numbers agree."""
    columns, found = transfers.by_row(content)
    noise, signs = (transfers.above(columns, found, "lbfgs", one) for one in transfers.CONTROLS)
    linear = [name for name in columns if name.startswith("FC10(")]
    others = [name for name in columns if name not in linear]
    by_decay = [transfers.misled(columns, found, "lbfgs", name, others) for name in linear]
    ordered = sum(list(seed) == sorted(seed) for seed in zip(*by_decay, strict=True))
    seeds = len(content["runs"])
    agreeing, cells = transfers.agreement(columns, found, "lbfgs", paper.TABLE2)
    return [
        results.Claim(
            "A relatively large fraction of adversarial examples misleads nets of other "
            "architectures and hyper-parameters",
            transfers.span(paper.TABLE2, columns, columns),
            f"more than noise of the same RMS: {noise}; than the same distortion with random "
            f"signs: {signs}",
            "holds" if max(noise.p_value, signs.p_value) < 0.05 else "does not hold",
        ),
        results.Claim(
            "Examples made for a linear net of more weight decay mislead other nets more",
            "; ".join(transfers.span(paper.TABLE2, [name], others) for name in linear)
            + " of the non-linear nets",
            "; ".join(results.percent(results.mean(some), 1) for some in by_decay)
            + f" of them, so ordered in {ordered} of {seeds} seeds",
            "holds" if ordered == seeds else "does not hold",
        ),
        results.Claim(
            "Table 2 as printed",
            f"{cells} rates between different nets",
            f"{agreeing} of {cells} agree: the intervals meet",
            "holds" if agreeing == cells else "holds in part",
        ),
    ]
