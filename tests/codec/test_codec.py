"""Compressed images: the same values back on every machine, small files, and no harm from hostile ones."""

import json
import struct
import tracemalloc
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from conftest import textured
from PIL import Image

import latentvae
from latentvae.base.errors import CodecError
from latentvae.cli.main import main
from latentvae.codec import coding, container, quantisation
from latentvae.codec.compression import check_model, compress, decompress
from latentvae.codec.probabilities import FRACTIONS, REACH, TOTAL, scales, tables
from latentvae.images.reading import load_image
from latentvae.images.tensors import from_uint8
from latentvae.measure.metrics import psnr
from latentvae.models.fingerprint import weight_hash
from latentvae.models.latents import decode, encode

if TYPE_CHECKING:
    from diffusers import AutoencoderKL


def latents(channels: int, height: int, width: int, spread: float, seed: int = 0) -> np.ndarray:
    """Smooth random fields with a few outliers, in steps, as an encoder's latents are."""
    random = np.random.default_rng(seed)
    fields = random.normal(0, spread, (channels, height, width))
    for _ in range(4):
        fields = sum(np.roll(fields, (dy, dx), (1, 2)) for dy in (0, 1) for dx in (0, 1)) / 2.8
    return fields * np.where(random.random(fields.shape) < 0.01, 5, 1)


def picture(width: int, height: int, seed: int = 0) -> torch.Tensor:
    return from_uint8(textured(width, height, seed))[None]


@pytest.fixture(scope="module")
def vae() -> "AutoencoderKL":
    """A tiny untrained model whose scaling_factor fits its latents of `picture`."""
    torch.manual_seed(0)
    model = latentvae.build("tiny").eval()
    with torch.no_grad():
        std = encode(model, picture(64, 64))[0].mode().std().item()
    model.register_to_config(scaling_factor=1 / std)
    return model


@pytest.mark.parametrize("shape", [(1, 1, 1), (4, 1, 9), (3, 9, 1), (2, 5, 7), (4, 12, 16), (16, 6, 5)])
@pytest.mark.parametrize("spread", [0.0, 0.3, 3.0, 60.0, 900.0])
def test_decoding_gives_the_coded_values_bit_by_bit(shape, spread):
    targets = latents(*shape, spread)
    values, payload = coding.entropy_encode(targets)
    assert np.array_equal(values, np.rint(targets))
    assert np.array_equal(coding.entropy_decode(payload, shape), values)
    assert coding.entropy_encode(targets)[1] == payload


def test_preferring_short_codes_stays_within_one_step_and_saves_bytes():
    targets = latents(4, 24, 24, 1.0)
    plain, long = coding.entropy_encode(targets)
    values, short = coding.entropy_encode(targets, 0.2)
    assert np.array_equal(coding.entropy_decode(short, values.shape), values)
    assert np.abs(values - targets).max() < 1
    assert (values != plain).any()
    assert len(short) < 0.97 * len(long)


# Made by the first version of the format. If this changes, files that people have can no longer be read:
# raise VERSION, and keep reading the old one.
GOLDEN = (
    "030c0400e54413f6080f8b9e049d1bdf728762da1028353ba932d6475f8dc2a7f7bceec50483d21eba6974f062f9f17c"
    "c36c47664cd7441da309132f049bee729b90226087fb4970"
)


def golden_values() -> np.ndarray:
    """Whole numbers from integer arithmetic: a ramp, a repeated pattern, and outliers."""
    index = np.arange(2 * 6 * 7)
    values = index % 7 - 3 + index * index % 11 // 3
    values[[5, 40, 77]] = -70, 300, 9000
    return values.reshape(2, 6, 7)


def test_the_format_is_the_committed_one():
    values = golden_values()
    assert coding.entropy_encode(values)[1].hex() == GOLDEN
    assert np.array_equal(coding.entropy_decode(bytes.fromhex(GOLDEN), values.shape), values)


def test_tables_are_whole_numbers_that_sum_to_one_and_peak_at_the_prediction():
    counts = tables()
    assert np.array_equal(counts, np.floor(counts))
    assert counts.min() >= 1
    assert (counts.astype(np.int64).sum(1) == TOTAL).all()
    middle = counts[FRACTIONS // 2 :: FRACTIONS, 1:-1]  # predictions are whole; the ends stand for more
    assert (middle.max(1) - middle[:, middle.shape[1] // 2] <= 1).all()  # but for rounding
    spreads = (counts * np.abs(np.arange(counts.shape[1]) - REACH)).sum(1)[FRACTIONS // 2 :: FRACTIONS]
    assert (np.diff(spreads) > 0).all()
    assert (np.diff(scales()) > 0).all()


def test_correlated_latents_take_fewer_bits_than_each_channels_own_distribution():
    values = np.rint(latents(4, 48, 48, 4.0)).astype(int)
    bits = 0.0
    for channel in values:
        share = np.unique(channel, return_counts=True)[1] / channel.size
        bits -= channel.size * float((share * np.log2(share)).sum())
    assert 8 * len(coding.entropy_encode(values)[1]) < 0.95 * bits


def test_values_beyond_every_table_and_infinite_ones_are_refused():
    for bad in (1e6, np.inf, np.nan):
        with pytest.raises(CodecError, match="steps came"):
            coding.entropy_encode(np.full((1, 2, 2), bad))


@pytest.mark.parametrize("size", [(64, 48), (61, 35), (1, 1), (9, 200)])
def test_an_image_of_any_size_comes_back_as_its_quantised_latents_decode(vae, size):
    images = picture(*size)
    data = compress(vae, images, quality=70)
    header, payload = container.unpack(data)
    posterior, padding = encode(vae, images)
    values = coding.entropy_decode(payload, tuple(posterior.mode().shape[1:]))
    assert np.abs(values - quantisation.in_steps(posterior.mode().detach(), header.steps)).max() < 1
    assert header.padding == padding
    with torch.no_grad():
        wanted = decode(vae, quantisation.dequantise(values, header.steps), padding)
    found = decompress(vae, data)
    assert found.shape == images.shape
    assert torch.equal(found, wanted)
    assert compress(vae, images, quality=70) == data


def test_a_greyscale_model_compresses_greyscale_images():
    torch.manual_seed(0)
    model = latentvae.build("tiny", in_channels=1, out_channels=1).eval()
    images = picture(40, 33).mean(1, keepdim=True)
    assert decompress(model, compress(model, images)).shape == images.shape


def test_higher_quality_takes_more_bytes_and_comes_closer(vae):
    images = picture(96, 80)
    mode = encode(vae, images)[0].mode().detach()
    sizes, errors = [], []
    for quality in (1, 20, 40, 60, 80, 100):
        data = compress(vae, images, quality=quality)
        header, payload = container.unpack(data)
        values = coding.entropy_decode(payload, tuple(mode.shape[1:]))
        sizes.append(len(data))
        errors.append(float((quantisation.dequantise(values, header.steps) - mode).square().mean()))
    assert sizes == sorted(sizes)
    assert len(set(sizes)) == len(sizes)
    assert errors == sorted(errors, reverse=True)


def test_the_help_says_which_way_quality_is_better(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")  # words in one line
    with pytest.raises(SystemExit, match="0"):
        main(["compress", "--help"])
    said = " ".join(capsys.readouterr().out.replace("\u2502", " ").split())
    assert "1: smallest file, 100: best picture" in said
    assert "[default: (f8c4-small)]" in said


def test_the_help_says_that_a_file_knows_its_model(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit, match="0"):
        main(["decompress", "--help"])
    said = " ".join(capsys.readouterr().out.replace("\u2502", " ").split())
    assert "[default: (the bundled one it was made by)]" in said


@pytest.mark.parametrize("quality", [0, 101])
def test_a_quality_out_of_range_is_refused(vae, quality):
    with pytest.raises(CodecError, match=r"1 \(smallest\) to 100"):
        compress(vae, picture(16, 16), quality=quality)


def test_a_batch_is_refused(vae):
    with pytest.raises(CodecError, match="one at a time"):
        compress(vae, torch.zeros(2, 3, 16, 16))


def test_another_model_is_refused_with_the_hash_of_the_one_that_is_needed(vae):
    data = compress(vae, picture(24, 16))
    torch.manual_seed(1)
    other = latentvae.build("tiny").eval()
    with pytest.raises(CodecError, match=f"begins with {weight_hash(vae)[:16]}; this one's is"):
        decompress(other, data)


def test_the_bundled_model_is_named_where_it_is_the_one_that_is_needed(vae):
    header, _ = container.unpack(compress(vae, picture(24, 16)))
    needed = bytes.fromhex(weight_hash(latentvae.load()))[:8]
    with pytest.raises(CodecError, match="the bundled f8c4-small"):
        check_model(vae, replace(header, weights=needed))


def test_the_weight_hash_is_of_values_not_of_dtypes_and_layouts(vae):
    same = latentvae.build("tiny").half()
    wide = latentvae.build("tiny")
    wide.load_state_dict({key: value.float() for key, value in same.state_dict().items()})
    assert weight_hash(same) == weight_hash(wide)
    assert weight_hash(wide.to(memory_format=torch.channels_last)) == weight_hash(same)
    assert weight_hash(latentvae.optimize(wide)) == weight_hash(same)
    with torch.no_grad():
        wide.decoder.conv_out.bias[0] += 1e-3
    assert weight_hash(wide) != weight_hash(same)


def test_a_damaged_file_gives_its_image_or_an_error_and_never_much_memory(vae):
    data = compress(vae, picture(40, 24), quality=60)
    wanted, random = decompress(vae, data), np.random.default_rng(0)
    changed = 0
    tracemalloc.start()
    for trial in range(300):
        broken = bytearray(data)
        if trial % 3 == 0:
            broken[random.integers(len(broken))] ^= 1 << random.integers(8)
        elif trial % 3 == 1:
            del broken[random.integers(len(broken)) :]
        else:
            start = random.integers(len(broken))
            broken[start : start + 8] = random.bytes(random.integers(12))
        try:
            assert torch.equal(decompress(vae, bytes(broken)), wanted)
            assert bytes(broken) == data
        except CodecError:
            changed += 1
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 20e6
    assert changed > 250


def with_checksum(body: bytes) -> bytes:
    return body + struct.pack("<I", zlib.crc32(body))


def test_a_forged_payload_with_a_right_checksum_is_an_error_or_an_image(vae):
    data, random = compress(vae, picture(40, 24), quality=60), np.random.default_rng(0)
    head = container.FIXED.size + 2 * 4
    outcomes = set()
    for _ in range(60):
        body = bytearray(data[:-4])
        start = random.integers(head, len(body) - 1)
        body[start:] = random.bytes(len(body) - start)
        try:
            outcomes.add(tuple(decompress(vae, with_checksum(bytes(body))).shape))
        except CodecError:
            outcomes.add("refused")
    assert (1, 3, 24, 40) in outcomes


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"width": 100_000, "height": 100_000}, "more than the"),
        ({"width": 8_000, "height": 8_000}, "more than the"),
        ({"width": 4_000, "height": 4_000}, "too short"),
        ({"width": 0}, "damaged"),
        ({"steps": (0.0,) * 4}, "steps"),
        ({"steps": (float("nan"),) * 4}, "steps"),
        ({"steps": (0.1,) * 3}, "do not fit"),
        ({"steps": (0.1,) * 200}, "200 channels"),
        ({"image_channels": 1}, "do not fit"),
        ({"right": 200}, "do not fit"),
        ({"bottom": 3}, "do not fit"),
    ],
)
def test_a_header_that_lies_is_refused_before_anything_large_is_made(vae, change, words):
    header, payload = container.unpack(compress(vae, picture(40, 24)))
    tracemalloc.start()
    with pytest.raises(CodecError, match=words):
        decompress(vae, container.pack(replace(header, **change), payload))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 20e6


def test_a_file_that_claims_gigabytes_is_not_read(tmp_path):
    body = container.FIXED.pack(b"LVAE", 1, bytes(8), 64, 64, 0, 0, 3, 4, 50, 4 * (1 << 29))
    (tmp_path / "a.lvae").write_bytes(body + bytes(100))
    with pytest.raises(CodecError, match="its header says 2147"):
        container.read_lvae(tmp_path / "a.lvae")
    sparse = tmp_path / "b.lvae"
    with sparse.open("wb") as file:
        file.write(body)
        file.truncate(container.FIXED.size + 8 + 4 * (1 << 29) + 4)
    with pytest.raises(CodecError, match="a payload of 2147"):
        container.read_lvae(sparse)


@pytest.mark.parametrize(
    "data", [b"", b"LV", b"LVAE", b"\x89PNG\r\n\x1a\n" + bytes(99), b"LVAE\x02" + bytes(99)]
)
def test_what_is_no_lvae_file_is_refused(vae, data):
    with pytest.raises(CodecError, match=r"no \.lvae file|cut off|version 2"):
        decompress(vae, data)


Command = Callable[..., tuple[int, dict]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Command:
    """Run a verb with --json; returns the exit code and the object."""

    def call(*arguments: object) -> tuple[int, dict]:
        with pytest.raises(SystemExit) as stop:
            main([*map(str, arguments), "--json"])
        return stop.value.code or 0, json.loads(capsys.readouterr().out)

    return call


@pytest.fixture
def files(vae, tmp_path: Path) -> Path:
    """A folder with a model and an odd-sized photograph, the working folder of the verbs."""
    vae.save_pretrained(tmp_path / "model")
    Image.fromarray(textured(61, 45, 3)).save(tmp_path / "photo.png")
    return tmp_path


def test_the_verbs_write_a_file_of_the_size_they_say_and_its_image(run, files):
    photo, small, back = files / "photo.png", files / "photo.lvae", files / "back.png"
    code, said = run("compress", photo, small, "--model", files / "model", "--quality", 80)
    assert code == 0
    assert said["bytes"] == small.stat().st_size
    assert said["bpp"] == pytest.approx(8 * said["bytes"] / (61 * 45))
    code, shown = run("decompress", small, back, "--model", files / "model")
    assert (code, shown["width"], shown["height"]) == (0, 61, 45)
    found = psnr(load_image(photo)[None], load_image(back)[None]).item()
    assert said["psnr"] == pytest.approx(found, abs=1e-3)


def test_tiles_give_the_same_file(run, files):
    Image.fromarray(textured(200, 90, 3)).save(files / "photo.png")
    for name, options in (("whole.lvae", ()), ("tiled.lvae", ("--tile-size", 64))):
        code, _ = run("compress", files / "photo.png", files / name, "--model", files / "model", *options)
        assert code == 0
        code, _ = run("decompress", files / name, files / f"{name}.png", "--model", files / "model", *options)
        assert code == 0
    whole, tiled = (load_image(files / f"{name}.png") for name in ("whole.lvae", "tiled.lvae"))
    assert (whole - tiled).abs().mean() < 1e-3


def test_no_photograph_is_written_over(run, files):
    photo, other = files / "photo.png", files / "other.png"
    other.write_bytes(photo.read_bytes())
    for output in (other, photo, files):
        code, said = run("compress", photo, output, "--model", files / "model")
        assert code == 2
        assert "ends in .lvae" in said["error"]
    assert other.read_bytes() == photo.read_bytes()
    small = files / "photo.lvae"
    assert run("compress", photo, small, "--model", files / "model")[0] == 0
    before = small.read_bytes()
    assert run("decompress", small, small, "--model", files / "model")[0] == 2
    assert small.read_bytes() == before
    code, said = run("decompress", small, other, "--model", files / "model")
    assert (code, other.read_bytes()) == (2, photo.read_bytes())
    assert "--overwrite" in said["error"]
    assert run("decompress", small, other, "--model", files / "model", "--overwrite")[0] == 0
    assert other.read_bytes() != photo.read_bytes()


def test_the_verbs_say_what_is_wrong_with_code_2(run, files):
    photo, small = files / "photo.png", files / "photo.lvae"
    assert run("compress", photo, small, "--model", files / "model")[0] == 0
    code, said = run("decompress", small, files / "back.png")  # the bundled model
    assert code == 2
    assert "needs the VAE" in said["error"]
    assert not (files / "back.png").exists()
    for arguments in (
        ("decompress", photo, files / "back.png"),
        ("decompress", files / "none.lvae", files / "back.png"),
        ("compress", files, small),
        ("compress", files / "none.png", small),
        ("compress", photo, files / "nowhere" / "a.lvae", "--model", files / "model"),
        ("compress", photo, photo / "a.lvae", "--model", files / "model"),  # below a file
        ("compress", photo, files / f"{'a' * 250}.lvae", "--model", files / "model"),
        ("compress", files / ("a" * 300), small),
        ("decompress", small, files / "back.tiff"),
        ("decompress", small, files / "nowhere" / "back.png"),
    ):
        code, said = run(*arguments)
        assert code == 2
        assert said["error"]


def test_pixels_that_were_only_padding_do_not_make_an_image_too_large():
    header = container.Header(bytes(8), 1001, 1000, 7, 0, 3, 50, (0.125,) * 4)
    data = container.pack(header, bytes(8))
    assert container.unpack(data, max_pixels=1001 * 1000)[0] == header
    with pytest.raises(CodecError, match="more than the 1000999"):
        container.unpack(data, max_pixels=1001 * 1000 - 1)
    line = container.pack(replace(header, width=10**6, height=1, right=0, bottom=7), bytes(8))
    with pytest.raises(CodecError, match="more than the"):
        container.unpack(line, max_pixels=10**6)


def test_large_photographs_are_measured_after_they_are_compressed(run, files, monkeypatch):
    monkeypatch.setattr(
        "latentvae.codec.compression.decompress", lambda *_: pytest.fail("its limit is for strangers' files")
    )
    assert run("compress", files / "photo.png", files / "a.lvae", "--model", files / "model")[0] == 0
