"""Random programs: no bound is below a difference quotient that the program has.

The oracle knows nothing of the bounds. It evaluates the program in exact arithmetic (float64, no
rounding of casts), climbs to points of the region where the Jacobian is large, and measures
difference quotients there, and between points that a bisection has brought close, which finds
jumps. Each quotient is of two points of the region, and so at most the constant that is bounded.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from advjax import lipschitz
from tests import programs
from tests.programs import Steps

SLACK = 1e-6  # relative, for the rounding of the oracle
FEW, MANY = range(12), range(12, 332)

METHODS = {
    "product": lipschitz.product,
    "eclipse": lipschitz.eclipse,
    "lipsdp": functools.partial(lipschitz.lipsdp, num_steps=8),
}


class Case(NamedTuple):
    """A program, its example inputs, and where it is bounded."""

    steps: Steps
    examples: tuple[np.ndarray, ...]
    box: tuple[Any, Any] | None
    radius: np.float32 | None

    @property
    def is_double(self) -> bool:
        """Whether it is a program in float64."""
        return self.examples[0].dtype == np.float64


# What is drawn from a seed


def draw_case(seed: int) -> Case:
    """Mostly short programs, of which the bounds are tight, and every third one hostile."""
    rng = np.random.default_rng(seed)
    groups = [GROUPS[i] for i in rng.choice(len(GROUPS), rng.integers(1, 5), p=WEIGHTS)]
    if rng.random() < 0.4:
        hostile = [programs.JUMPS, programs.PRODUCTS, programs.PRODUCTS][rng.integers(3)]
        groups.insert(rng.integers(len(groups) + 1), hostile)
    if rng.random() < 1 / 3:
        groups += [["ravel"], ["dense", "two_layers"]]
    shape = [(4,), (6,), (3, 2), (4, 3), (2, 3, 2), ()][rng.choice(6, p=[0.2] * 4 + [0.1] * 2)]
    shapes = [shape] if rng.random() < 0.8 else [shape, (3,)]
    dtype = [np.float32, jnp.bfloat16, np.float64][rng.choice(3, p=[0.8, 0.1, 0.1])]
    examples = tuple(rng.normal(size=shape).astype(dtype) for shape in shapes)
    like = jax.ShapeDtypeStruct(shape, dtype)
    with jax.enable_x64(dtype == np.float64):
        steps = programs.random_program(rng, groups, like)
    return draw_region(rng, Case(steps, examples, None, None))


GROUPS = [
    programs.LAYERS,
    programs.ACTIVATIONS,
    programs.LINEAR,
    programs.STRUCTURES,
    programs.SMOOTH,
    programs.CASTS,
]
WEIGHTS = np.array([5, 4, 3, 4, 1, 1]) / 18


def draw_region(rng: np.random.Generator, case: Case) -> Case:
    """A box and a radius, or one of them, or none; the examples may be outside of the box."""
    has_box, has_radius = rng.random(2) < 0.6
    if has_box:
        low, high = (float(end) for end in rng.choice([(0, 1), (-1, 1), (-3, 3), (0.4, 0.5)]))
        box: tuple[Any, Any] = (low, high)
        if len(case.examples) == 1 and rng.random() < 0.5:  # for each entry, some of them points
            lower = rng.normal(size=case.examples[0].shape)
            upper = lower + rng.exponential(size=lower.shape) * (rng.random(lower.shape) < 0.8)
            box = tuple(np.asarray(end, case.examples[0].dtype) for end in (lower, upper))
        if rng.random() < 0.7:
            inside = (np.clip(x, *box).astype(x.dtype) for x in case.examples)
            case = case._replace(examples=tuple(inside))
        case = case._replace(box=box)
    if has_radius:
        radius = rng.choice([0.05, 0.5, 3.0, 1e-3, 0.0], p=[0.3, 0.3, 0.3, 0.05, 0.05])
        region = region_of(case)
        if rng.random() < 0.9:
            radius += np.linalg.norm(region.middle - region.centre)
        case = case._replace(radius=np.float32(radius))
    return case


def function(case: Case, arithmetic: programs.Arithmetic) -> Callable:
    """The program, as a function of its inputs."""
    like = jax.ShapeDtypeStruct(case.examples[0].shape, case.examples[0].dtype)
    with jax.enable_x64(case.is_double):
        body = programs.realise(case.steps, like, arithmetic)

    def program(x, *others):
        out = body(x)
        return (out, *(jnp.abs(other) / 2 + jnp.mean(out) for other in others))

    return program


def as_vector(fn: Callable) -> Callable:
    return lambda *inputs: jnp.concatenate([jnp.ravel(leaf) for leaf in fn(*inputs)])


# The oracle


class Region(NamedTuple):
    """The points of a box that are within a radius of a centre, and one of them, if any."""

    lower: np.ndarray
    upper: np.ndarray
    centre: np.ndarray
    radius: float

    @property
    def middle(self) -> np.ndarray:
        return np.clip(self.centre, self.lower, self.upper)

    @property
    def is_empty(self) -> bool:
        return bool(np.linalg.norm(self.middle - self.centre) > self.radius)

    @property
    def widths(self) -> np.ndarray:
        return np.minimum(self.upper - self.lower, 2 * self.radius)

    def project(self, points: np.ndarray) -> np.ndarray:
        """Points of the region: clipped to the box, and then drawn to the middle."""
        middle = self.middle
        points = np.clip(points, self.lower, self.upper)
        if not np.isfinite(self.radius):
            return points
        # The largest t with |middle + t step - centre| <= radius, for which the root is stable.
        step, offset = points - middle, middle - self.centre
        a, b = np.sum(step**2, -1), step @ offset
        c = np.maximum(self.radius**2 * (1 - 1e-12) - offset @ offset, 0)
        t = c / np.maximum(b + np.sqrt(b**2 + a * c), 1e-300)
        return middle + np.clip(t, 0, 1)[:, None] * step


def region_of(case: Case) -> Region:
    centre = np.concatenate([np.ravel(x).astype(np.float64) for x in case.examples])
    lower, upper = (-np.inf, np.inf) if case.box is None else case.box
    # The bounds are numbers of the inputs' dtype.
    dtype = case.examples[0].dtype
    lower, upper = (
        np.broadcast_to(np.ravel(np.asarray(end).astype(dtype)), centre.shape).astype(np.float64)
        for end in (lower, upper)
    )
    return Region(lower, upper, centre, np.inf if case.radius is None else float(case.radius))


def sample(rng: np.random.Generator, region: Region, count: int) -> np.ndarray:
    """Points of a region, many of them near its corners; if it has no end, of all magnitudes."""
    size = region.centre.size
    points = rng.normal(size=(count, size))
    points[::2] = np.sign(points[::2])
    magnitudes = 10 ** rng.choice([-20.0, -3, -1, 0, 0, 0, 0.5, 1, 3, 20], size=(count, 1))
    width = np.where(np.isfinite(region.widths), region.widths, magnitudes)
    centre = np.clip(0, region.lower, region.upper)
    if np.isfinite(region.radius):
        centre = region.middle
    elif np.isfinite(region.widths).all():
        centre = region.lower + region.widths / 2
    points = np.where(rng.integers(4, size=(count, 1)), 0.999 * points * width / 2, points * width)
    return region.project(centre + points)


def quotients(fn: Callable, xs: np.ndarray, ys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Between pairs of points: `|f(x) - f(y)| / |x - y|`, and the same for each two outputs."""
    fx, fy, distance = fn(xs), fn(ys), np.linalg.norm(xs - ys, axis=1)
    apart = distance > 0
    fx, fy, distance = fx[apart], fy[apart], distance[apart]
    # What rounding in float64 may have added to a difference.
    noise = 1e-13 * np.maximum(np.abs(fx), np.abs(fy)).max(1, initial=0)
    differences = fx - fy
    lengths = np.linalg.norm(differences, axis=1)
    pairs = np.abs(differences[:, :, None] - differences[:, None, :])
    single = np.maximum(lengths - noise, 0) / distance
    double = np.maximum(pairs - noise[:, None, None], 0) / distance[:, None, None]
    finite = np.isfinite(single)
    return single[finite], double[finite]


def jacobian_of(fn: Callable) -> Callable:
    """Forward mode, whatever the output depends on."""

    def jacobian(x):
        def push(tangent):
            return jax.jvp(fn, (x,), (tangent,))[1]

        return jax.vmap(push, out_axes=1)(jnp.eye(x.size))

    return jacobian


def exact(case: Case) -> Callable:
    """The program in exact arithmetic, of all inputs as one vector."""
    fn = as_vector(function(case, programs.EXACT))
    ends = np.cumsum([x.size for x in case.examples])[:-1]

    def flat(point):
        parts = jnp.split(point, ends)
        return fn(*(p.reshape(x.shape) for p, x in zip(parts, case.examples, strict=True)))

    return flat


def steepest(case: Case, seed: int = 0, count: int = 64) -> tuple[float, np.ndarray]:
    """The largest quotients that are found: of all outputs, and of each two."""
    region, rng = region_of(case), np.random.default_rng(seed)
    if region.is_empty:
        return 0.0, np.zeros(())
    fn = exact(case)
    evaluate, jacobian = jax.jit(jax.vmap(fn)), jax.jit(jax.vmap(jacobian_of(fn)))

    def values(points):
        return np.asarray(evaluate(points))

    def slopes(points):
        """The norms of Jacobians, for the entries that are free to move, and directions."""
        matrices = np.asarray(jacobian(points)) * (region.widths > 0)
        finite = np.isfinite(matrices).all((1, 2), keepdims=True)
        _, norms, directions = np.linalg.svd(np.where(finite, matrices, 0))
        return norms.max(1, initial=0), directions[:, 0]

    with jax.enable_x64(True), np.errstate(all="ignore"):
        pairs = [
            *across(region, *climb(slopes, region, rng, count)),
            *bisected(values, region, rng, count),
        ]
        results = [quotients(values, xs, ys) for xs, ys in pairs]
    single = max((s.max(initial=0) for s, _ in results), default=0.0)
    return float(single), np.max([d.max(0, initial=0) for _, d in results], axis=0)


def climb(slopes: Callable, region: Region, rng: np.random.Generator, count: int):
    """Points of large Jacobians, and the directions in which these are steepest."""
    points = sample(rng, region, count)
    found, directions = slopes(points)
    for _ in range(8):
        best = points[rng.permutation(np.argsort(-found)[: count // 2].repeat(2))]
        size = 10 ** rng.uniform(-4, 0, (count, 1)) * magnitudes(region, points)
        moved = region.project(best + size * rng.normal(size=points.shape))
        higher, turned = slopes(moved)
        order = np.argsort(-np.concatenate([found, higher]))[:count]
        points = np.concatenate([points, moved])[order]
        directions = np.concatenate([directions, turned])[order]
        found = np.concatenate([found, higher])[order]
    return points, directions


def magnitudes(region: Region, points: np.ndarray) -> np.ndarray:
    """How far points may move: by the widths of the region, or by their own length."""
    lengths = np.linalg.norm(points, axis=1, keepdims=True)
    return np.where(np.isfinite(region.widths), region.widths, lengths)


def across(region: Region, points: np.ndarray, directions: np.ndarray):
    """Pairs of points in steep directions, at several distances, at the border and inside."""
    scale = magnitudes(region, points).max(1, keepdims=True)
    for size in (1e-6, 1e-4, 1e-2, 1):
        step = size * scale * directions / 2
        inner = region.middle + (points - region.middle) * (1 - min(size, 0.5))
        for x in (points, inner):
            yield region.project(x - step), region.project(x + step)


def bisected(values: Callable, region: Region, rng: np.random.Generator, count: int):
    """Pairs of points, ever closer: of two halves of a segment one is as steep as the whole."""
    xs, ys = sample(rng, region, count), rng.permutation(sample(rng, region, count))
    for _ in range(20):
        yield xs, ys
        middle = (xs + ys) / 2
        fx, fm, fy = values(xs), values(middle), values(ys)
        left = np.linalg.norm(fx - fm, axis=1) > np.linalg.norm(fy - fm, axis=1)
        xs, ys = np.where(left[:, None], xs, middle), np.where(left[:, None], middle, ys)
    yield xs, ys


def nearest_change(case: Case, label: int, seed: int = 0) -> float:
    """How near to the example another class was found, in the box, on lines towards each."""
    region, rng, fn = region_of(case), np.random.default_rng(seed), exact(case)
    evaluate, jacobian = jax.jit(jax.vmap(fn)), jax.jit(jax.vmap(jacobian_of(fn)))
    box = region._replace(radius=np.inf)
    x = region.centre
    with jax.enable_x64(True), np.errstate(all="ignore"):
        starts = box.project(x + rng.normal(size=(16, 1)) ** 3 * rng.normal(size=(16, x.size)))
        rows = np.asarray(jacobian(np.concatenate([x[None], starts])))
        towards = (rows - rows[:, [label]]).reshape(-1, x.size)
        towards = np.concatenate([towards, -towards, rng.normal(size=(32, x.size))])
        towards /= np.linalg.norm(towards, axis=1, keepdims=True)
        towards = towards[np.isfinite(towards).all(1)]
        distances = np.geomspace(1e-6, 1e3, 200)
        points = box.project((x + distances[:, None, None] * towards).reshape(-1, x.size))
        changed = np.argmax(np.asarray(evaluate(points)), axis=1) != label
    return float(np.min(np.linalg.norm(points - x, axis=1), initial=np.inf, where=changed))


# What is held against it


class Verdict(NamedTuple):
    """What became of a case: the bounds that were found, and what is wrong with them."""

    truth: float
    bounds: dict[str, float]
    faults: list[str]


def bounds_of(case: Case, ways: list[str]):
    """The bounds of a program by each way: a number, a matrix of pairs, or an error."""
    for way in ways:
        with jax.enable_x64(case.is_double):
            try:
                yield way, np.asarray(bound_of(case, way), np.float64)
            except Exception as error:
                yield way, error


def bound_of(case: Case, way: str) -> jax.Array:
    kind, _, method = way.partition(" ")
    fn = function(case, programs.WRITTEN)
    examples = [jnp.asarray(x) for x in case.examples]
    options = {"box": case.box, "radius": case.radius}
    if kind == "pairwise":
        vector = as_vector(fn)
        return lipschitz.pairwise(vector, *examples, method=METHODS[method], **options).constant
    if kind != "traced":
        return lipschitz.bound(fn, *examples, method=METHODS.get(kind), **options).constant

    @jax.jit
    def traced(one, arguments):
        examples, options = arguments
        fn = function(case, programs.traced(one))
        return lipschitz.bound(fn, *examples, **options).constant

    return traced(jnp.ones(()), (examples, options))


WAYS = ["default", "product", "eclipse", "lipsdp", "traced", "pairwise eclipse", "pairwise lipsdp"]


def judge(case: Case, ways: list[str]) -> Verdict:
    """Bound a program in some ways and compare with what it does."""
    truth, pairs = steepest(case)
    bounds, faults = {}, []
    for way, found in bounds_of(case, ways):
        if isinstance(found, lipschitz.NotLipschitzError):
            continue
        if isinstance(found, Exception):
            faults.append(f"{way}: {type(found).__name__}: {str(found)[:300]}")
            continue
        bounds[way] = float(found.max(initial=0))
        limit = (pairs if found.ndim else truth) * (1 - SLACK)
        if np.isnan(found).any() or (found < limit).any():
            worst = np.max(pairs) if found.ndim else truth
            faults.append(f"{way}: bound {bounds[way]:.9g}, truth {worst:.9g}")
    return Verdict(truth, bounds, faults)


def shortened(case: Case, ways: list[str]) -> Case:
    """The same fault, with as few steps as may be."""
    for at in range(len(case.steps)):
        shorter = case._replace(steps=case.steps[:at] + case.steps[at + 1 :])
        if judge(shorter, ways).faults:
            return shortened(shorter, ways)
    return case


def report(seed: int, case: Case, faults: list[str]) -> str:
    with jax.enable_x64(case.is_double):
        jaxpr = jax.make_jaxpr(function(case, programs.WRITTEN))(*case.examples)
    return "\n".join(
        [
            *(f"seed {seed}", *faults, *map(str, case.steps), str(jaxpr)),
            *(f"box {case.box}", f"radius {case.radius}", f"examples {case.examples}"),
        ]
    )


def ways_of(seed: int) -> list[str]:
    """The default, and two of the others, which take turns."""
    others = WAYS[1:]
    return ["default", others[seed % len(others)], others[(seed // 2 + 3) % len(others)]]


@functools.cache
def verdict(seed: int) -> Verdict:
    return judge(draw_case(seed), ways_of(seed))


def check(seed: int):
    faults = verdict(seed).faults
    if seed % 25 == 24:
        jax.clear_caches()  # compiled programs keep memory maps, of which there are so many only
    if faults:
        ways = [fault.split(":")[0] for fault in faults]
        shorter = shortened(draw_case(seed), ways)
        faults = judge(shorter, ways).faults
        raise AssertionError(report(seed, shorter, faults))


@pytest.mark.parametrize("seed", FEW)
def test_no_bound_is_below_the_truth(seed):
    check(seed)


@pytest.mark.slow
@pytest.mark.parametrize("seed", MANY)
def test_no_bound_of_many_programs_is_below_the_truth(seed):
    check(seed)


def test_the_programs_are_worth_bounding():
    bounded = [verdict(seed) for seed in FEW if verdict(seed).bounds]
    assert len(bounded) >= len(FEW) / 2
    assert sum(found.truth > 0.3 * found.bounds["default"] for found in bounded) >= len(FEW) / 4


@pytest.mark.parametrize("seed", range(2))
def test_the_oracle_finds_the_norm_of_a_matrix_and_a_jump(seed):
    case = draw_case(seed)._replace(
        examples=(np.zeros(6, np.float32),), box=(-1, 1), radius=np.float32(0.3)
    )
    dense, jump = programs.Step("square_dense", seed), programs.Step("comparison", seed)
    kernel = np.asarray(
        jax.jacobian(function(case._replace(steps=(dense,)), programs.EXACT))(jnp.zeros(6))[0],
        np.float64,
    )
    truth, _ = steepest(case._replace(steps=(dense,)))
    assert truth == pytest.approx(np.linalg.norm(kernel, 2), rel=1e-5)
    assert steepest(case._replace(steps=(jump,)))[0] > 1e4


def check_certificate(seed: int):
    """The class in exact arithmetic changes nowhere within the certified radius."""
    case = draw_case(seed)
    region = region_of(case)
    logits_steps = (programs.Step("ravel", seed), programs.Step("dense_logits", seed))
    steps = (step for step in case.steps if step.name not in programs.CASTS)
    case = case._replace(
        steps=(*steps, *logits_steps), examples=tuple(x.astype(np.float32) for x in case.examples)
    )
    fn = as_vector(function(case, programs.WRITTEN))
    logits = fn(*case.examples)
    label = int(jnp.argmax(logits))
    options = {"box": case.box, "radius": case.radius}
    for bound in (lipschitz.bound, functools.partial(lipschitz.pairwise, method=lipschitz.eclipse)):
        try:
            found = bound(fn, *map(jnp.asarray, case.examples), **options)
        except lipschitz.NotLipschitzError:
            return
        radius = float(lipschitz.certified_radius(logits, label, found))
        inside = (region.middle == region.centre).all()
        assert inside or case.radius is None or radius == 0
        if inside:
            assert radius <= nearest_change(case, label) * (1 + SLACK), report(seed, case, [])


@pytest.mark.parametrize("seed", range(4))
def test_no_certificate_is_exceeded(seed):
    check_certificate(seed)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4, 104))
def test_no_certificate_of_many_programs_is_exceeded(seed):
    check_certificate(seed)
