"""Picture files: read as a viewer shows them, and written whole or not at all."""

import io
import os
import struct
import sys
import zlib
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image, ImageCms

from specedit.io import pictures
from specedit.io.pictures import PictureError

RAMP = np.linspace(0, 255, 64 * 48).round().astype(np.uint8).reshape(48, 64)


def grey(image):
    """The one channel of a picture whose three are equal, as int."""
    values = np.asarray(image).astype(int)
    assert image.mode == "RGB" and (values == values[..., :1]).all()
    return values[..., 0]


@pytest.fixture
def save(tmp_path):
    """Saves a picture, given as such or as an array, and returns the file."""

    def write(image, name="in.png", **options):
        image = Image.fromarray(image) if isinstance(image, np.ndarray) else image
        image.save(tmp_path / name, **options)
        return tmp_path / name

    return write


@pytest.mark.parametrize("name", ["in.png", "in.tif"])
def test_16_bit_grey_is_scaled(save, name):
    path = save(RAMP.astype(np.uint16) * 257, name)
    assert np.array_equal(grey(pictures.read(path).image), RAMP)


def test_big_endian_and_32_bit_containers_of_16_bit_grey(save):
    path = save(Image.frombytes("I;16B", (64, 48), (RAMP.astype(">u2") * 257).tobytes()), "b.tif")
    assert Image.open(path).mode == "I;16B" and np.array_equal(grey(pictures.read(path).image), RAMP)
    path = save(RAMP.astype(np.int32) * 257, "i.tif")
    assert Image.open(path).mode == "I" and np.array_equal(grey(pictures.read(path).image), RAMP)


@pytest.mark.parametrize("values", [-1, 70000])
def test_integers_beyond_16_bits_are_rejected(save, values):
    path = save(np.full((8, 8), values, np.int32), "in.tif")
    with pytest.raises(PictureError, match=f"in.tif: expected whole numbers in 0..65535, got values from {values}"):
        pictures.read(path)


def test_inverted_16_bit_tiff_is_read(save):
    path = save(RAMP.astype(np.uint16) * 257, "in.tif", tiffinfo={262: 0})
    assert Image.open(path).tag_v2[262] == 0
    assert np.array_equal(grey(pictures.read(path).image), 255 - RAMP)


def test_16_bit_colours_keep_their_upper_byte(tmp_path):
    """A PPM of 16 bits, which Pillow opens as 8."""
    colours = np.stack([RAMP, RAMP[::-1], RAMP[:, ::-1]], -1)
    (tmp_path / "in.ppm").write_bytes(b"P6 64 48 65535\n" + (colours.astype(">u2") * 257).tobytes())
    assert np.array_equal(np.asarray(pictures.read(tmp_path / "in.ppm").image), colours)


@pytest.mark.parametrize("white", [1, 255, 65535])
def test_floats_are_scaled(save, white):
    path = save((RAMP / np.float32(255) * np.float32(white)).astype(np.float32), "in.tif")
    assert np.array_equal(grey(pictures.read(path).image), RAMP)


@pytest.mark.parametrize(("low", "high"), [(-1, 1), (0, 3), (0, 1000), (0, 1e6), (0, float("nan"))])
def test_floats_in_other_ranges_are_rejected(save, low, high):
    path = save(np.array([[low, high]] * 2, np.float32), "in.tif")
    with pytest.raises(PictureError, match=r"in.tif: expected floating point values in one of 0..1, 0..255, 0..65535"):
        pictures.read(path)


@pytest.mark.parametrize(
    ("mode", "name"),
    [
        ("1", "in.png"), ("L", "in.png"), ("P", "in.png"), ("RGB", "in.png"), ("LA", "in.png"), ("RGBA", "in.png"),
        ("PA", "in.tif"), ("CMYK", "in.tif"), ("CMYK", "in.jpg"), ("YCbCr", "in.tif"), ("YCbCr", "in.jpg"),
    ],
)  # fmt: skip
def test_every_mode_looks_unchanged_as_rgb(save, picture, mode, name):
    original = picture(64, 96)
    converted = original.convert("L").convert("PA") if mode == "PA" else original.convert(mode)
    read = pictures.read(save(converted, name))
    assert read.image.mode == "RGB" and read.alpha is None and not read.notes
    expected = np.asarray(converted.convert("RGB")).astype(int)
    assert np.abs(np.asarray(read.image) - expected).max() <= (16 if name == "in.jpg" else 0)


@pytest.mark.parametrize("planes", [1, 2])
def test_uncompressed_ycbcr_tiffs_are_read_interleaved_and_in_planes(tmp_path, picture, planes):
    """Written by hand: Pillow writes no planes, and its versions open these files in different modes."""
    image = picture(64, 96).convert("YCbCr")
    pixels = image.tobytes() if planes == 1 else b"".join(channel.tobytes() for channel in image.split())
    count, (width, height) = (1 if planes == 1 else 3), image.size
    begins = 8 + 2 + 11 * 12 + 4  # the header, and 11 tags
    tables = struct.pack("<3H", 8, 8, 8) + struct.pack("<3I", *(range(3) if count == 1 else (len(pixels) // 3,) * 3))
    at = begins + len(tables) + 12
    starts = struct.pack("<3I", *(at + i * len(pixels) // 3 for i in range(3)))

    def tag(number, value, kind=4, many=1):
        return struct.pack("<HHII", number, kind, many, value)

    offsets = (at, len(pixels)) if count == 1 else (begins + len(tables), begins + 6)
    ifd = b"".join(
        (
            tag(256, width), tag(257, height), tag(258, begins, 3, 3), tag(259, 1), tag(262, 6),
            tag(273, offsets[0], 4, count), tag(277, 3), tag(278, height), tag(279, offsets[1], 4, count),
            tag(284, planes), tag(530, 0x10001, 3, 2),
        )
    )  # fmt: skip
    head = struct.pack("<2sHIH", b"II", 42, 8, 11)
    (tmp_path / "in.tif").write_bytes(head + ifd + bytes(4) + tables + starts + pixels)
    assert np.array_equal(pictures.read(tmp_path / "in.tif").image, image.convert("RGB"))
    assert np.array_equal(pictures.read_mask(tmp_path / "in.tif")[0].convert("RGB"), image.convert("RGB"))


@pytest.mark.parametrize("mode", ["HSV", "RGBa", "La"])
def test_modes_that_only_some_files_hold(picture, monkeypatch, mode):
    original = picture(64, 96)
    opened = original.convert({"La": "LA", "RGBa": "RGBA"}.get(mode, "RGB")).convert(mode)
    opened.format = None
    monkeypatch.setattr(pictures, "_identify", lambda file: opened)
    expected = original.convert("L" if mode == "La" else "RGB").convert("RGB")
    assert np.abs(np.asarray(pictures.read(io.BytesIO(), "x").image).astype(int) - np.asarray(expected)).max() <= 6


def test_lab(save, picture):
    original = picture(64, 96)
    lab = ImageCms.profileToProfile(
        original, ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), outputMode="LAB"
    )
    read = pictures.read(save(lab, "in.tif"))
    assert np.abs(np.asarray(read.image).astype(int) - np.asarray(original)).mean() <= 2  # LAB of 8 bits is coarse


# ------------------------------------------------------------------------------------------------------------- alpha


def see_through(mode="RGBA"):
    """Green, a quarter hidden red, a quarter half transparent."""
    image = Image.new("RGBA", (64, 64), (0, 200, 0, 255))
    image.paste((255, 0, 0, 0), (0, 0, 32, 32))
    image.paste((0, 200, 0, 128), (32, 0, 64, 32))
    return image.convert(mode)


def check_alpha(picture):
    assert picture.image.getpixel((8, 8)) == (255, 255, 255)  # the hidden colour is not seen
    assert picture.alpha.mode == "L" and picture.alpha.getpixel((8, 8)) == 0 and picture.alpha.getpixel((8, 40)) == 255


@pytest.mark.parametrize("name", ["in.png", "in.tif", "in.webp"])
def test_transparent_pixels_become_white(save, name):
    path = save(see_through(), name, **({"lossless": True, "exact": True} if name.endswith("webp") else {}))
    read = pictures.read(path)
    check_alpha(read)
    assert read.image.getpixel((40, 8)) == (127, 227, 127) and read.image.getpixel((8, 40)) == (0, 200, 0)


def test_transparency_of_palettes_and_of_one_colour(save):
    palette = see_through().convert("RGB").convert("P", palette=Image.Palette.ADAPTIVE, colors=4)
    check_alpha(pictures.read(save(palette, transparency=palette.getpixel((8, 8)))))
    check_alpha(pictures.read(save(see_through(), "in.gif")))
    check_alpha(pictures.read(save(see_through().convert("RGB"), transparency=(255, 0, 0))))
    check_alpha(
        pictures.read(save(see_through().convert("L"), transparency=see_through().convert("L").getpixel((8, 8))))
    )
    check_alpha(pictures.read(save(see_through("LA"))))
    deep = np.full((64, 64), 40000, np.uint16)
    deep[:32, :32] = 77
    check_alpha(pictures.read(save(deep, transparency=77)))


@pytest.mark.parametrize("name", ["out.png", "out.webp", "out.tif", "out.tga"])
def test_alpha_is_put_back(tmp_path, save, name):
    """Pixels that were not edited have their own colours again, not those on white."""
    read = pictures.read(save(see_through()))
    notes = pictures.write(read.image, tmp_path / name, alpha=read.alpha)
    assert notes == (f"{tmp_path / name}: transparent where the input is, so an edit there does not show",)
    written = np.asarray(Image.open(tmp_path / name).convert("RGBA")).astype(int)
    original = np.asarray(see_through()).astype(int)
    seen = original[..., 3] > 0
    assert np.array_equal(written[..., 3], original[..., 3])
    difference = np.abs(written - original)[seen]
    assert difference.mean() < 1 if name == "out.webp" else difference.max() <= 1


def test_alpha_takes_the_size_of_the_output(tmp_path, save):
    read = pictures.read(save(see_through()))
    pictures.write(read.image.resize((32, 48)), tmp_path / "out.png", alpha=read.alpha)
    alpha = Image.open(tmp_path / "out.png").getchannel("A")
    assert alpha.size == (32, 48) and alpha.getpixel((4, 4)) == 0 and alpha.getpixel((4, 40)) == 255


@pytest.mark.parametrize("name", ["out.jpg", "out.bmp", "out.ppm"])
def test_formats_without_alpha_say_so(tmp_path, save, name):
    read = pictures.read(save(see_through()))
    (note,) = pictures.write(read.image, tmp_path / name, alpha=read.alpha)
    assert "holds no transparency, so the picture lies on white" in note
    assert min(Image.open(tmp_path / name).getpixel((8, 8))) >= 250


def png(depth, kind, rows, **chunks):
    """A PNG of 8 x 8 pixels, whose rows are bytes."""

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 8, 8, depth, kind, 0, 0, 0))
    extra = b"".join(chunk(name.encode(), data) for name, data in chunks.items())
    pixels = chunk(b"IDAT", zlib.compress(b"".join(b"\0" + row for row in rows)))
    return io.BytesIO(b"\x89PNG\r\n\x1a\n" + header + extra + pixels + chunk(b"IEND", b""))


@pytest.mark.parametrize(
    ("depth", "kind", "key", "clear", "seen", "shade"),
    [
        (16, 2, (65535, 1795, 1), (65535, 1795, 1), (51400, 0, 0), (200, 0, 0)),
        (4, 0, (15,), b"\xff" * 4, b"\x33" * 4, (51,) * 3),
        (2, 0, (3,), b"\xff" * 2, b"\x55" * 2, (85,) * 3),
        (1, 0, (0,), b"\0", b"\xff", (255,) * 3),
    ],
)
def test_transparent_colour_is_scaled_from_other_depths(depth, kind, key, clear, seen, shade):
    clear, seen = (row if isinstance(row, bytes) else struct.pack(">3H", *row) * 8 for row in (clear, seen))
    read = pictures.read(png(depth, kind, [clear] * 4 + [seen] * 4, tRNS=struct.pack(f">{len(key)}H", *key)), "x")
    assert read.alpha.getpixel((2, 1)) == 0 and read.alpha.getpixel((2, 6)) == 255
    assert read.image.getpixel((2, 1)) == (255,) * 3 and read.image.getpixel((2, 6)) == shade


def test_the_gamma_of_a_png():
    rows = [b"\x80" * 8] * 8
    for chunks, shade in (
        ({"gAMA": struct.pack(">I", 100000)}, 186),  # linear
        ({"gAMA": struct.pack(">I", 45455)}, 128),
        ({"sRGB": b"\0", "gAMA": struct.pack(">I", 100000)}, 128),
    ):
        assert pictures.read(png(8, 0, rows, **chunks), "x").image.getpixel((1, 1)) == (shade,) * 3


# ---------------------------------------------------------------------------------------------------------- profiles


def icc(space, white=(0.9642, 1.0, 0.8249), gamma=2.2, **columns):
    """A matrix or grey profile: ICC 2.1, one gamma."""

    def number(value):
        return struct.pack(">i", round(value * 65536))

    def xyz(values):
        return b"XYZ \0\0\0\0" + b"".join(map(number, values))

    curve = b"curv\0\0\0\0" + struct.pack(">IH", 1, round(gamma * 256)) + b"\0\0"
    text = b"desc\0\0\0\0" + struct.pack(">I", 5) + b"test\0" + bytes(78 + 1)
    tags = {b"desc": text, b"cprt": b"text\0\0\0\0none", b"wtpt": xyz(white)}
    if space == b"GRAY":
        tags[b"kTRC"] = curve
    for name, values in columns.items():
        tags |= {f"{name}XYZ".encode(): xyz(values), f"{name}TRC".encode(): curve}
    at, table, body = 128 + 4 + 12 * len(tags), b"", b""
    for name, content in tags.items():
        table += name + struct.pack(">II", at + len(body), len(content))
        body += content + bytes(-len(content) % 4)
    header = struct.pack(">I", at + len(body)) + bytes(4) + b"\2\x10\0\0" + b"mntr" + space + b"XYZ " + bytes(12)
    header += b"acsp" + bytes(28) + b"".join(map(number, (0.9642, 1.0, 0.8249))) + bytes(48)
    return header + struct.pack(">I", len(tags)) + table + body


WIDE = icc(b"RGB ", r=(0.51512, 0.24120, -0.00105), g=(0.29198, 0.69225, 0.04189), b=(0.15710, 0.06657, 0.78407))
LINEAR_GREY = icc(b"GRAY", gamma=1.0)


@pytest.mark.parametrize("name", ["in.png", "in.jpg", "in.tif", "in.webp"])
def test_wide_gamut_is_converted_to_srgb(save, name):
    """This green has more red than any of sRGB, whose nearest has none."""
    path = save(Image.new("RGB", (64, 64), (100, 200, 100)), name, icc_profile=WIDE)
    red, green, blue = pictures.read(path).image.getpixel((20, 20))
    assert red < 60 and 195 <= green <= 212 and 70 <= blue <= 100


def test_a_profile_applies_to_the_colours_and_leaves_the_alpha(save):
    read = pictures.read(save(see_through(), icc_profile=WIDE))
    check_alpha(read)
    assert read.image.getpixel((8, 40)) != (0, 200, 0)


def test_an_srgb_profile_changes_nothing(save, picture):
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for image in (picture(64, 96), picture(64, 96).convert("L")):
        assert np.array_equal(pictures.read(save(image, icc_profile=profile)).image, image.convert("RGB"))


@pytest.mark.parametrize("values", [np.full((64, 64), 128, np.uint8), np.full((64, 64), 128 * 257, np.uint16)])
def test_grey_profile_is_applied(save, values):
    assert abs(grey(pictures.read(save(values, icc_profile=LINEAR_GREY)).image) - 188).max() <= 2


@pytest.mark.parametrize("profile", [b"damaged", WIDE[:200], LINEAR_GREY, icc(b"CMYK")])
def test_unsuitable_profile_is_reported(save, profile, picture):
    path = save(picture(64, 96), icc_profile=profile)
    read = pictures.read(path)
    assert np.array_equal(read.image, picture(64, 96))
    (note,) = read.notes
    assert note.startswith(f"{path}: its colour profile cannot be used") and "\n" not in note


def test_the_output_is_srgb_without_a_profile(tmp_path, save):
    read = pictures.read(save(Image.new("RGB", (64, 64), (100, 200, 100)), icc_profile=WIDE))
    pictures.write(read.image, tmp_path / "out.png")
    assert "icc_profile" not in Image.open(tmp_path / "out.png").info
    assert np.array_equal(pictures.read(tmp_path / "out.png").image, read.image)


# ------------------------------------------------------------------------------------------------- turned, and frames


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["jpg", "png", "tif"])
def test_pictures_are_upright(save, picture, orientation, kind):
    from PIL import ImageOps

    exif = Image.Exif()
    exif[0x0112] = orientation
    path = save(picture(64, 96), f"in.{kind}", exif=exif)
    read = pictures.read(path)
    assert np.array_equal(read.image, ImageOps.exif_transpose(Image.open(path)).convert("RGB"))
    assert read.image.size == ((64, 96) if orientation >= 5 else (96, 64))
    if kind != "jpg":
        shown = {1: 0, 6: -1, 3: 2, 8: 1}.get(orientation)
        assert shown is None or np.array_equal(read.image, np.rot90(picture(64, 96), shown))
    assert np.array_equal(pictures.read_mask(path)[0], read.image)
    pictures.write(read.image, path.with_name("out.png"))
    assert not Image.open(path.with_name("out.png")).getexif()


def test_alpha_and_16_bits_are_turned_too(save):
    exif = Image.Exif()
    exif[0x0112] = 6
    read = pictures.read(save(see_through(), exif=exif))
    assert read.alpha.getpixel((60, 4)) == 0 and read.image.getpixel((60, 4)) == (255, 255, 255)
    for values in (RAMP, RAMP.astype(np.uint16) * 257):
        path = save(values, "in.tif", tiffinfo={0x0112: 6})
        assert np.array_equal(grey(pictures.read(path).image), np.rot90(RAMP, -1))


def test_damaged_exif_is_ignored(save, picture):
    read = pictures.read(save(picture(64, 96), "in.png", exif=b"Exif\0\0II*\0\xff\xff\xff"))
    assert np.array_equal(read.image, picture(64, 96))


@pytest.mark.parametrize("name", ["in.gif", "in.png", "in.tif", "in.webp"])
def test_first_of_several_frames_is_read_with_a_note(save, name):
    first, second = Image.new("RGB", (64, 64), "red"), Image.new("RGB", (64, 64), "blue")
    path = save(first, name, save_all=True, append_images=[second])
    read = pictures.read(path)
    assert read.notes == (f"{path}: the first of 2 frames is read",) and read.image.getpixel((9, 9))[0] > 250
    assert pictures.read_mask(path)[1] == read.notes


def test_camera_previews_give_no_note(save, picture):
    path = save(picture(64, 96), "in.jpg", format="MPO", save_all=True, append_images=[picture(64, 96, 1)])
    assert Image.open(path).n_frames == 2 and not pictures.read(path).notes


# ------------------------------------------------------------------------------------------------------------- errors


def damaged(content):
    def make(path, whole):
        path.write_bytes(content(whole))

    return make


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda path, _: None, "expected a picture file, got one that does not exist"),
        (lambda path, _: path.mkdir(), "expected a picture file, got a folder"),
        (damaged(lambda _: b""), "expected a picture that can be read: the file is empty"),
        (damaged(lambda _: b"text"), "expected a picture that can be read: a kind of file that Pillow does not know"),
        (damaged(lambda whole: whole[:-40]), "expected a picture that can be read: "),
        (damaged(lambda whole: whole[:20] + b"\xff" * 4 + whole[24:]), "expected a picture that can be read"),
        (damaged(lambda whole: whole[:30] + b"\0\0\0\0" + whole[34:]), "expected a picture that can be read"),
        (damaged(lambda _: b"\0\0\0\x18ftypheic" + bytes(40)), "pip install pillow-heif"),
        (damaged(lambda _: b"\0\0\0\x18ftypmif1" + bytes(40)), "pip install pillow-heif"),
    ],
)
@pytest.mark.parametrize("read", [pictures.read, pictures.read_mask])
def test_non_pictures_are_rejected(tmp_path, encoded, picture, monkeypatch, make, says, read):
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    path = tmp_path / "in.png"
    make(path, encoded(picture(64, 96)))
    with pytest.raises(PictureError) as error:
        read(path)
    assert str(error.value).startswith(f"{path}: {says}") or says in str(error.value)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_avif_names_what_reads_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    (tmp_path / "in.avif").write_bytes(b"\0\0\0\x18ftypavif" + bytes(40))
    monkeypatch.setattr(Image, "open", lambda file: (_ for _ in ()).throw(pictures.UnidentifiedImageError))
    with pytest.raises(PictureError, match=r'in.avif: .*pip install "pillow>=11.3"'):
        pictures.read(tmp_path / "in.avif")


def test_pillow_heif_is_used_if_installed(tmp_path, monkeypatch, picture):
    """A stand-in: what it registers opens the file."""
    (tmp_path / "in.jpg").write_bytes(b"\0\0\0\x18ftypheic" + bytes(40))
    stock, registered = Image.open, []
    module = SimpleNamespace(register_heif_opener=lambda: registered.append(True))
    monkeypatch.setitem(sys.modules, "pillow_heif", module)
    monkeypatch.setattr(Image, "open", lambda file: picture(64, 96) if registered else stock(file))
    assert np.array_equal(pictures.read(tmp_path / "in.jpg").image, picture(64, 96))


@pytest.mark.parametrize("limit", [100, 5000])
def test_decompression_bombs_are_errors_and_large_pictures_are_not(save, picture, monkeypatch, recwarn, limit):
    path = save(picture(64, 96))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    if limit == 5000:  # Pillow only warns up to twice the limit
        assert pictures.read(path).image.size == (96, 64) and not recwarn
    else:
        with pytest.raises(PictureError, match=r"in.png: expected a picture that can be read: .*decompression bomb"):
            pictures.read(path)


# ------------------------------------------------------------------------------------------------------------ writing


@pytest.mark.parametrize("name", ["out", "out.xyz", "out.txt", "out.xbm", "out.psd", "out.hdf", "out.ico"])
def test_unwritable_formats_are_rejected(tmp_path, name):
    with pytest.raises(PictureError, match=f"expected a picture file such as out.png, got {tmp_path / name}"):
        pictures.check_target(tmp_path / name)
    with pytest.raises(PictureError):
        pictures.write(Image.new("RGB", (64, 64)), tmp_path / name)
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("name", ["out.png", "out.JPG", "out.webp", "new/folder/out.tiff", "out.bmp"])
def test_writable_formats_are_written(tmp_path, picture, name):
    pictures.check_target(tmp_path / name)
    assert not os.listdir(tmp_path)  # the check makes nothing
    assert pictures.write(picture(64, 96), tmp_path / name) == ()
    assert Image.open(tmp_path / name).size == (96, 64)
    assert os.listdir((tmp_path / name).parent) == [(tmp_path / name).name]


def test_unwritable_places_are_rejected(tmp_path):
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "file").write_text("")
    os.mkfifo(tmp_path / "pipe.png")
    for name, says in (
        ("folder.png", "expected a picture file to write, got a folder"),
        ("file/out.png", f"expected a folder that can be written to, got {tmp_path / 'file'}"),
        ("pipe.png", "expected a file that can be written"),
        ("x" * 300 + ".png", "File name too long"),
    ):
        with pytest.raises(PictureError) as error:
            pictures.check_target(tmp_path / name)
        assert says in str(error.value) and name in str(error.value)


def test_a_failing_write_leaves_the_old_file(tmp_path, picture, monkeypatch):
    path = tmp_path / "out.png"
    picture(64, 96).save(path)
    before = path.read_bytes()

    def fail(self, file, format=None, **_):
        if hasattr(file, "name"):
            file.write(b"half")
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", fail)
    with pytest.raises(PictureError, match=r"out.png: cannot be written: .*No space left"):
        pictures.write(picture(64, 96, 1), path)
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["out.png"]


def test_writing_keeps_links_and_permissions(tmp_path, picture):
    path, link = tmp_path / "out.png", tmp_path / "link.png"
    picture(64, 96).save(path)
    path.chmod(0o640)
    link.symlink_to(path)
    pictures.write(picture(64, 96, 1), link)
    assert link.is_symlink() and path.stat().st_mode & 0o777 == 0o640
    assert np.array_equal(Image.open(path), picture(64, 96, 1))
