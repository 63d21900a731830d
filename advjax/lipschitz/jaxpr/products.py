"""Dense layers and convolutions as a jaxpr writes them: products with constant kernels."""

import math
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from advjax.lipschitz.jaxpr.values import OWN_FUNCTION, NotLipschitzError, Operation, Signal


class Product(NamedTuple):
    """The dense layer `x @ kernel` of one example."""

    kernel: Float[Array, "in out"]

    @property
    def input_shape(self) -> tuple[int, ...]:
        """The shape of one input."""
        return self.kernel.shape[:1]

    @property
    def output_shape(self) -> tuple[int, ...]:
        """The shape of one output."""
        return self.kernel.shape[1:]


class Window(NamedTuple):
    """The convolution of one image with zero padding; the channels are last."""

    kernel: Float[Array, "*window in out"]
    input_shape: tuple[int, ...]
    output_shape: tuple[int, ...]
    strides: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    dilation: tuple[int, ...]
    groups: int


Layer = Product | Window


def product(op: Operation) -> Layer:
    """Return a product as one layer whose kernel has a leading axis, of layers side by side."""
    if op.name == "conv_general_dilated":
        window = convolution(op)
        return window._replace(kernel=window.kernel[None])
    return _dot_general(op)


def is_product(op: Operation) -> bool:
    """Whether an operation is a product."""
    return op.name in ("dot_general", "conv_general_dilated")


def _dot_general(op: Operation) -> Product:
    contract, batch = op.params["dimension_numbers"]
    side = 0 if isinstance(op.inputs[1], Signal) else 1
    kernel = _in_float32(op.inputs[side])
    contracted, batched = contract[side], batch[side]
    free = [a for a in range(kernel.ndim) if a not in (*contracted, *batched)]
    kernel = jnp.transpose(kernel, (*batched, *contracted, *free))
    rows = math.prod(kernel.shape[len(batched) : len(batched) + len(contracted)])
    blocks = math.prod(kernel.shape[: len(batched)])
    # Along axes that only the signal has, the product is repeated, which does not change the norm.
    kernel = kernel.reshape(blocks, rows, -1)
    if jnp.iscomplexobj(kernel):  # the real matrix that acts on real and imaginary parts
        upper = jnp.concatenate([kernel.real, kernel.imag], 2)
        lower = jnp.concatenate([-kernel.imag, kernel.real], 2)
        kernel = jnp.concatenate([upper, lower], 1)
    return Product(kernel)


def convolution(op: Operation) -> Window:
    """Return an operation as a convolution; NotLipschitzError if it is not linear in its input."""
    params = op.params
    signal = op.inputs[0]
    if isinstance(op.inputs[1], Signal):
        raise NotLipschitzError("the kernel depends on the input of the function", OWN_FUNCTION)
    if params["batch_group_count"] != 1:
        raise NotLipschitzError("batch_group_count is not supported", OWN_FUNCTION)
    lhs, rhs, out = params["dimension_numbers"]
    # Zeros between the pixels do not change the norm of the image.
    size = [
        max((signal.shape[axis] - 1) * d + 1, 0)
        for axis, d in zip(lhs[2:], params["lhs_dilation"], strict=True)
    ]
    return Window(
        kernel=jnp.transpose(_in_float32(op.inputs[1]), (*rhs[2:], rhs[1], rhs[0])),
        input_shape=(*size, signal.shape[lhs[1]]),
        output_shape=tuple(op.shape[axis] for axis in (*out[2:], out[1])),
        strides=tuple(params["window_strides"]),
        padding=tuple(params["padding"]),
        dilation=tuple(params["rhs_dilation"]),
        groups=params["feature_group_count"],
    )


def _in_float32(kernel: Any) -> Array:
    """A kernel in the precision that bounds are computed in: at least float32."""
    kernel = jnp.asarray(kernel)
    return kernel.astype(jnp.promote_types(kernel.dtype, jnp.float32))
