"""Sources of images: folders by class, and masks."""

import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from syncnorm.errors import ConfigError
from syncnorm.train.data.seeded import Seeded
from syncnorm.train.data.sources import SOURCES, check_source_options
from syncnorm.train.data.sources.files import Paths, is_held_out
from syncnorm.train.data.sources.folder import folder
from syncnorm.train.data.sources.masks import masks

from .files import inputs_of, noise, samples_of, targets_of, write_folder, write_image

PLAIN = {"mean": [0.0] * 3, "std": [1.0] * 3}


def names(split: str, **counts: int) -> list[str]:
    return [f"{split}{name}/{n}.png" for name, count in counts.items() for n in range(count)]


def test_images_by_class_in_folders_of_sets(tmp_path):
    write_folder(tmp_path, [*names("train/", cat=2, dog=3), *names("val/", dog=1)])
    write_image(tmp_path / "test/cat/deep/er/A.JPG", noise(1))
    (tmp_path / "train/cat/notes.txt").write_text("no image")
    (tmp_path / "train/.hidden").mkdir()
    splits = folder(tmp_path, size=8)
    assert splits.num_classes == 2
    assert splits.in_channels == 3
    assert targets_of(splits.train) == [0, 0, 1, 1, 1]
    assert targets_of(splits.validation) == [1]
    assert targets_of(splits.test) == [0]
    assert inputs_of(splits.train).shape == (5, 3, 8, 8)


def test_sets_may_have_capitals_and_what_is_left_out_is_told(tmp_path, caplog):
    """Else a test set is trained on, as a class of its own."""
    write_folder(tmp_path, [*names("Train/", cat=2, dog=3), *names("TEST/", dog=1)])
    write_folder(tmp_path, names("more/", cat=1))
    write_image(tmp_path / "Train/cat/9.gif", noise(1))
    (tmp_path / "Train/cat/8.HEIC").write_bytes(b"none of Pillow's")
    (tmp_path / "Train/Thumbs.db").write_bytes(b"what Windows leaves")
    splits = folder(tmp_path, size=8)
    assert targets_of(splits.train) == [0, 0, 0, 1, 1, 1]
    assert targets_of(splits.test) == [1]
    assert "data.root: more are no sets of" in caplog.text
    assert "1 .heic left out, of suffixes that are not read" in caplog.text
    (tmp_path / "train").mkdir()
    with pytest.raises(ConfigError, match="must hold one folder for train, got Train and train"):
        folder(tmp_path, size=8)


def test_a_class_may_have_the_name_of_a_set_with_a_capital(tmp_path):
    write_folder(
        tmp_path, [f"{name}/{n}.png" for name in ("Bus", "Car", "Train") for n in range(2)]
    )
    assert folder(tmp_path, size=8).classes == ["Bus", "Car", "Train"]


def test_pixels_are_standardised(tmp_path):
    pixels = noise(5, 8, 8)
    write_image(tmp_path / "a/1.png", pixels)
    expected = torch.from_numpy(pixels).permute(2, 0, 1) / 255
    assert torch.equal(folder(tmp_path, size=8, **PLAIN).train[0][0], expected)
    mean = torch.tensor([0.485, 0.456, 0.406])[:, None, None]
    std = torch.tensor([0.229, 0.224, 0.225])[:, None, None]
    assert torch.allclose(folder(tmp_path, size=8).train[0][0], (expected - mean) / std)
    grey = folder(tmp_path, size=8, channels=1).train[0][0]
    assert grey.shape == (1, 8, 8)


def test_the_middle_is_cut_out(tmp_path):
    pixels = np.zeros((4, 10, 3))
    pixels[:, 3:7] = 255
    write_image(tmp_path / "a/1.png", pixels)
    assert (folder(tmp_path, size=4, **PLAIN).train[0][0] == 1).all()


def test_random_crops_follow_from_seed_epoch_and_sample(tmp_path):
    write_folder(tmp_path, [*names("train/", cat=6), *names("test/", cat=6)])
    splits = folder(tmp_path, size=6, random_crop=True)
    train = Seeded(splits.train, 0)
    first, again, later = (
        torch.stack([train[i, epoch][0] for i in range(6)]) for epoch in (1, 1, 2)
    )
    assert torch.equal(first, again)
    assert not any(torch.equal(one, other) for one, other in zip(first, later, strict=True))
    assert torch.equal(inputs_of(splits.test), inputs_of(folder(tmp_path, size=6).test))


def test_a_test_set_is_cut_off_by_names_alone(tmp_path):
    write_folder(tmp_path, names("", cat=30, dog=30))
    splits = folder(tmp_path, size=4, test=0.3)
    assert splits.test is not None
    sizes = len(splits.train), len(splits.test)
    assert sum(sizes) == 60
    assert 8 <= sizes[1] <= 28
    held = {sample[0].numpy().tobytes() for sample in samples_of(splits.test)}
    write_folder(tmp_path, names("", eel=9))
    again = folder(tmp_path, size=4, test=0.3)
    assert held <= {sample[0].numpy().tobytes() for sample in samples_of(again.test)}
    assert folder(tmp_path, size=4).test is None


def test_links_are_followed_but_not_round_in_a_circle(tmp_path):
    write_folder(tmp_path / "there", names("more/", cat=2))
    write_folder(tmp_path / "here", [*names("", cat=2, dog=1)])
    (tmp_path / "here" / "cat" / "link").symlink_to(tmp_path / "there" / "more")
    (tmp_path / "here" / "eel").symlink_to(tmp_path / "there")
    assert len(folder(tmp_path / "here", size=4).train) == 2 + 2 + 1 + 2
    (tmp_path / "there" / "more" / "back").symlink_to(tmp_path / "here" / "cat")
    (tmp_path / "here" / "cat" / "again").symlink_to(tmp_path / "here" / "cat" / "link")
    splits = folder(tmp_path / "here", size=4)
    # Each folder of images counts once in a class.
    assert torch.bincount(torch.tensor(targets_of(splits.train))).tolist() == [4, 1, 4]


def test_a_share_is_about_as_large_as_asked_for():
    for share in (0.0, 0.1, 0.9):
        held = sum(is_held_out(f"{number}.png", share) for number in range(4000))
        assert abs(held - 4000 * share) <= 5 * (4000 * share * (1 - share)) ** 0.5


def test_paths_are_kept_as_they_are():
    some = ["a/1.png", "a/ü\udcff.png", "b/" + "x" * 200]
    paths = Paths(Path("/data"), some)
    assert list(paths) == [f"/data/{name}" for name in some]
    with pytest.raises(IndexError):
        paths[3]


def test_images_with_masks(tmp_path):
    for split in ("train", "test"):
        for number in range(3):
            write_image(tmp_path / split / "images" / f"{number}.jpg", noise(number, 6, 8))
            mask = np.full((6, 8), number)
            mask[0] = 255
            write_image(tmp_path / split / "masks" / f"{number}.png", mask)
    splits = masks(tmp_path, num_classes=3, size=4)
    assert splits.num_classes == 3
    assert splits.validation is None
    image, mask = splits.train[2]
    assert image.shape == (3, 4, 4)
    assert mask.dtype == torch.int64
    assert mask.tolist() == [[255] * 4, *([2] * 4 for _ in range(3))]


@pytest.mark.parametrize(
    ("values", "warns"), [((0, 255), True), ((255,), True), ((0, 1), False), ((0, 1, 255), False)]
)
def test_masks_of_one_class_and_none_are_told(tmp_path, caplog, values, warns):
    """Two classes are often written as 0 and 255, of which nothing is left to learn."""
    for split in ("train", "test"):
        for number in range(3):
            write_image(tmp_path / split / "images" / f"{number}.png", noise(number, 6, 8))
            mask = np.full((6, 8), values[0])
            mask[number:] = values[-1]
            mask[5] = values[len(values) // 2]
            write_image(tmp_path / split / "masks" / f"{number}.png", mask)
    masks(tmp_path, num_classes=2, size=4)
    assert ("nothing is left to tell apart" in caplog.text) == warns


def test_postscript_is_no_image(tmp_path, monkeypatch):
    """Pillow would have Ghostscript run it."""
    called = tmp_path / "called"
    script = tmp_path / "bin" / "gs"
    script.parent.mkdir()
    script.write_text(f"#!/bin/sh\ntouch {called}\necho 10.0\n")
    script.chmod(0o755)
    monkeypatch.setenv("PATH", str(script.parent), prepend=os.pathsep)
    program = "%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n(hi) print\n%%EOF\n"
    write_folder(tmp_path, names("train/", cat=2, dog=2))
    (tmp_path / "train/cat/0.png").write_text(program)
    with pytest.raises(ConfigError, match=r"train/cat/0.png: must be an image that can be read"):
        folder(tmp_path).train[0]
    assert not called.exists()


def test_an_image_is_mirrored_with_its_mask(tmp_path):
    left = np.zeros((4, 4, 3))
    left[:, :2] = 255
    for split in ("train", "test"):
        write_image(tmp_path / split / "images/1.png", left)
        write_image(tmp_path / split / "masks/1.png", left[:, :, 0] / 255)
    splits = masks(tmp_path, num_classes=2, size=4, flip=True, **PLAIN)
    train, test = Seeded(splits.train, 0), Seeded(splits.test, 0)
    columns = set()
    for epoch in range(1, 12):
        image, mask = train[0, epoch]
        assert torch.equal(image[0].long(), mask)
        columns.add(tuple(mask[0].tolist()))
    assert columns == {(1, 1, 0, 0), (0, 0, 1, 1)}
    assert all(torch.equal(test[0, epoch][1], test[0, 0][1]) for epoch in range(1, 12))


def break_off(path: Path) -> Path:
    path.write_bytes(path.read_bytes()[:60])
    return path


@pytest.mark.parametrize(
    ("present", "options", "named"),
    [
        ([], {}, "`data.root` must hold a folder of images for each class, got none in"),
        (["train/cat/1.txt"], {}, "must hold images of each class, got none of 'cat'"),
        (["cat/1.png", "dog/.1.png"], {}, "must hold images of each class, got none of 'dog'"),
        (["train/a/1.png", "val/b/1.png"], {}, "got 'b' in "),
        (["train/a/1.png", "test/a/1.txt"], {}, "must leave samples for test, got none"),
        (["train/a/1.png", "val/a/1.png", "valid/a/1.png"], {}, "got val and valid in"),
        (["train/a/1.png"], {"test": 0.1}, "`data.options.test` must be 0 where"),
        (["a/1.png"], {"test": 1e-9}, "must leave samples for test, got none"),
        (["a/1.png"], {"mean": [0.5]}, "`data.options.mean` must have 3 values"),
        (["a/1.png"], {"std": [0.5, 0.0, 1.0]}, "`data.options.std` must be greater than 0"),
        (["a/1.png"], {"size": 0}, "`data.options.size`: input should be greater than or equal"),
        (["a/1.png"], {"size": "8"}, "`data.options.size`: input should be a valid integer, got"),
        (["a/1.png"], {"channels": 4}, "`data.options.channels`: input should be 1 or 3, got 4"),
        (["a/1.png"], {"sizes": 8}, "got 'sizes'. The nearest is 'size'."),
    ],
)
def test_what_a_folder_lacks_is_named(tmp_path, present, options, named):
    for name in present:
        path = tmp_path / name
        write_image(path.with_suffix(".png"), noise(0)).rename(path)
    with pytest.raises(ConfigError) as caught:
        folder(tmp_path, **options)
    assert named in str(caught.value)


def test_a_root_that_is_not_there_is_named(tmp_path):
    for name, load in SOURCES.items():
        for root, got in ((None, "got null"), (tmp_path / "none", "none', which does not exist")):
            with pytest.raises(ConfigError, match=f"`data.root` .* data.name={name}, .*{got}"):
                load(root)


def test_an_image_that_cannot_be_read_is_named(tmp_path):
    broken = break_off(write_image(tmp_path / "a/1.png", noise(0)))
    with pytest.raises(ConfigError) as caught:
        folder(tmp_path).train[0]
    assert f"{broken}: must be an image that can be read, got" in str(caught.value)


def test_deep_images_are_refused_rather_than_cut_off(tmp_path):
    from PIL import Image

    (tmp_path / "a").mkdir()
    Image.fromarray(np.full((4, 4), 40_000, dtype=np.uint16)).save(tmp_path / "a/1.png")
    with pytest.raises(ConfigError, match="must have 8 bits for each channel, got mode I;16"):
        folder(tmp_path).train[0]


@pytest.mark.parametrize(
    ("mask", "named"),
    [
        (np.full((6, 8), 3), "must have classes from 0 to 2, or 255 for none, got 3 at 48 pixels"),
        (np.zeros((6, 7)), "must have the size of its image, (8, 6), got (7, 6)"),
        (np.zeros((6, 8, 3)), "in one channel, got mode RGB"),
    ],
)
def test_a_mask_that_does_not_fit_is_named(tmp_path, mask, named):
    write_image(tmp_path / "train/images/1.png", noise(0, 6, 8))
    path = write_image(tmp_path / "train/masks/1.png", mask)
    with pytest.raises(ConfigError) as caught:
        masks(tmp_path, num_classes=3).train[0]
    assert str(caught.value).startswith(f"{path}: ")
    assert named in str(caught.value)


@pytest.mark.parametrize(
    ("present", "named"),
    [
        (["images/1.png"], "must hold train/images and train/masks"),
        (["train/images/1.png"], "train/masks"),
        (["train/images/1.png", "train/masks/2.png"], "got '1' in only one of images and masks"),
        (["train/images/1.png", "train/images/1.jpg", "train/masks/1.png"], "got 1.jpg and 1.png"),
        (["train/images/1.txt", "train/masks/1.txt"], "must leave samples for train"),
    ],
)
def test_what_a_folder_of_masks_lacks_is_named(tmp_path, present, named):
    for name in present:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    with pytest.raises(ConfigError) as caught:
        masks(tmp_path, num_classes=3)
    assert named in str(caught.value)


def test_names_of_options_are_checked_without_files():
    check_source_options("folder", {"size": 64})
    check_source_options("csv", {"target": "y"})
    with pytest.raises(ValueError, match="options must hold num_classes with name masks"):
        check_source_options("masks", {})
    with pytest.raises(ValueError, match="The nearest is 'target'"):
        check_source_options("csv", {"targets": "y"})


def test_without_pillow_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    with pytest.raises(
        ConfigError, match=r"needs the package PIL, .* pip install 'syncnorm\[data\]'"
    ):
        folder(tmp_path)
