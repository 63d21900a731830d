"""Photographs that become ostriches (figure 5; 20 min; photographs).

Every photograph that EfficientNet-Lite0 gets right is distorted, within the box of its pixels,
until the network takes it for an "ostrich, Struthio camelus". We use the paper's attack, and
`minimum_norm` started from the photograph itself and from the end of a walk of normalised gradients
(`attacks.decoupled`). The paper did the same to AlexNet, whose weights are lost, on photographs
that it does not name.

Large networks have many local minima. `spread` is how much nearer the better of the two starts of
`minimum_norm` ends than the other. Each image is predicted again on its own, and once more after
its pixels are rounded to 8 bits, which the attacks were not asked to survive.

The time is that of `minimum_norm` on a batch of photographs, after compilation, divided by that of
as many evaluations of the network's value and gradient on the same batch.
"""

import dataclasses
import textwrap
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int
from matplotlib.figure import Figure

from advjax import attacks, data, metrics, plots
from experiments.common import foolbox_peers, markdown, networks, paper
from experiments.common.claims import Claim, verdict
from experiments.common.measure import Arrays, Content, Row
from experiments.common.options import PhotographOptions, trial
from experiments.common.photographs import OSTRICH, Subjects, load_network, load_subjects
from experiments.common.timing import gradients, seconds_of, vmapped
from experiments.common.victims import Victims, attack_victims

SHOWN = 6
START_STEPS = 30
PEER_IMAGES = 6
PEER_STEPS = 300
STARTED = "`minimum_norm`, decoupled start"
IMAGE = "`minimum_norm`"
PAPERS = "`lbfgs`"
COUNTS = {"success": "success", "alone": "predicted alone", "rounded": "rounded to 8 bits"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(PhotographOptions):
    """Turns photographs into ostriches by each attack."""

    evals: int = 150
    """The maximum number of network evaluations per photograph for `minimum_norm`."""
    lbfgs_evals: int = 500
    """The same for the paper's attack, which needs more to reach the target."""
    no_peers: bool = False
    """Do not run foolbox's DDN and Carlini-Wagner on some of the photographs."""
    TRIAL = trial(evals=20, lbfgs_evals=20)

    def load(self) -> Subjects:
        """Load the network and the photographs; two small ones in a trial."""
        network = load_network()
        if not self.no_peers:
            foolbox_peers.require("foolbox")
        count, stride = (2, 4) if self.quick else (None, 1)
        return load_subjects(network, self.folder, count=count, stride=stride)


def measure(options: Options, subjects: Subjects, seed: int) -> Row:
    """Run each attack, and time the evaluations alone."""
    network, dataset, chosen = subjects
    start = attacks.decoupled(num_steps=min(START_STEPS, options.evals // 2))
    search: dict[str, Any] = {"rough": True, "max_evals": options.evals}
    ways = {
        STARTED: attacks.minimum_norm(network.logits_fn, start=start, **search),
        IMAGE: attacks.minimum_norm(network.logits_fn, **search),
        PAPERS: attacks.lbfgs(network.logits_fn, max_evals=options.lbfgs_evals),
    }
    found = {name: attack_victims(way, chosen, name) for name, way in ways.items()}
    rows = [
        {
            "attack": name,
            "distortion": result.distortion.tolist(),
            "success": [bool(x) for x in result.success],
            "alone": _ostriches(network, result.x_adv),
            "rounded": _ostriches(network, np.round(255 * result.x_adv) / np.float32(255)),
            "evals": float(result.num_evals.mean()),
        }
        for name, result in found.items()
    ]
    few, evals, steps = (1, 3, 12) if options.quick else (PEER_IMAGES, 30, PEER_STEPS)
    return {
        "rows": rows,
        "indices": chosen.indices.tolist(),
        "photographs": len(dataset.labels),
        "overhead": _overhead(network, chosen.first(few), evals),
        "peers": [] if options.no_peers else _peers(network, chosen.first(few), steps),
        "clean": chosen.images[:SHOWN],
        "names": _short_names(chosen.labels[:SHOWN]),
        "adversarial": found[STARTED].x_adv[:SHOWN],
    }


def _ostriches(network: networks.Network, images: Any) -> list[bool]:
    """Which images the network takes for ostriches, each predicted on its own."""
    return [int(_predict(network.logits_fn, jnp.asarray(x))) == OSTRICH for x in images]


@jax.jit
def _predict(logits_fn: jax.tree_util.Partial, image: Array) -> Array:
    return logits_fn(image).argmax()


def _overhead(network: networks.Network, chosen: Victims, evals: int) -> float:
    """The time of `minimum_norm` on a batch over that of as many network evaluations."""
    xs, targets = jnp.asarray(chosen.images), jnp.asarray(chosen.targets)

    given = network.logits_fn, xs, targets
    attack = vmapped(attacks.minimum_norm(network.logits_fn, rough=True, max_evals=evals))
    # Both are compiled before; a batch takes as many evaluations as its slowest image.
    spent = int(attack(xs, targets).num_evals.max())
    seconds_of(gradients, *given)
    # In turns, so that other load on the machine affects both.
    ratios = [
        seconds_of(attack, xs, targets) / sum(seconds_of(gradients, *given) for _ in range(spent))
        for _ in range(1 if evals < 10 else 3)
    ]
    return float(np.median(ratios))


def _peers(network: networks.Network, chosen: Victims, steps: int) -> list[Row]:
    """Run foolbox's attacks, and ours with a third of the gradients of DDN."""
    third = steps // 3
    start = attacks.decoupled(num_steps=min(START_STEPS, third // 2))
    ours = attacks.minimum_norm(network.logits_fn, rough=True, max_evals=third, start=start)
    found = attack_victims(ours, chosen)
    outcomes: dict[str, tuple[Any, Any, Any]] = {
        STARTED: (found.x_adv, found.success, found.num_evals)
    }
    for way in foolbox_peers.short_ways(
        network.logits_fn, chosen.images, chosen.targets, steps=steps
    ):
        outcomes[way.name] = way.run()[:3]
    return [
        {
            "attack": name,
            "distortion": np.array(jax.vmap(metrics.distortion)(chosen.images, x_adv)).tolist(),
            "success": [bool(x) for x in success],
            "evals": float(np.mean(evals)),
        }
        for name, (x_adv, success, evals) in outcomes.items()
    ]


def _short_names(labels: Int[np.ndarray, " n"]) -> np.ndarray:
    """Short names of classes."""
    names = data.imagenet_names()
    return np.array([textwrap.shorten(names[i], 16, placeholder=" …") for i in labels])


def draw(content: Content, arrays: Arrays) -> dict[str, Figure]:
    """Photographs, the differences magnified ten times, and the adversarial images."""
    del content
    figure = plots.adversarial_grid(
        arrays["clean"],
        arrays["adversarial"],
        labels=arrays["names"],
        magnify=10,
    )
    return {"figure5.png": figure}


# --- words -----------------------------------------------------------------------------------


def describe(content: Content) -> str:
    """The results of each attack, of the two starts, and of the peers on some photographs."""
    (run,) = content["runs"]
    rows = {row["attack"]: row for row in run["rows"]}
    table = markdown.table(
        [
            ("attack", name),
            *_distortions(row),
            *((heading, f"{sum(row[key])} of {len(row[key])}") for key, heading in COUNTS.items()),
            ("gradients", f"{row['evals']:.0f}"),
        ]
        for name, row in rows.items()
    )
    started, image = (np.array(rows[name]["distortion"]) for name in (STARTED, IMAGE))
    nearer = np.maximum(started, image) / np.minimum(started, image) - 1
    parts = [
        f"{len(run['indices'])} of {run['photographs']} photographs are right and not ostriches.",
        table,
        f"The decoupled start ends nearer on {sum(started < image)} of {len(started)}; spread: "
        f"{markdown.percent(float(nearer.mean()), 1)} on average, "
        f"{markdown.percent(float(nearer.max()), 1)} at most. `minimum_norm` takes "
        f"{run['overhead']:.2f} times as long as its evaluations of the network alone.",
    ]
    if run["peers"]:
        compared = markdown.table(
            [
                ("attack", row["attack"]),
                *_distortions(row),
                ("gradients", f"{row['evals']:.0f}"),
            ]
            for row in run["peers"]
        )
        few = len(run["peers"][0]["distortion"])
        parts.append(f"On {few} of them, with fewer evaluations, beside foolbox's:\n\n{compared}")
    parts.append("![Photographs that become ostriches](figure5.png)")
    return "\n\n".join(parts)


def _distortions(row: Row) -> Iterator[tuple[str, str]]:
    for heading, reduce in (("mean distortion", np.mean), ("least", np.min), ("largest", np.max)):
        yield heading, f"{reduce(row['distortion']):.6f}"


def claims(content: Content) -> list[Claim]:
    """Photographs become ostriches through distortions that are hard to see."""
    (run,) = content["runs"]
    parts = [
        f"{row['attack']}: {sum(row['alone'])} of {len(row['alone'])}, "
        f"mean distortion {np.mean(row['distortion']):.6f}"
        for row in run["rows"]
    ]
    return [
        Claim(
            "A large network takes photographs with hardly visible distortions for ostriches",
            f"Figure 5: AlexNet, mean distortion {paper.FIGURE5_DISTORTION}",
            "EfficientNet-Lite0: " + "; ".join(parts),
            verdict(
                all(row["alone"]) and max(row["distortion"]) < paper.FIGURE5_DISTORTION
                for row in run["rows"]
            ),
        )
    ]
