"""One gradient step beside the nearest images (figure; 5 min; MNIST or a sample).

The fast gradient sign method (Goodfellow et al. 2014) moves every pixel once, by epsilon, away from
the true class. We compare it with the nearest image of any other class that the paper's attack
finds, since the step does not choose a class either. Each seed retrains the networks and draws
other test images. Images that a network gets wrong before the step count as wrong at distance 0. A
step is clipped to [0, 1], and its length is the RMS per pixel after clipping. Goodfellow et al. do
not say whether they clipped, nor how they trained their softmax, so at their epsilon we show both.

Transfer is compared at equal lengths, on images that the attacked network gets right. First the
nearest images are compared with a step whose epsilon gives the same mean length. Then each nearest
image's distortion is scaled to the length of a step of 0.1 on that image (without clipping, as in
the paper's Table 4). Another network is judged on the images that it gets right as well. The
control changes each pixel by as much as the step, with random signs.
"""

from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key
from matplotlib.figure import Figure

from advjax import attacks, metrics, transfer
from advjax.types import LogitsFn
from experiments.common import markdown, networks, paper, statistics
from experiments.common.claims import Claim, verdict
from experiments.common.measure import Arrays, Content, Row, grouped
from experiments.common.options import Digits, VictimOptions
from experiments.common.victims import Victims, attack_every_class, random_victims

EPSILONS = tuple(k / 60 for k in range(19))
SHOWN = (0.05, 0.1, 0.15, 0.2, 0.25)
TRANSFERRED = 0.1
LEVELS = tuple(k / 20 for k in range(1, 20))
"""Fractions of wrong images for which the quantiles of the nearest distances are saved."""
PUBLISHED = paper.FAST_GRADIENT["shallow softmax"]
RATIOS = tuple(paper.ROBUSTNESS.items())
EVERYWHERE = (-np.inf, np.inf)
KINDS = {"nearest": "nearest", "step": "step", "control": "random signs"}

_magnify = jax.jit(jax.vmap(transfer.magnify))
_random_signs = jax.jit(jax.vmap(transfer.random_signs))
_distances = jax.jit(jax.vmap(metrics.distortion))


class Options(VictimOptions):
    """Measures how often one gradient step misleads each network of Table 1, and the others."""


def measure(options: Options, digits: Digits, seed: int) -> Row:
    """Compare steps and nearest images on each network, and on the others."""
    key = jax.random.key(seed)
    chosen = random_victims(key, digits.test, options.images)
    trained = [
        networks.load_or_train(key, name, digits.train, steps=options.steps)
        for name in networks.table1(options.quick)
    ]
    sign_key = jax.random.fold_in(key, 1)
    return {"rows": [_attack(network, trained, chosen, sign_key) for network in trained]}


def _attack(
    network: networks.Network,
    others: Sequence[networks.Network],
    chosen: Victims,
    key: Key[Array, ""],
) -> Row:
    """Steps and nearest images for one network, and how they transfer to the others."""
    xs, labels = chosen.images, chosen.labels
    steps = {epsilon: _step(network.logits_fn, xs, labels, epsilon) for epsilon in EPSILONS}
    nearest = attack_every_class(attacks.lbfgs(network.logits_fn), chosen, network.name)
    lengths = np.where(nearest.success, nearest.distortion, np.inf)
    unclipped = _step(network.logits_fn, xs, labels, PUBLISHED.epsilon, EVERYWHERE)
    return {
        "net": network.name,
        "steps": [
            {
                "epsilon": epsilon,
                "wrong": int(result.success.sum()),
                "distortion": float(result.distortion.mean()),
            }
            for epsilon, result in steps.items()
        ],
        "published": {
            kind: {"wrong": int(result.success.sum()), "confidence": _confidence(network, result)}
            for kind, result in (("clipped", steps[PUBLISHED.epsilon]), ("unclipped", unclipped))
        },
        "nearest": {
            "distortion": float(nearest.distortion.mean()),
            "success": float(nearest.success.mean()),
            "quantiles": np.quantile(lengths, LEVELS, method="inverted_cdf").tolist(),
        },
        "transfer": _transfer(network, others, chosen, nearest, steps, key),
    }


@jax.jit
def _step(
    logits_fn: LogitsFn,
    xs: Float[Array, "n *shape"],
    labels: Int[Array, " n"],
    epsilon: float,
    box: tuple[float, float] = (0.0, 1.0),
) -> attacks.AttackResult:
    """One step from each image; one compiled program serves every epsilon."""
    return jax.vmap(attacks.fgsm(logits_fn, epsilon=epsilon, box=box))(xs, labels)


def _confidence(network: networks.Network, result: attacks.AttackResult) -> float:
    """The mean probability of the wrong class."""
    probabilities = jax.nn.softmax(jax.vmap(network.logits_fn)(result.x_adv))
    return float(jnp.mean(jnp.max(probabilities, axis=1), where=result.success))


def _transfer(
    network: networks.Network,
    others: Sequence[networks.Network],
    chosen: Victims,
    nearest: attacks.AttackResult,
    steps: dict[float, attacks.AttackResult],
    key: Key[Array, ""],
) -> list[Row]:
    """Errors of the other networks on the nearest images and on the steps, at two lengths."""
    xs, labels, near, far = chosen.images, chosen.labels, nearest.x_adv, steps[TRANSFERRED]
    right = np.asarray(steps[0.0].prediction) == labels
    lengths = [float(result.distortion[right].mean()) for result in steps.values()]
    epsilon = float(np.interp(nearest.distortion[right].mean(), lengths, list(steps)))
    keys = jax.random.split(key, len(xs))
    sizes = {
        epsilon: (near, _step(network.logits_fn, xs, labels, epsilon).x_adv),
        TRANSFERRED: (_magnify(xs, near, far.distortion), far.x_adv),
    }
    images = [
        some[right] for pair in sizes.values() for some in (*pair, _random_signs(keys, xs, pair[1]))
    ]
    found = transfer.transfer_matrix(
        [other.logits_fn for other in others if other.name != network.name],
        images,
        labels[right],
        xs=xs[right],
    )
    wrong = found.wrong.sum(axis=1).reshape(2, 3).tolist()
    return [
        {
            "epsilon": size,
            "distortion": float(_distances(xs[right], images[3 * i + 1]).mean()),
            "total": int(found.total[0].sum()),
            **dict(zip(KINDS, wrong[i], strict=True)),
        }
        for i, size in enumerate(sizes)
    ]


def describe(content: Content) -> str:
    """Four tables: errors, published errors, lengths and transfer."""
    images = content["config"]["images"]

    def wrong(rows: Sequence[Row]) -> str:
        return _percent([row["wrong"] for row in rows], [images] * len(rows))

    def mean(rows: Sequence[Row], of: Callable[[Row], float], digits: int = 4) -> str:
        return markdown.number(statistics.mean([of(row) for row in rows]), digits)

    def cells(rows: Sequence[Row], kind: str) -> tuple[str, str]:
        some = [row["published"][kind] for row in rows]
        return wrong(some), mean(some, lambda one: 100 * one["confidence"], 1)

    by_network = grouped(content, "net")
    errors = markdown.table(
        [
            ("network", name),
            ("no step", wrong([_step_of(row, 0) for row in rows])),
            *((f"epsilon {e:g}", wrong([_step_of(row, e) for row in rows])) for e in SHOWN),
        ]
        for name, rows in by_network.items()
    )
    published = markdown.grid(
        ("network", "error", "confidence", "error, unclipped", "confidence, unclipped"),
        [
            *(
                (name, *cells(rows, "clipped"), *cells(rows, "unclipped"))
                for name, rows in by_network.items()
            ),
            *(
                (f"{name}, as published", f"{row.error:g}", f"{row.confidence:g}", "", "")
                for name, row in paper.FAST_GRADIENT.items()
            ),
        ],
    )
    lengths = markdown.table(
        [
            ("network", name),
            ("half wrong: nearest", mean(rows, _half_length)),
            ("step", mean(rows, lambda row: _step_length(row, 0.5, images))),
            ("ratio", mean(rows, lambda row: _at_half(row, images), 2)),
            ("90 % wrong: step", mean(rows, lambda row: _step_length(row, 0.9, images))),
            ("nearest, mean", mean(rows, lambda row: row["nearest"]["distortion"])),
            ("ratio", mean(rows, lambda row: _cost(row, images), 2)),
        ]
        for name, rows in by_network.items()
    )
    ratios = ", ".join(
        f"{row.fast_gradient / row.lbfgs:.1f} for {network}" for network, row in RATIOS
    )
    return f"""\
![Error against epsilon, and against the length of the distortion](fgsm.png)

Percent of the images that each network gets wrong after a step:

{errors}

At epsilon {PUBLISHED.epsilon:g}, with the mean confidence in the wrong class, beside the
published values:

{published}

Lengths (RMS per pixel) of the nearest images, and of the step after which half or 90 % are wrong.
The last column is the ratio of the latter to the mean nearest distance, which Moosavi-Dezfooli et
al. (2016) report too: {ratios}.

{lengths}

Percent of the images that the other networks get wrong, among those that both they and the attacked
network get right:

{_transfer_table(by_network)}"""


def _transfer_table(by_network: Mapping[str, Sequence[Row]]) -> str:
    return markdown.table(
        [
            ("network attacked", f"{name}{', scaled' if i else ''}"),
            ("RMS", f"{statistics.over(some, 'distortion').mean:.4f}"),
            *((heading, _percent_of(some, kind)) for kind, heading in KINDS.items()),
        ]
        for i in range(2)
        for name, rows in by_network.items()
        for some in [[row["transfer"][i] for row in rows]]
    )


def _percent_of(rows: Sequence[Row], kind: str) -> str:
    return _percent([row[kind] for row in rows], [row["total"] for row in rows])


def claims(content: Content) -> list[Claim]:
    """One step is enough, but longer than necessary; its examples mislead other networks."""
    images = content["config"]["images"]
    by_network = grouped(content, "net")
    clipped = [row["published"]["clipped"] for row in by_network["FC10(1e-4)"]]
    error = statistics.fraction([one["wrong"] for one in clipped], [images] * len(clipped))
    confidence = np.mean([one["confidence"] for one in clipped])
    costs, halves = (
        {
            name: float(np.mean([measure(row, images) for row in rows]))
            for name, rows in by_network.items()
        }
        for measure in (_cost, _at_half)
    )
    far = [[row["transfer"][1] for row in rows] for rows in by_network.values()]
    rates = {
        kind: np.array([[row[kind] / row["total"] for row in rows] for rows in far])
        for kind in KINDS
    }
    above = np.all(rates["step"] > rates["control"], axis=1)
    return [
        Claim(
            "One gradient step is enough to mislead a linear network (Goodfellow et al. 2014)",
            f"{PUBLISHED.error:g} % wrong at epsilon {PUBLISHED.epsilon:g}, with a confidence of "
            f"{PUBLISHED.confidence:g} %",
            f"FC10(1e-4): {markdown.percent(error, 1)} with {markdown.percent(confidence, 1)}",
            "holds"
            if error.mean > 0.99
            else "holds in part"
            if error.mean > 0.9
            else "does not hold",
        ),
        Claim(
            "It is several times as long as necessary (Moosavi-Dezfooli et al. 2016)",
            ", ".join(
                f"{row.fast_gradient / row.lbfgs:.1f} times ({network})" for network, row in RATIOS
            ),
            ", ".join(f"{cost:.1f} times ({name})" for name, cost in costs.items())
            + "; where half of the images are wrong, "
            + ", ".join(f"{half:.1f}" for half in halves.values()),
            verdict(cost > 2 for cost in costs.values()),
        ),
        Claim(
            "Its examples mislead other networks too (Goodfellow et al. 2014)",
            "stated",
            f"they err on {markdown.percent(rates['step'].mean(), 1)} of images after a step of "
            f"{TRANSFERRED:g}, {markdown.percent(rates['control'].mean(), 1)} with random signs, "
            f"{markdown.percent(rates['nearest'].mean(), 1)} of nearest images scaled to its RMS",
            verdict(above),
        ),
    ]


def draw(content: Content, arrays: Arrays) -> dict[str, Figure]:
    """Errors against epsilon, and against length for both steps and nearest images."""
    del arrays
    figure = Figure(figsize=(10, 4.2), dpi=100, layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for name, rows in grouped(content, "net").items():
        wrong, lengths = (
            np.mean([[step[what] for step in row["steps"]] for row in rows], axis=0)
            for what in ("wrong", "distortion")
        )
        errors = 100 * wrong / content["config"]["images"]
        nearest = np.mean([row["nearest"]["quantiles"] for row in rows], axis=0)
        (line,) = left.plot(EPSILONS, errors, label=name)
        right.plot(lengths, errors, color=line.get_color())
        right.plot(nearest, 100 * np.array(LEVELS), "--", color=line.get_color())
    left.plot(PUBLISHED.epsilon, PUBLISHED.error, "k*", label="softmax, published")
    left.set(xlabel="epsilon", ylabel="images that a network gets wrong, %")
    right.plot([], [], "k-", label="one gradient step")
    right.plot([], [], "k--", label="nearest images (lbfgs)")
    right.set(xlabel="length of the distortion (RMS per pixel)")
    for axes in (left, right):
        axes.set(xlim=(0, None), ylim=(0, 102))
        axes.legend(frameon=False, loc="lower right")
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    return {"fgsm.png": figure}


def _step_of(row: Row, epsilon: float) -> Row:
    (step,) = [step for step in row["steps"] if step["epsilon"] == epsilon]
    return step


def _step_length(row: Row, level: float, images: int) -> float:
    """The mean length of the step at which the error first reaches a level; NaN if never."""
    errors = np.array([step["wrong"] for step in row["steps"]]) / images
    lengths = np.array([step["distortion"] for step in row["steps"]])
    reached = np.flatnonzero(errors >= level)
    if not len(reached):
        return np.nan
    around = slice(max(0, reached[0] - 1), reached[0] + 1)
    return float(np.interp(level, errors[around], lengths[around]))


def _half_length(row: Row) -> float:
    """The median distance of the nearest images."""
    return row["nearest"]["quantiles"][LEVELS.index(0.5)]


def _at_half(row: Row, images: int) -> float:
    """The ratio of the lengths of steps and nearest images at which half are wrong."""
    return _step_length(row, 0.5, images) / _half_length(row)


def _cost(row: Row, images: int) -> float:
    """The length of the step for 90 % over the mean distance of the nearest images."""
    return _step_length(row, 0.9, images) / row["nearest"]["distortion"]


def _percent(wrong: Sequence[int], total: Sequence[int]) -> str:
    return markdown.percent(statistics.fraction(wrong, total), 1, unit="")
