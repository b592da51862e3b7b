"""Opening media: what may be read, and that every kind of file comes out right or is refused with a reason."""

from __future__ import annotations

import base64
import functools
import http.server
import io
import os
import threading
import zlib
from collections.abc import Iterator
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image, ImageOps

from finesight.data import fetch as fetch_module
from finesight.data.conversation import MediaRef
from finesight.data.media import MediaPolicy, image_size, media_key, open_image, read_frames, video_info
from finesight.errors import MediaError


def picture(width: int = 12, height: int = 8, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def encoded(image: Image.Image, format: str = "PNG", **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, format, **options)
    return out.getvalue()


def write_video(path: Path, frames: int = 10, rate: int = 5, size: tuple[int, int] = (32, 24), codec: str = "mpeg4") -> Path:
    """Frame i is a grey of 20 * i."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate)
        stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
        for number in range(frames):
            frame = av.VideoFrame.from_ndarray(np.full((size[1], size[0], 3), 20 * number, np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Data beside images, and a secret outside."""
    (tmp_path / "data" / "images").mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    picture().save(tmp_path / "data" / "images" / "a.png")
    picture(seed=1).save(tmp_path / "elsewhere" / "secret.png")
    return tmp_path / "data"


class TestPolicy:
    def test_beside_the_data_file(self, folder: Path) -> None:
        for text in (
            "images/a.png",
            "./images/a.png",
            "images/../images/a.png",
            str(folder / "images/a.png"),
            (folder / "images/a.png").as_uri(),
        ):
            assert MediaPolicy().resolve(text, beside=folder).path == str(folder / "images" / "a.png")

    def test_same_text_is_the_same_reference(self, folder: Path) -> None:
        policy = MediaPolicy()
        assert policy.resolve("images/a.png", beside=folder) is policy.resolve("images/a.png", beside=folder)

    @pytest.mark.parametrize(
        "text",
        ["../elsewhere/secret.png", "images/../../elsewhere/secret.png", "{outside}", "file://{outside}", "link.png", "linked/secret.png"],
    )
    def test_never_outside(self, folder: Path, text: str) -> None:
        outside = folder.parent / "elsewhere" / "secret.png"
        (folder / "link.png").symlink_to(outside)
        (folder / "linked").symlink_to(outside.parent)
        with pytest.raises(MediaError, match=r"outside of the folders.*data\.allowed_dirs.*data\.train\.0\.media_dir"):
            MediaPolicy(media_dir_setting="data.train.0.media_dir").resolve(text.format(outside=outside), beside=folder)

    @pytest.mark.parametrize("text", ["link.png", "../elsewhere/secret.png", "{outside}", "secret.png"])
    def test_allowed_dirs(self, folder: Path, text: str) -> None:
        outside = folder.parent / "elsewhere" / "secret.png"
        (folder / "link.png").symlink_to(outside)
        policy = MediaPolicy(roots=(outside.parent,))
        assert policy.resolve(text.format(outside=outside), beside=folder).path == str(outside)

    def test_media_dir_comes_second(self, folder: Path) -> None:
        other = folder.parent / "elsewhere"
        (other / "images").mkdir()
        picture(seed=2).save(other / "images" / "a.png")
        policy = MediaPolicy(media_dir=other)
        assert policy.resolve("images/a.png", beside=folder).path == str(folder / "images" / "a.png")
        assert policy.resolve("secret.png", beside=folder).path == str(other / "secret.png")

    def test_missing_root_folder_is_hinted_at_and_then_honoured(self, folder: Path) -> None:
        """Paths begin with a folder that they were once kept in, as in Qwen's own demo data."""
        with pytest.raises(MediaError, match=f"'demo/images/a.png' does not exist.*data.train.0.media_dir: {folder} would make it resolve"):
            MediaPolicy(media_dir_setting="data.train.0.media_dir").resolve("demo/images/a.png", beside=folder)
        policy = MediaPolicy(media_dir=folder)
        assert policy.resolve("demo/images/a.png", beside=folder).path == str(folder / "images" / "a.png")
        assert policy.stands_for == "demo"

    def test_file_in_a_subfolder_is_hinted_at(self, folder: Path) -> None:
        with pytest.raises(MediaError, match=f"media_dir: {folder / 'images'} would make it resolve"):
            MediaPolicy().resolve("a.png", beside=folder)

    def test_rows_in_memory_are_told_to_come_from_their_file(self, folder: Path) -> None:
        policy = MediaPolicy(in_memory=True, media_dir_setting="the source.media_dir")
        with pytest.raises(MediaError) as caught:
            policy.resolve("a.png", beside=folder)
        assert f"looked in the present folder, {folder}, since the rows are in memory" in str(caught.value)
        assert f"can be found from {folder / 'images'}: give the path of the data file" in str(caught.value)
        assert "media_dir" not in str(caught.value) and "beside the data file" not in str(caught.value)

    def test_every_row_with_the_same_wrong_folder_is_hinted_at(self, folder: Path) -> None:
        for number in range(60):
            (folder / "images" / f"{number}.png").write_bytes(encoded(picture()))
        policy = MediaPolicy()
        for number in range(30):  # searched for in vain: these alone use up the searches
            with pytest.raises(MediaError) as caught:
                policy.resolve(f"gone/{number % 15}_.png", beside=folder)
            assert "would make it resolve" not in str(caught.value)
        for number in range(60):
            with pytest.raises(MediaError, match=f"media_dir: {folder} would make it resolve"):
                policy.resolve(f"wrong/images/{number}.png", beside=folder)
        for number in range(10):
            with pytest.raises(MediaError):
                policy.resolve(f"gone/more_{number}.png", beside=folder)
        with pytest.raises(MediaError, match=f"media_dir: {folder} would make it resolve"):
            policy.resolve("other/images/1.png", beside=folder)
        with pytest.raises(MediaError) as caught:
            policy.resolve("1.png", beside=folder)  # would need one search more
        assert "would make it resolve" not in str(caught.value)

    def test_media_dir_stands_for_one_folder_only(self, folder: Path) -> None:
        """Or train/a.png and val/a.png would silently be the same picture."""
        policy = MediaPolicy(media_dir=folder / "images")
        assert policy.resolve("train/a.png", beside=folder)
        with pytest.raises(MediaError, match="already stands for 'train'"):
            policy.resolve("val/a.png", beside=folder)

    def test_media_dir_stands_for_the_root_of_another_machine(self, folder: Path) -> None:
        picture(seed=3).save(folder / "b.png")
        policy = MediaPolicy(media_dir=folder)
        assert policy.resolve("/mnt/disk/set/images/a.png", beside=folder).path == str(folder / "images" / "a.png")
        assert policy.resolve("/mnt/disk/set/b.png", beside=folder).path == str(folder / "b.png")

    def test_media_dir_with_dots_stays_inside(self, folder: Path) -> None:
        with pytest.raises(MediaError):
            MediaPolicy(media_dir=folder / "images").resolve("x/../../../elsewhere/secret.png", beside=folder / "images")

    @pytest.mark.parametrize(
        ("text", "reason"),
        [
            ("", "is empty"),
            ("http://example.com/a.png", "data.allow_urls: true"),
            ("s3://bucket/a.png", "s3:// is not supported"),
            ("file://host/a.png", "names a host"),
            ("A" * 5000, "write base64 as a data URL"),
            ("a\0b", "no path"),
            ("n" * 300, "does not exist"),
            ("images\\a.png", "backslashes"),
            ("data:image/png;base64", "no comma"),
            ("data:image/png;base64,@@@", "not valid base64"),
            ("data:image/png;base64,", "is empty"),
        ],
    )
    def test_refused(self, folder: Path, text: str, reason: str) -> None:
        with pytest.raises(MediaError, match=reason):
            MediaPolicy().resolve(text, beside=folder)

    def test_devices_are_no_media(self, folder: Path) -> None:
        os.mkfifo(folder / "pipe.png")
        with pytest.raises(MediaError, match="no regular file"):
            MediaPolicy().resolve("pipe.png", beside=folder)

    def test_data_url(self, folder: Path) -> None:
        content = encoded(picture())
        text = "data:image/png;base64," + base64.b64encode(content).decode()
        assert MediaPolicy().resolve(text, beside=folder).data == content

    def test_data_url_size_cap(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("finesight.data.media_policy.MAX_DATA_URL_BYTES", 100)
        with pytest.raises(MediaError, match="MiB"):
            MediaPolicy().resolve("data:image/png;base64," + "A" * 1000, beside=folder)

    def test_folder_is_the_frames_of_a_video(self, folder: Path) -> None:
        frames = folder / "clip"
        frames.mkdir()
        for number in (10, 9, 1):
            picture(seed=number).save(frames / f"f{number}.png")
        ref = MediaPolicy().resolve("clip", beside=folder)
        assert ref.frames is not None
        assert [Path(frame.path or "").name for frame in ref.frames] == ["f1.png", "f9.png", "f10.png"]
        info = video_info(ref)
        assert (info.num_frames, info.fps, info.width, info.height) == (3, None, 12, 8)
        assert np.array_equal(read_frames(ref, [2])[0], picture(seed=10))
        (frames / "f2.png").symlink_to(folder.parent / "elsewhere" / "secret.png")
        with pytest.raises(MediaError, match="link out of"):
            MediaPolicy().resolve("clip", beside=folder)

    def test_empty_folder(self, folder: Path) -> None:
        (folder / "none").mkdir()
        with pytest.raises(MediaError, match="folder without images"):
            MediaPolicy().resolve("none", beside=folder)


class TestImages:
    @pytest.mark.parametrize("format", ["PNG", "BMP", "TIFF", "PPM", "GIF", "WEBP", "JPEG"])
    def test_formats(self, format: str) -> None:
        ref = MediaRef(data=encoded(picture(), format, **({"lossless": True} if format == "WEBP" else {})))
        assert image_size(ref) == (12, 8)
        opened = open_image(ref)
        assert (opened.mode, opened.size) == ("RGB", (12, 8))
        if format not in ("GIF", "JPEG"):
            assert np.array_equal(opened, picture())

    @pytest.mark.parametrize("orientation", range(1, 9))
    @pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF"])
    def test_orientation(self, orientation: int, format: str) -> None:
        exif = Image.Exif()
        exif[0x0112] = orientation
        content = encoded(picture(), format, exif=exif)
        ref = MediaRef(data=content)
        expected = ImageOps.exif_transpose(Image.open(io.BytesIO(content))).convert("RGB")
        assert image_size(ref) == expected.size == ((8, 12) if orientation >= 5 else (12, 8))
        assert np.array_equal(open_image(ref), expected)

    @pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
    def test_damaged_orientation_is_ignored(self) -> None:
        ref = MediaRef(data=encoded(picture(), "JPEG", exif=b"Exif\0\0II*\0rubbish"))
        assert image_size(ref) == open_image(ref).size == (12, 8)

    @pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "L", "RGB"])
    def test_transparency_is_white(self, mode: str) -> None:
        rgba = Image.new("RGBA", (4, 4), (0, 0, 0, 0))
        rgba.paste((10, 20, 30, 255), (0, 0, 2, 4))
        if mode == "RGBA":
            content = encoded(rgba)
        elif mode == "LA":
            content = encoded(rgba.convert("LA"))
        elif mode == "P":
            palette = Image.new("P", (4, 4), 0)
            palette.putpalette([0, 0, 0, 10, 20, 30])
            palette.paste(1, (0, 0, 2, 4))
            content = encoded(palette, transparency=0)
        elif mode == "L":
            grey = Image.new("L", (4, 4), 0)
            grey.paste(17, (0, 0, 2, 4))
            content = encoded(grey, transparency=0)
        else:
            content = encoded(Image.alpha_composite(Image.new("RGBA", (4, 4), (0, 0, 0, 255)), rgba).convert("RGB"), transparency=(0, 0, 0))
        pixels = np.asarray(open_image(MediaRef(data=content)))
        assert (pixels[:, 2:] == 255).all()
        assert (pixels[:, :2] < 60).all()

    @pytest.mark.parametrize("mode", ["I;16", "I", "F"])
    def test_deep_greyscale(self, mode: str) -> None:
        """PIL alone would make everything above 255 white."""
        ramp = np.linspace(0, 65535, 64).reshape(8, 8)
        if mode == "I;16":
            ref = MediaRef(data=encoded(Image.fromarray(ramp.astype(np.uint16))))
        elif mode == "I":
            ref = MediaRef(image=Image.fromarray(ramp.astype(np.int32)))
        else:
            ref = MediaRef(data=encoded(Image.fromarray((ramp / 65535).astype(np.float32)), "TIFF"))
        pixels = np.asarray(open_image(ref)).astype(int)
        assert np.abs(pixels[..., 0] - ramp / 257).max() <= 1

    def test_32_bit_of_small_numbers_is_left_alone(self) -> None:
        values = np.arange(64, dtype=np.int32).reshape(8, 8)
        assert np.array_equal(np.asarray(open_image(MediaRef(image=Image.fromarray(values))))[..., 0], values)

    def test_cmyk_and_bilevel(self) -> None:
        assert open_image(MediaRef(data=encoded(Image.new("CMYK", (3, 3), (0, 255, 255, 0)), "JPEG"))).getpixel((1, 1))[0] > 240
        assert open_image(MediaRef(data=encoded(Image.new("1", (3, 3), 1)))).getpixel((0, 0)) == (255, 255, 255)

    @pytest.mark.parametrize("format", ["GIF", "WEBP"])
    def test_animation_gives_its_first_frame(self, format: str) -> None:
        frames = [Image.new("RGB", (6, 6), color) for color in ("red", "blue")]
        ref = MediaRef(data=encoded(frames[0], format, save_all=True, append_images=frames[1:], duration=100))
        red, _, blue = open_image(ref).getpixel((3, 3))
        assert red > 200 > 50 > blue

    def test_truncated(self, tmp_path: Path) -> None:
        for format in ("PNG", "JPEG"):
            path = tmp_path / f"cut.{format}"
            content = encoded(picture(200, 200), format)
            path.write_bytes(content[: len(content) // 2])
            ref = MediaRef(path=str(path))
            assert image_size(ref) == (200, 200)  # the header is whole
            with pytest.raises(MediaError, match=r"cut\.\w+ cannot be decoded"):
                open_image(ref)

    def test_refused(self, tmp_path: Path) -> None:
        cases = {
            "empty.png": (b"", "is empty"),
            "text.png": (b"not an image", "no image of a known format"),
            "page.jpg": (b"<!DOCTYPE html><html>404</html>", "HTML or SVG"),
            "pointer.png": (b"version https://git-lfs.github.com/spec/v1\noid", "Git LFS pointer"),
            "drawing.png": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 1 1\n", "no image of a known format"),
            "head.png": (encoded(picture())[:20], "cannot be opened|no image"),
        }
        for name, (content, reason) in cases.items():
            (tmp_path / name).write_bytes(content)
            for function in (image_size, open_image):
                with pytest.raises(MediaError, match=reason) as caught:
                    function(MediaRef(path=str(tmp_path / name)))
                assert name in str(caught.value)
        with pytest.raises(MediaError, match="cannot be read"):
            image_size(MediaRef(path=str(tmp_path / "gone.png")))
        with pytest.raises(MediaError, match="is empty"):
            image_size(MediaRef(data=b""))

    @pytest.mark.parametrize("side", [12_000, 30_000])  # PIL itself only warns of the first
    @pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
    def test_decompression_bomb(self, side: int, tmp_path: Path) -> None:
        def chunk(kind: bytes, body: bytes) -> bytes:
            return len(body).to_bytes(4, "big") + kind + body + zlib.crc32(kind + body).to_bytes(4, "big")

        header = side.to_bytes(4, "big") * 2 + bytes([1, 0, 0, 0, 0])
        content = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")
        for function in (image_size, open_image):
            with pytest.raises(MediaError, match="more than the 89478485"):
                function(MediaRef(data=content))

    def test_header_only(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A size must not cost a decode: thousands are asked for."""

        def refuse(*_: object) -> None:
            raise AssertionError("pixels were decoded")

        content = {format: encoded(picture(), format) for format in ("PNG", "JPEG", "WEBP")}
        for format, bytes_ in content.items():
            cls = type(Image.open(io.BytesIO(bytes_)))
            monkeypatch.setattr(cls, "load", refuse)
            assert image_size(MediaRef(data=bytes_)) == (12, 8), format

    def test_pil_object(self) -> None:
        image = picture()
        assert image_size(MediaRef(image=image)) == (12, 8)
        opened = open_image(MediaRef(image=image))
        assert opened is not image
        assert np.array_equal(opened, image)

    def test_frames_are_no_image(self) -> None:
        with pytest.raises(MediaError, match="one image is expected"):
            image_size(MediaRef(frames=(MediaRef(image=picture()),)))


class TestVideos:
    @pytest.mark.parametrize(("suffix", "codec"), [("mp4", "mpeg4"), ("avi", "mpeg4"), ("mkv", "mpeg4"), ("mp4", "libx264")])
    def test_frames_are_exact(self, tmp_path: Path, suffix: str, codec: str) -> None:
        ref = MediaRef(path=str(write_video(tmp_path / f"v.{suffix}", codec=codec)))
        info = video_info(ref)
        assert (info.num_frames, info.width, info.height) == (10, 32, 24)
        assert info.fps == pytest.approx(5)
        frames = read_frames(ref, [9, 0, 4, 4])
        assert [frame.size for frame in frames] == [(32, 24)] * 4
        assert [round(float(np.asarray(frame).mean()) / 20) for frame in frames] == [9, 0, 4, 4]
        assert read_frames(ref, []) == []

    def test_from_bytes(self, tmp_path: Path) -> None:
        ref = MediaRef(data=write_video(tmp_path / "v.mp4").read_bytes())
        assert video_info(ref).num_frames == 10
        assert len(read_frames(ref, [0, 9])) == 2

    def test_counted_where_the_container_does_not_say(self, tmp_path: Path) -> None:
        """Matroska written as a stream has no number of frames and no duration."""
        path = tmp_path / "live.mkv"
        with av.open(str(path), "w", options={"live": "1"}) as container:
            stream = container.add_stream("mpeg4", rate=5)
            stream.width, stream.height, stream.pix_fmt = 32, 24, "yuv420p"
            for _ in range(7):
                container.mux(stream.encode(av.VideoFrame.from_ndarray(np.zeros((24, 32, 3), np.uint8), format="rgb24")))
            container.mux(stream.encode(None))
        with av.open(str(path)) as container:
            assert container.streams.video[0].frames == 0
        assert video_info(MediaRef(path=str(path))).num_frames == 7

    def test_rotated_as_phones_write_it(self, tmp_path: Path) -> None:
        """The left half is white; a quarter turn clockwise, as the track header asks for, puts it on top."""
        path = tmp_path / "v.mp4"
        pixels = np.zeros((16, 32, 3), np.uint8)
        pixels[:, :16] = 255
        with av.open(str(path), "w") as container:
            stream = container.add_stream("mpeg4", rate=5)
            stream.width, stream.height, stream.pix_fmt = 32, 16, "yuv420p"
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
            container.mux(stream.encode(None))
        content = bytearray(path.read_bytes())
        at = content.index(b"tkhd") + 4 + 40  # of the matrix: 1 0 / 0 1 becomes 0 1 / -1 0
        one, minus_one, zero = (1 << 16).to_bytes(4, "big"), ((-1 << 16) & 0xFFFFFFFF).to_bytes(4, "big"), bytes(4)
        content[at : at + 36] = zero + one + zero + minus_one + zero + zero + zero + zero + (1 << 30).to_bytes(4, "big")
        path.write_bytes(content)
        ref = MediaRef(path=str(path))
        assert (video_info(ref).width, video_info(ref).height) == (16, 32)
        turned = np.asarray(read_frames(ref, [0])[0])
        assert turned[:14].mean() > 230 > 25 > turned[18:].mean()

    def test_refused(self, tmp_path: Path) -> None:
        video = write_video(tmp_path / "v.mp4")
        ref = MediaRef(path=str(video))
        with pytest.raises(MediaError, match="only 10 frames can be decoded"):
            read_frames(ref, [3, 10])
        with pytest.raises(MediaError, match="counted from 0"):
            read_frames(ref, [-1])
        (tmp_path / "text.mp4").write_text("nothing")
        with pytest.raises(MediaError, match=r"text\.mp4 cannot be opened as a video"):
            video_info(MediaRef(path=str(tmp_path / "text.mp4")))
        (tmp_path / "cut.mp4").write_bytes(video.read_bytes()[:300])
        with pytest.raises(MediaError, match=r"cut\.mp4"):
            video_info(MediaRef(path=str(tmp_path / "cut.mp4")))
        picture().save(tmp_path / "odd.png")
        picture(20, 20).save(tmp_path / "other.png")
        frames = MediaRef(frames=tuple(MediaRef(path=str(tmp_path / name)) for name in ("odd.png", "other.png")))
        with pytest.raises(MediaError, match="must be of one size"):
            video_info(frames)
        with pytest.raises(MediaError, match="of 2 given"):
            read_frames(frames, [2])
        with pytest.raises(MediaError, match="image object"):
            video_info(MediaRef(image=picture()))

    def test_playlists_open_nothing_else(self, tmp_path: Path) -> None:
        """FFmpeg would follow them to other files and addresses."""
        video = write_video(tmp_path / "v.ts", codec="mpeg2video")
        (tmp_path / "list.mp4").write_text(f"#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:2,\n{video}\n#EXT-X-ENDLIST\n")
        (tmp_path / "concat.mp4").write_text(f"ffconcat version 1.0\nfile {video}\n")
        for name in ("list.mp4", "concat.mp4"):
            with pytest.raises(MediaError, match="cannot be opened"):
                video_info(MediaRef(path=str(tmp_path / name)))

    def test_users_videos(self, example_data: Path) -> None:
        known = {"1.mp4": (243, 640, 360), "2.avi": (270, 320, 240), "3.mp4": (146, 640, 360), "4.mp4": (150, 224, 224)}
        for name, (frames, width, height) in known.items():
            ref = MediaRef(path=str(example_data / "llamafactory_demo" / "mllm_demo_data" / name))
            info = video_info(ref)
            assert (info.num_frames, info.width, info.height) == (frames, width, height)
            assert read_frames(ref, [frames - 1])[0].size == (width, height)


class TestKeys:
    def test_content_counts(self, tmp_path: Path) -> None:
        content = encoded(picture())
        for name in ("a.png", "b.png"):
            (tmp_path / name).write_bytes(content)
        a, b = (MediaRef(path=str(tmp_path / name)) for name in ("a.png", "b.png"))
        assert media_key(a) == media_key(b) == media_key(MediaRef(data=content))
        assert len(media_key(a)) == 32
        assert media_key(MediaRef(data=content + b" ")) != media_key(a)

    def test_changed_file_is_hashed_anew(self, tmp_path: Path) -> None:
        path = tmp_path / "a.png"
        path.write_bytes(encoded(picture()))
        ref = MediaRef(path=str(path))
        before, size = media_key(ref), image_size(ref)
        path.write_bytes(encoded(picture(20, 30)))
        assert media_key(ref) != before
        assert image_size(ref) == (20, 30) != size

    def test_pil_objects(self) -> None:
        key = media_key(MediaRef(image=picture()))
        assert key == media_key(MediaRef(image=picture()))
        assert key != media_key(MediaRef(image=picture(8, 12)))
        assert key != media_key(MediaRef(image=picture().convert("L")))

    def test_frames(self) -> None:
        frames = [MediaRef(image=picture(seed=seed)) for seed in range(3)]
        assert media_key(MediaRef(frames=tuple(frames))) != media_key(MediaRef(frames=tuple(frames[::-1])))


class _Handler(http.server.SimpleHTTPRequestHandler):
    def do_GET(self) -> None:
        redirects = {"/to-file": "file:///etc/hostname", "/to-private": "http://10.0.0.1/a.png", "/to-image": "/a.png"}
        if self.path in redirects:
            self.send_response(302)
            self.send_header("Location", redirects[self.path])
            self.end_headers()
        else:
            super().do_GET()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A web server on this machine, with /a.png."""
    (tmp_path / "www").mkdir()
    picture().save(tmp_path / "www" / "a.png")
    monkeypatch.setenv("FINESIGHT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("no_proxy", "*")
    handler = functools.partial(_Handler, directory=str(tmp_path / "www"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()


class TestAddresses:
    def test_fetched_once(self, server: str, tmp_path: Path) -> None:
        ref = MediaPolicy(allow_urls=True).resolve(f"{server}/a.png", beside=tmp_path)
        assert np.array_equal(open_image(ref), picture())
        (tmp_path / "www" / "a.png").unlink()
        assert image_size(ref) == (12, 8)
        assert media_key(ref)

    def test_redirect_on_the_same_host(self, server: str) -> None:
        assert image_size(MediaRef(url=f"{server}/to-image")) == (12, 8)

    @pytest.mark.parametrize(
        ("path", "reason"), [("to-file", "not allowed"), ("to-private", "private address"), ("missing.png", "404"), ("www", "404")]
    )
    def test_refused(self, server: str, path: str, reason: str) -> None:
        with pytest.raises(MediaError, match=reason):
            image_size(MediaRef(url=f"{server}/{path}"))

    def test_size_cap(self, server: str, tmp_path: Path) -> None:
        with pytest.raises(MediaError, match="more than"):
            fetch_module.fetch(f"{server}/a.png", max_bytes=10)
        assert not list((tmp_path / "cache").rglob("*.png"))

    def test_a_name_that_leads_to_a_private_address(self, server: str, monkeypatch: pytest.MonkeyPatch) -> None:
        port = server.rsplit(":", 1)[1]
        real = fetch_module.http.client.socket.create_connection
        monkeypatch.setattr(
            fetch_module.http.client.socket,
            "create_connection",
            lambda address, *args, **kwargs: real(("127.0.0.1", address[1]), *args, **kwargs),
        )
        with pytest.raises(MediaError, match=r"leads to the private address 127\.0\.0\.1"):
            fetch_module.fetch(f"http://images.example.org:{port}/a.png")

    def test_nobody_answers(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("FINESIGHT_CACHE", str(tmp_path))
        monkeypatch.setenv("no_proxy", "*")
        with pytest.raises(MediaError, match="cannot be fetched"):
            fetch_module.fetch("http://127.0.0.1:9/a.png", timeout_s=2)
