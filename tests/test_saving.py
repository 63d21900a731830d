"""Images go to disk as PNG files and come back as the same arrays, or one error says why not."""

import sys

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from advjax import attacks, data

Image = pytest.importorskip("PIL.Image")


def random_bytes(shape, seed=0):
    return np.random.default_rng(seed).integers(256, size=shape).astype(np.uint8)


def grid(codes, box=(0.0, 1.0)):
    lower, upper = (np.asarray(bound, np.float32) for bound in box)
    return lower + (upper - lower) * (codes / np.float32(255))


def read_back(folder, channels):
    return data.load_photographs(folder=folder, size=None, channels=channels).images


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("shape", [(5, 4, 4), (3, 1, 1), (2, 7, 3), (1, 28, 28), (12, 2, 5)])
def test_every_value_comes_back_bit_for_bit(tmp_path, shape, channels):
    images = grid(random_bytes((*shape, channels)))
    paths = data.save_images(tmp_path / "new" / "folder", images)
    assert [path.name for path in paths] == [f"{i:04}.png" for i in range(len(images))]
    again = read_back(tmp_path / "new" / "folder", channels)
    assert again.dtype == np.float32
    np.testing.assert_array_equal(again, images)


@pytest.mark.parametrize("channels", [1, 3])
def test_all_256_values_survive(tmp_path, channels):
    codes = np.repeat(np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1), channels, axis=3)
    (path,) = data.save_images(tmp_path, grid(codes))
    np.testing.assert_array_equal(read_back(tmp_path, channels), grid(codes))
    with Image.open(path) as image:  # as any other program reads it
        assert image.format == "PNG"
        assert image.mode == {1: "L", 3: "RGB"}[channels]
        np.testing.assert_array_equal(np.asarray(image).reshape(codes.shape[1:]), codes[0])


def test_the_names_are_as_long_as_it_takes_to_keep_the_order(tmp_path, monkeypatch):
    monkeypatch.setattr(data.saving, "_DIGITS", 1)
    codes = np.arange(12, dtype=np.uint8).reshape(12, 1, 1, 1)
    paths = data.save_images(tmp_path, grid(codes))
    assert [path.name for path in paths[-3:]] == ["09.png", "10.png", "11.png"]
    np.testing.assert_array_equal(read_back(tmp_path, 1), grid(codes))


@pytest.mark.parametrize("box", [(0.0, 255.0), (-1.0, 1.0), (0.0, np.float32([1.0, 2.0, 3.0]))])
def test_the_box_says_what_black_and_white_are(tmp_path, box):
    codes = random_bytes((2, 3, 4, 3))
    data.save_images(tmp_path, grid(codes, box), box=box)
    np.testing.assert_array_equal(read_back(tmp_path, 3), grid(codes))


@pytest.mark.parametrize("levels", [2, 4, 6, 16, 18, 52, 86, 256])
def test_grids_of_fewer_levels_are_on_that_of_256(tmp_path, levels):
    places = random_bytes((2, 3, 4, 1)).astype(int) % levels
    images = places.astype(np.float32) / np.float32(levels - 1)
    data.save_images(tmp_path, images)
    np.testing.assert_array_equal(read_back(tmp_path, 1), images)


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16, np.float64])
def test_other_precisions_are_written_as_the_values_that_they_round(tmp_path, dtype):
    codes = random_bytes((2, 3, 4, 1))
    data.save_images(tmp_path, grid(codes).astype(dtype))
    np.testing.assert_array_equal(read_back(tmp_path, 1), grid(codes))


def test_arrays_of_jax_and_values_that_are_off_by_a_rounding_are_taken(tmp_path):
    codes = random_bytes((2, 3, 4, 1))
    data.save_images(tmp_path, jnp.asarray(codes) * (1 / np.float32(255)))
    np.testing.assert_array_equal(read_back(tmp_path, 1), grid(codes))


def test_what_is_off_the_grid_is_refused_and_nothing_is_written(tmp_path):
    images = grid(random_bytes((3, 4, 4, 1)))
    images[1, 2, 2, 0] = 0.5
    with pytest.raises(ValueError, match=r"1 of the 16 values of image 1 .*quantized.*round_pix"):
        data.save_images(tmp_path, images)
    assert not list(tmp_path.iterdir())


def test_told_to_round_it_writes_the_nearest_value(tmp_path):
    images = np.random.default_rng(0).uniform(size=(3, 4, 4, 3)).astype(np.float32)
    data.save_images(tmp_path, images, round_pixels=True)
    np.testing.assert_array_equal(read_back(tmp_path, 3), np.rint(255 * images) / np.float32(255))


@pytest.mark.parametrize("round_pixels", [False, True])
@pytest.mark.parametrize(
    ("value", "message"),
    [
        (1.2, r"image 1 has values in \[0, 1.2\], expected the box \[0, 1\].*box="),
        (-0.1, r"image 1 has values in \[-0.1, "),
        (255.0, r"\[0, 255\], expected the box \[0, 1\]"),
        (np.nan, "image 1 has values in"),
        (np.inf, "image 1 has values in"),
    ],
)
def test_what_would_be_clipped_is_refused(tmp_path, value, message, round_pixels):
    images = grid(np.zeros((2, 4, 4, 1), np.uint8))
    images[1, 0, 0, 0] = value
    with pytest.raises(ValueError, match=message):
        data.save_images(tmp_path, images, round_pixels=round_pixels)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("shape", [(4, 4, 1), (2, 4, 4), (2, 4, 4, 2), (2, 4, 4, 4), (2, 0, 4, 1)])
def test_arrays_of_other_shapes_are_refused(tmp_path, shape):
    with pytest.raises(ValueError, match=r"images: shape .*expected \(n, height, width, chan"):
        data.save_images(tmp_path, np.zeros(shape, np.float32))


def test_bytes_and_empty_boxes_are_refused(tmp_path):
    with pytest.raises(TypeError, match=r"images: dtype uint8.*images / 255"):
        data.save_images(tmp_path, np.zeros((1, 4, 4, 1), np.uint8))
    for box in ((1.0, 0.0), (0.0, np.inf), (np.nan, 1.0)):
        with pytest.raises(ValueError, match="box: "):
            data.save_images(tmp_path, np.zeros((1, 4, 4, 1), np.float32), box=box)


def test_a_directory_with_other_images_is_refused_but_one_s_own_are_replaced(tmp_path):
    first, second = grid(random_bytes((3, 4, 4, 1))), grid(random_bytes((3, 4, 4, 1), seed=1))
    data.save_images(tmp_path, first)
    (tmp_path / "notes.txt").write_text("not an image")
    data.save_images(tmp_path, second)
    np.testing.assert_array_equal(read_back(tmp_path, 1), second)
    with pytest.raises(FileExistsError, match=r"other images, such as 0002\.png"):
        data.save_images(tmp_path, first[:2])
    np.testing.assert_array_equal(read_back(tmp_path, 1), second)


def test_without_pillow_the_message_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(ImportError, match=r'Pillow; pip install "advjax\[experiments\]"'):
        data.save_images(tmp_path, grid(random_bytes((1, 4, 4, 1))))


# Loading as it is stored


def test_images_of_different_sizes_need_a_size(tmp_path):
    for name, size in (("a.png", (3, 4)), ("b.png", (4, 3))):
        Image.new("RGB", size).save(tmp_path / name)
    with pytest.raises(ValueError, match=r"b\.png has 4 x 3 pixels, expected 3 x 4 .*pass a size"):
        data.load_photographs(folder=tmp_path, size=None)


def test_grey_images_are_loaded_in_colour_and_colours_in_grey(tmp_path):
    codes = random_bytes((2, 4, 4, 1))
    data.save_images(tmp_path, grid(codes))
    np.testing.assert_array_equal(read_back(tmp_path, 3), np.repeat(grid(codes), 3, axis=3))
    resized = data.load_photographs(folder=tmp_path, size=8, channels=1).images
    assert resized.shape == (2, 8, 8, 1)
    with pytest.raises(ValueError, match="channels: 2, expected 1 or 3"):
        data.load_photographs(folder=tmp_path, channels=2)


# Adversarial images


@pytest.mark.parametrize("shape", [(4, 4, 1), (3, 4, 3)])
def test_adversarial_images_stay_adversarial_on_disk(tmp_path, shape):
    keys = jax.random.split(jax.random.key(0), 2)
    kernel = jax.random.normal(keys[0], (np.prod(shape), 4))
    xs = jax.random.uniform(keys[1], (8, *shape))

    @jax.jit
    def logits_fn(x):
        return jnp.sin(2 * x.ravel()) @ kernel

    targets = (jax.vmap(logits_fn)(xs).argmax(1) + 1) % 4
    search = attacks.minimum_norm(logits_fn)
    with pytest.raises(ValueError, match=r"attacks\.quantized"):
        data.save_images(tmp_path, jax.vmap(search)(xs, targets).x_adv)
    result = jax.vmap(attacks.quantized(search))(xs, targets)
    data.save_images(tmp_path, result.x_adv)
    again = read_back(tmp_path, shape[-1])
    np.testing.assert_array_equal(again, result.x_adv)
    assert [int(logits_fn(x).argmax()) for x in again] == targets.tolist()
