"""Pictures of every kind become 8-bit RGB, or an error that names the row."""

import io
import random
import struct
import subprocess
import sys
import zlib

import pytest
import torch
from PIL import ExifTags, Image

from trl_llava.data import images
from trl_llava.data.contract import RowError
from trl_llava.data.image_tensors import expand_images, small_enough_to_pad
from trl_llava.data.images import image_size, load_image, load_images, open_image, path_inside
from trl_llava.models.vision_tower import set_square_padding


def encoded(image, format="PNG", **options):
    file = io.BytesIO()
    image.save(file, format, **options)
    return {"bytes": file.getvalue(), "path": None}


def colours(image):
    return [image.getpixel((x, 0)) for x in range(image.width)]


def test_path_bytes_and_picture_are_the_same(tmp_path):
    picture = Image.new("RGB", (3, 2), (10, 20, 30))
    path = tmp_path / "a.png"
    picture.save(path)
    for ref in (picture, str(path), {"bytes": None, "path": str(path)}, encoded(picture)):
        loaded = load_image(ref, "a[0]")
        assert loaded.mode == "RGB" and loaded.size == (3, 2) and colours(loaded) == [(10, 20, 30)] * 3
    assert [
        [image.size for image in row] for row in load_images([{"row_name": "a[0]", "images": [str(path)]}, {}])
    ] == [
        [(3, 2)],
        [],
    ]


def test_the_file_is_no_longer_needed(tmp_path):
    path = tmp_path / "a.png"
    Image.new("RGB", (3, 2), "red").save(path)
    loaded = load_image(str(path), "a[0]")
    path.unlink()
    assert colours(loaded) == [(255, 0, 0)] * 3


def test_cmyk_is_converted():
    cmyk = Image.new("CMYK", (1, 1), (0, 255, 255, 0))
    assert colours(load_image(cmyk, "a[0]")) == [(255, 0, 0)]
    (red, green, blue) = colours(load_image(encoded(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG"), "a[0]"))[0]
    assert red > 200 and green < 60 and blue < 60


def sixteen_bit(values):
    """A 16-bit grey PNG with one line of pixels."""

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    line = b"\0" + struct.pack(f">{len(values)}H", *values)
    head = struct.pack(">IIBBBBB", len(values), 1, 16, 0, 0, 0, 0)
    body = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(line)) + chunk(b"IEND", b"")
    return {"bytes": b"\x89PNG\r\n\x1a\n" + body, "path": None}


def test_sixteen_bit_grey_is_scaled_not_clipped():
    loaded = load_image(sixteen_bit([0, 257, 32896, 65535]), "a[0]")
    assert colours(loaded) == [(0, 0, 0), (1, 1, 1), (128, 128, 128), (255, 255, 255)]


def test_values_of_unknown_range_are_an_error():
    with pytest.raises(RowError, match=r"a\[0\]: the image has values from -5 to -5"):
        load_image(Image.new("I", (2, 2), -5), "a[0]")
    with pytest.raises(RowError, match="floating-point pixels"):
        load_image(Image.new("F", (2, 2), 0.5), "a[0]")


@pytest.mark.parametrize("format", ["GIF", "PNG", "WEBP"])
def test_of_an_animation_the_first_frame_is_taken(format):
    first, second = Image.new("RGB", (4, 4), "red"), Image.new("RGB", (4, 4), "blue")
    animated = encoded(first, format, save_all=True, append_images=[second], duration=50)
    red, green, blue = load_image(animated, "a[0]").getpixel((2, 2))
    assert red > 240 and green < 10 and blue < 10


@pytest.mark.parametrize(("mode", "value"), [("I", 200), ("F", 0.5)])
def test_values_of_no_known_range_are_refused(mode, value, tmp_path):
    Image.new(mode, (2, 2), value).save(tmp_path / "a.tif")
    with pytest.raises(RowError, match="of no known range"):
        load_image(str(tmp_path / "a.tif"), "a[0]")


@pytest.mark.parametrize(("mode", "colour"), [("1", 1), ("L", 255), ("P", 0), ("LA", (255, 0)), ("RGBA", (255,) * 4)])
def test_other_modes_become_rgb(mode, colour):
    assert load_image(encoded(Image.new(mode, (2, 2), colour)), "a[0]").mode == "RGB"


def test_metadata_that_cannot_be_read_stop_nobody():
    """Orientation 6, and a resolution that is a text where EXIF wants a fraction."""
    header = b"Exif\0\0II*\0" + struct.pack("<IH", 8, 2)
    turned = struct.pack("<HHI4s", 0x0112, 3, 1, struct.pack("<HH", 6, 0))
    exif = header + turned + struct.pack("<HHI4s", 0x011A, 2, 3, b"72\0\0") + struct.pack("<I", 0)
    photo = encoded(Image.new("RGB", (40, 20), "red"), "JPEG", exif=exif)
    assert load_image(photo, "a[0]").size == image_size(photo, "a[0]") == (20, 40)
    assert not load_image(photo, "a[0]").info
    cut = encoded(Image.new("RGB", (40, 20), "red"), "JPEG", exif=exif[:20])
    assert load_image(cut, "a[0]").size == image_size(cut, "a[0]") == (40, 20)


@pytest.mark.filterwarnings("ignore")  # Pillow's, of what it cannot read
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
def test_whatever_metadata_hold_the_orientation_is_applied(format):
    """Entries of any tag, type, count and value, before orientation 6 and behind it."""
    draw = random.Random(0)
    tags = [tag for tag in (*ExifTags.TAGS, 0, 65535) if tag != ExifTags.Base.Orientation]
    for _ in range(300):
        entries = [struct.pack("<HHIHH", ExifTags.Base.Orientation, 3, 1, 6, 0)]
        for _ in range(2):
            count, value = draw.choice([0, 1, 4, 2**31]), draw.choice([0, 1, 26, 2**32 - 1])
            entries.append(struct.pack("<HHII", draw.choice(tags), draw.randrange(15), count, value))
        draw.shuffle(entries)
        exif = b"Exif\0\0II*\0" + struct.pack("<IH", 8, 3) + b"".join(entries) + bytes(24)
        photo = encoded(Image.new("RGB", (40, 20), "red"), format, exif=exif)
        assert load_image(photo, "a[0]").size == image_size(photo, "a[0]") == (20, 40), entries


@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_size_of_a_turned_tiff_is_that_of_its_pixels(orientation):
    scan = encoded(Image.new("RGB", (40, 20), "red"), "TIFF", tiffinfo={ExifTags.Base.Orientation: orientation})
    size = (20, 40) if orientation > 4 else (40, 20)
    assert load_image(scan, "a[0]").size == image_size(scan, "a[0]") == size


def test_exif_orientation_is_applied():
    picture = Image.new("RGB", (4, 2), "red")
    exif = Image.Exif()
    exif[0x0112] = 6  # rotated by a quarter turn
    turned = encoded(picture, "JPEG", exif=exif)
    assert load_image(turned, "a[0]").size == (2, 4) == image_size(turned, "a[0]")
    assert image_size(encoded(picture), "a[0]") == (4, 2)


@pytest.mark.parametrize(
    ("ref", "problem", "reason"),
    [
        ("/nowhere/a.png", "the image file /nowhere/a.png does not exist", "image missing"),
        ({"bytes": None, "path": None}, "expected an image, a path, or a dict", "image missing"),
        (None, "the image is None, expected an image", "image missing"),
        ({"bytes": b"", "path": None}, "the image has no bytes", "empty image"),
        ({"bytes": b"not a picture", "path": "x.png"}, "the image x.png cannot be read", "damaged image"),
        (Image.new("RGB", (0, 5)), r"the image has no pixels \(0x5\)", "empty image"),
    ],
)
def test_what_is_no_picture_names_the_row(ref, problem, reason):
    with pytest.raises(RowError, match=problem) as caught:
        load_image(ref, "a[0]")
    assert str(caught.value).startswith("a[0]: ") and caught.value.reason == reason


@pytest.mark.parametrize("format", ["PNG", "JPEG", "GIF", "WEBP"])
def test_truncated_picture_names_the_row(format):
    noise = Image.effect_noise((64, 64), 90).convert("RGB")
    content = encoded(noise, format)["bytes"]
    with pytest.raises(RowError, match=r"a\[0\]: the image cannot be read"):
        load_image({"bytes": content[: len(content) // 2], "path": None}, "a[0]")


def test_the_size_of_a_truncated_png_names_the_row():
    content = encoded(Image.effect_noise((64, 64), 90).convert("RGB"))["bytes"]
    with pytest.raises(RowError, match=r"a\[0\]: the image cannot be read"):
        image_size({"bytes": content[: len(content) // 2], "path": None}, "a[0]")


def test_an_empty_file_names_the_row(tmp_path):
    (tmp_path / "a.jpg").touch()
    with pytest.raises(RowError, match=r"a.jpg cannot be read"):
        load_image(str(tmp_path / "a.jpg"), "a[0]")


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_decompression_bomb_is_refused_before_it_is_decoded(monkeypatch):
    bomb = encoded(Image.new("1", (30_000, 3_000)))
    assert len(bomb["bytes"]) < 100_000
    with pytest.raises(RowError, match="30000x3000 pixels, expected at most 89478485"):
        load_image(bomb, "a[0]")
    pattern = r"than 178956970 pixels.*max_image_pixels"  # Pillow itself refuses twice its limit
    with pytest.raises(RowError, match=pattern) as caught:
        load_image(encoded(Image.new("1", (60_000, 3_000))), "a[0]")
    assert caught.value.reason == "image too large"
    monkeypatch.setattr(images, "MAX_PIXELS", 10)
    with pytest.raises(RowError, match="4x4 pixels, expected at most 10"):
        load_image(Image.new("RGB", (4, 4)), "a[0]")


@pytest.mark.parametrize("size", [(30_000, 10), (10, 30_000), (201, 1)])
def test_a_strip_is_refused_before_it_is_resized(size):
    with pytest.raises(RowError, match=f"{size[0]}x{size[1]} pixels, its sides differ more than 200 to 1") as caught:
        open_image(encoded(Image.new("1", size)), "a[0]")
    assert caught.value.reason == "image too large"
    assert open_image(Image.new("1", (200, 1)), "a[0]").size == (200, 1)


def test_a_strip_is_made_smaller_before_it_is_padded_to_a_square(tiny_processor, monkeypatch):
    strip = Image.radial_gradient("L").resize((400, 40)).convert("RGB")
    set_square_padding(tiny_processor, True)
    whole = expand_images(tiny_processor, [[strip]]).tensors["pixel_values"]
    monkeypatch.setattr(images, "MAX_PIXELS", 200 * 200)
    assert small_enough_to_pad(strip, tiny_processor).size == (200, 20)
    assert small_enough_to_pad(strip.resize((200, 199)), tiny_processor).size == (200, 199)
    smaller = expand_images(tiny_processor, [[strip]]).tensors["pixel_values"]
    assert not torch.equal(smaller, whole)
    torch.testing.assert_close(smaller, whole, atol=0.1, rtol=0)
    set_square_padding(tiny_processor, False)
    assert small_enough_to_pad(strip, tiny_processor) is strip


@pytest.mark.parametrize("name", ["../a.png", "b/../../a.png", "/etc/a.png", "..\\a.png", "C:\\a.png", "", "b/.."])
def test_a_file_name_must_not_leave_its_folder(name):
    with pytest.raises(RowError, match=r"a\[0\]: the image file name is .* without `\.\.`"):
        path_inside("/data/images", name, "a[0]")


def test_a_file_name_may_have_folders():
    assert path_inside("/data/images", "train2017/0..1.png", "a[0]") == "/data/images/train2017/0..1.png"


def test_a_link_must_not_leave_the_folder_either(tmp_path, monkeypatch):
    folder, secret = tmp_path / "images", tmp_path / "secret"
    folder.mkdir(), secret.mkdir()
    for place in (folder, secret):
        Image.new("RGB", (4, 4)).save(place / "a.png")
    (folder / "link.png").symlink_to(secret / "a.png")
    (folder / "inside.png").symlink_to("a.png")
    (folder / "coco").symlink_to(secret)
    assert path_inside(folder, "inside.png", "a[0]") == str(folder / "inside.png")
    for name in ("link.png", "coco/a.png"):
        with pytest.raises(
            RowError, match=r"a\[0\]: .* is a symbolic link to .*secret/a.png.*`follow_image_links"
        ) as error:
            path_inside(folder, name, "a[0]")
        assert error.value.reason == "image outside its folder"
    (tmp_path / "mine").symlink_to(folder)  # the folder itself is the user's word
    assert path_inside(tmp_path / "mine", "a.png", "a[0]")
    monkeypatch.setattr(images, "FOLLOW_LINKS", True)
    assert path_inside(folder, "link.png", "a[0]")


def test_a_folder_with_a_like_name_is_outside(tmp_path):
    (tmp_path / "images").mkdir(), (tmp_path / "images-2").mkdir()
    (tmp_path / "images" / "a.png").symlink_to(tmp_path / "images-2" / "a.png")
    with pytest.raises(RowError, match="outside the image folder"):
        path_inside(tmp_path / "images", "a.png", "a[0]")


def test_the_hubs_cache_is_made_of_links(tmp_path):
    snapshot = tmp_path / "datasets--org--rows" / "snapshots" / "abc"
    snapshot.mkdir(parents=True), (tmp_path / "datasets--org--rows" / "blobs").mkdir()
    (snapshot / "a.png").symlink_to(tmp_path / "datasets--org--rows" / "blobs" / "123")
    (snapshot / "b.png").symlink_to(tmp_path / "b.png")
    assert path_inside(snapshot, "a.png", "a[0]") == str(snapshot / "a.png")
    with pytest.raises(RowError, match="outside the image folder"):
        path_inside(snapshot, "b.png", "a[0]")


def test_the_limit_is_the_recipes(monkeypatch):
    monkeypatch.setattr(images, "MAX_PIXELS", images.MAX_PIXELS)
    monkeypatch.setattr(images, "FOLLOW_LINKS", False)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", Image.MAX_IMAGE_PIXELS)
    images.set_limits(15, True)
    with pytest.raises(RowError, match="4x4 pixels, expected at most 15"):
        load_image(Image.new("RGB", (4, 4)), "a[0]")
    assert (Image.MAX_IMAGE_PIXELS, images.FOLLOW_LINKS) == (15, True)
    images.set_limits(16, False)
    assert load_image(Image.new("RGB", (4, 4)), "a[0]").size == (4, 4)


def test_worker_processes_that_are_spawned_have_the_recipes_limit(monkeypatch):
    for place, name in ((images, "MAX_PIXELS"), (images, "FOLLOW_LINKS"), (Image, "MAX_IMAGE_PIXELS")):
        monkeypatch.setattr(place, name, getattr(place, name))
    images.set_limits(15, True)
    seen = "from trl_llava.data import images as i; print(i.MAX_PIXELS, i.FOLLOW_LINKS, i.Image.MAX_IMAGE_PIXELS)"
    assert subprocess.check_output([sys.executable, "-c", seen], text=True).split() == ["15", "True", "15"]
