"""Adversarial photographs shown to other networks (section 4.2; 6 min; photographs).

The paper shows with digits that what misleads one network misleads others, and says the same of
networks for photographs. Here photographs are turned into ostriches for each network, with
`minimum_norm`, and shown to the others. They are shown as found and, since those lie on the
boundary of the network that they were made for, with their distortions scaled to larger RMS too.
The control is Gaussian noise of the same RMS. All images are clipped to [0, 1].

The networks are EfficientNet-Lite0 itself, and the same on photographs resized to other resolutions
first. The weights are the same, so this is the easiest case of transfer. AlexNet, whose weights no
package provides, joins them if its file is given.

A rate counts the photographs that the column's network gets right. Rates between two networks have
Wilson's 95 % intervals over photographs; means over all pairs of different networks have Student's.
The comparison with noise is a one-sided sign test of how many other networks each photograph
misled.
"""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.stats
from jaxtyping import Array, Bool, Float, PyTree

from advjax import attacks, metrics, models, transfer
from experiments.common import markdown, networks, statistics
from experiments.common.claims import Claim
from experiments.common.measure import Content, Row, grouped
from experiments.common.options import PhotographOptions, trial
from experiments.common.photographs import OSTRICH, Subjects, load_network, load_subjects, predict
from experiments.common.victims import Victims, attack_victims

SIZES = (192, 160)  # pixels
RMS = (0.005, 0.01, 0.02)
TESTED = 0.01  # RMS for the claim
ALEXNET = "AlexNet"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(PhotographOptions):
    """Turns photographs into ostriches for each network, and shows them to the others."""

    count: int = 20
    """The maximum number of photographs: the first that EfficientNet-Lite0 gets right."""
    weights: Path | None = None
    """A weight file of torchvision's AlexNet, PyTorch or safetensors, to include it."""
    seeds: int = 1
    """How many times to draw noise."""
    TRIAL = trial(count=2)

    def load(self) -> Subjects:
        """Load EfficientNet-Lite0 and the photographs that it gets right."""
        return load_subjects(load_network(), self.folder, count=self.count)


def measure(options: Options, subjects: Subjects, seed: int) -> Row:
    """Show what was made for each network to all of them."""
    chosen = subjects.victims
    sizes, evaluations = (SIZES[1:], 12) if options.quick else (SIZES, 100)
    start = attacks.decoupled(num_steps=min(30, evaluations // 2))
    columns = {one.name: one for one in _networks(subjects.network, sizes, options.weights)}
    rows = []
    for i, (name, one) in enumerate(columns.items()):
        attack = attacks.minimum_norm(one.logits_fn, rough=True, start=start, max_evals=evaluations)
        found = attack_victims(attack, chosen, name)
        keys = jax.random.split(jax.random.fold_in(jax.random.key(seed), i), len(found.x_adv))
        for rms in (None, *RMS):
            asked = found.distortion if rms is None else jnp.full(len(keys), rms)
            sets = {
                "adversarial": found.x_adv if rms is None else _magnify(chosen, found, asked),
                "noise": _noise(keys, chosen.images, asked),
            }
            for kind, xs in sets.items():
                distortion = jax.vmap(metrics.distortion)(chosen.images, xs).mean()
                rows.append(
                    {
                        "made_for": name,
                        "kind": kind,
                        "rms": rms,
                        "distortion": float(distortion),
                        "predictions": _predictions(columns, xs),
                    }
                )
    return {
        "nets": list(columns),
        "labels": chosen.labels.tolist(),
        "clean": _predictions(columns, chosen.images),
        "rows": rows,
    }


# --- the networks --------------------------------------------------------------------------------


class Resized(NamedTuple):
    """A model that sees its image at another resolution."""

    model: Any
    size: int

    def apply(self, params: PyTree[Array], image: Float[Array, "height width 3"]) -> Array:
        """The logits of one image."""
        shape = (self.size, self.size, image.shape[-1])
        return self.model.apply(params, jax.image.resize(image, shape, "cubic"))


class Normalized(NamedTuple):
    """A torchvision model, which takes standardised pixels."""

    model: Any

    def apply(self, params: PyTree[Array], image: Float[Array, "height width 3"]) -> Array:
        """The logits of one image with pixels in [0, 1]."""
        statistics = jnp.array([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])
        mean, deviation = statistics[:, None, None]
        return self.model.apply(params, (image - mean) / deviation)


def _networks(
    network: networks.Network, sizes: tuple[int, ...], weights: Path | None
) -> Iterator[networks.Network]:
    yield network._replace(name="224 px")
    for size in sizes:
        yield networks.Network(f"{size} px", Resized(network.model, size), network.params)
    if weights is not None:
        model = models.AlexNet()
        params = models.alexnet_from_torch(model, models.load_torch_weights(weights))
        yield networks.Network(ALEXNET, Normalized(model), params)


# --- measuring -------------------------------------------------------------------------------


def _magnify(chosen: Victims, found: attacks.AttackResult, rms: Array) -> Array:
    def one(x: Array, x_adv: Array, rms: Array) -> Array:
        return transfer.magnify(x, x_adv, rms, box=(0, 1))

    return jax.vmap(one)(jnp.asarray(chosen.images), jnp.asarray(found.x_adv), rms)


def _noise(keys: Array, images: Any, rms: Any) -> Array:
    def one(key: Array, x: Array, rms: Array) -> Array:
        return transfer.gaussian(key, x, rms, box=(0, 1))

    return jax.vmap(one)(keys, jnp.asarray(images), jnp.asarray(rms))


def _predictions(columns: dict[str, networks.Network], xs: Any) -> list[list[int]]:
    """The class that each network predicts for each image."""
    return [np.asarray(predict(network.logits_fn, xs)).tolist() for network in columns.values()]


class Rows(NamedTuple):
    """The predictions of all networks for some distorted photographs."""

    wrong: Bool[np.ndarray, "seeds columns n"]
    ostrich: Bool[np.ndarray, "seeds columns n"]
    counted: Bool[np.ndarray, "columns n"]
    """Which clean photographs the column's network gets right."""
    distortion: float


def rows_of(content: Content, kind: str, rms: float | None) -> dict[str, Rows]:
    """The predictions for what was made for each network, of one kind and RMS."""
    runs = content["runs"]
    labels = np.array(runs[0]["labels"])
    by_row = grouped(content, "made_for", "kind", "rms")
    found = {}
    for name in runs[0]["nets"]:
        rows = by_row[name, kind, rms]
        predictions = np.array([row["predictions"] for row in rows])
        found[name] = Rows(
            wrong=predictions != labels,
            ostrich=predictions == OSTRICH,
            counted=np.array(runs[0]["clean"]) == labels,
            distortion=float(np.mean([row["distortion"] for row in rows])),
        )
    return found


def between(rows: dict[str, Rows], what: str) -> Float[np.ndarray, " n"]:
    """The fraction of pairs of different networks where a photograph is wrong, or an ostrich.

    A pair counts if its second network gets the clean photograph right.
    """
    names = list(rows)
    pairs = [
        (one, i)
        for made_for, one in rows.items()
        for i, column in enumerate(names)
        if column != made_for
    ]
    hits = np.sum([getattr(one, what)[:, i] & one.counted[i] for one, i in pairs], axis=0)
    counted = np.sum([one.counted[i] for one, i in pairs], axis=0)
    return hits.mean(axis=0)[counted > 0] / counted[counted > 0]


def p_value(adversarial: Float[np.ndarray, " n"], noise: Float[np.ndarray, " n"]) -> float:
    """The sign test's p-value: photographs mislead other networks no more often than noise."""
    more, less = int(np.sum(adversarial > noise)), int(np.sum(adversarial < noise))
    if not more + less:
        return 1.0
    return float(scipy.stats.binomtest(more, more + less, alternative="greater").pvalue)


# --- words -----------------------------------------------------------------------------------


def describe(content: Content) -> str:
    """The rates between networks, and their means beside those of noise for each RMS."""
    names = content["runs"][0]["nets"]
    matrices = "\n\n".join(
        f"{title}:\n\n{_matrix(names, rows_of(content, 'adversarial', rms))}"
        for title, rms in (
            ("Wrong, % (in brackets how many ostriches), distorted as found", None),
            (f"The same with the distortions scaled to an RMS of {TESTED:g}", TESTED),
        )
    )
    summary = markdown.grid(
        ("RMS", "wrong", "under noise", "p", "ostriches", "under noise"),
        (tuple(_summary(content, rms)) for rms in (None, *RMS)),
    )
    return f"""\
{matrices}

Means over pairs of different networks, and over {len(content["runs"][0]["labels"])} photographs:

{summary}"""


def _matrix(names: list[str], rows: dict[str, Rows]) -> str:
    return markdown.grid(
        ("made for", *(f"shown to {name}" for name in names), "RMS"),
        (
            (made_for, *(_cell(one, i) for i in range(len(names))), f"{one.distortion:.5f}")
            for made_for, one in rows.items()
        ),
    )


def _cell(rows: Rows, column: int) -> str:
    # The adversarial photographs are the same for every seed; only the noise differs.
    counted = rows.counted[column]
    wrong, ostriches = (what[0, column, counted].sum() for what in (rows.wrong, rows.ostrich))
    rate = statistics.fraction([int(wrong)], [int(counted.sum())])
    return f"{markdown.percent(rate, 0, unit='')} ({ostriches})"


def _summary(content: Content, rms: float | None) -> Iterator[str]:
    kinds = {kind: rows_of(content, kind, rms) for kind in ("adversarial", "noise")}
    yield "as found" if rms is None else f"{rms:g}"
    for what in ("wrong", "ostrich"):
        rates = {kind: between(rows, what) for kind, rows in kinds.items()}
        for some in rates.values():
            yield _percent(some)
        if what == "wrong":
            yield f"{p_value(*rates.values()):.1g}"


def _percent(rates: Float[np.ndarray, " n"]) -> str:
    mean = statistics.mean(rates.tolist())
    return markdown.percent(statistics.Estimate(*np.clip(mean, 0, 1).tolist()), 1)


def claims(content: Content) -> list[Claim]:
    """Transfer exceeds noise; with the same weights that supports the claim in part."""
    kinds = {kind: rows_of(content, kind, TESTED) for kind in ("adversarial", "noise")}
    rates = [between(rows, "wrong") for rows in kinds.values()]
    p = p_value(*rates)
    adversarial, noise = map(_percent, rates)
    different = ALEXNET in content["runs"][0]["nets"]
    same = "" if different else ", all networks being the same at other resolutions"
    return [
        Claim(
            "Adversarial photographs mislead other networks for ImageNet",
            "stated; the numbers are for MNIST, Table 2",
            f"at an RMS of {TESTED:g}, {adversarial} of them mislead another network, {noise} "
            f"under noise of the same RMS (p = {p:.1g}){same}",
            "does not hold" if p >= 0.05 else "holds" if different else "holds in part",
        )
    ]
