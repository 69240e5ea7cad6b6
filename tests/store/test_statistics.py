"""What a store says of its scaled latents: against the latents themselves, whoever encoded them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import textured
from PIL import Image
from safetensors.torch import load_file, save_file
from stores import moments_of, write_store

from latentvae.base.errors import StoreError
from latentvae.base.files import file_sha256
from latentvae.cli.main import main
from latentvae.models.latents import Scaling, compute_latent_statistics
from latentvae.store import statistics
from latentvae.store.dataset import LatentDataset
from latentvae.store.encoding import Worker, encode_folder
from latentvae.store.format import (
    STATISTICS,
    Entry,
    read_entries,
    read_manifest,
    tensors_path,
    write_manifest,
)
from latentvae.store.verification import verify


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Seven small pictures of two sizes."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for number in range(7):
        Image.fromarray(textured((24, 40)[number % 2], 16, number)).save(folder / f"{number}.png")
    return folder


def encode(vae: Any, photos: Path, store: Path, **options: Any) -> Any:
    return encode_folder(vae, photos, store, **{"shard_size": 3, "batch_size": 2, "dtype": "fp32", **options})


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run `latentvae ...` in this process; what it printed."""

    def run(*arguments: object) -> str:
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            main([str(argument) for argument in arguments])
        assert not stop.value.code
        return capsys.readouterr().out

    return run


def files(store: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in store.iterdir()}


def test_they_are_those_of_the_scaled_latents(tiny_vae: Any, photos: Path, tmp_path: Path) -> None:
    tiny_vae.register_to_config(scaling_factor=1.7, shift_factor=0.2)
    encode(tiny_vae, photos, tmp_path / "store", flips=True)
    manifest = read_manifest(tmp_path / "store")
    found = manifest.statistics
    assert found is not None
    dataset = LatentDataset(tmp_path / "store", mode="mode")
    latents = torch.cat([item["latents"].flatten(1) for item in map(dataset.__getitem__, range(7))], 1)
    assert (found.images, found.values) == (7, latents.shape[1])
    np.testing.assert_allclose(found.mean, latents.double().mean(1), rtol=1e-5, atol=1e-6)
    images = [
        torch.from_numpy(np.array(Image.open(p))).permute(2, 0, 1)[None] / 127.5 - 1
        for p in sorted(photos.iterdir())
    ]
    wanted = compute_latent_statistics(tiny_vae, images)
    unscaled = statistics.unscaled(found, manifest)
    np.testing.assert_allclose(unscaled["latents_mean"], wanted.latents_mean, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(unscaled["latents_std"], wanted.latents_std, rtol=1e-4)
    assert verify(tmp_path / "store") == []


def test_percentiles_are_those_of_samples() -> None:
    moments = torch.cat([torch.randn(1, 300, 300) * 2 + 1, torch.full((1, 300, 300), 2.0)])[None]
    # logvar 2: a standard deviation of e; and all of it times 3
    entry = Entry("a.png", "a.png", "", 0, 0, 0, 0, None, None, (0, 0, 0, 0), "moments.300x300", 0)
    tensor = statistics.summarize({"moments.300x300": moments}, [entry], Scaling(0.5, 3.0))[STATISTICS]
    found = statistics._conclude(tensor.numpy(), 1)
    assert found is not None
    spread = 3 * np.hypot(2, np.e)
    assert found.mean[0] == pytest.approx(1.5, abs=0.1)
    assert found.std[0] == pytest.approx(spread, rel=0.01)
    for name, normal in (("1", -2.3263), ("25", -0.6745), ("50", 0.0), ("75", 0.6745), ("99", 2.3263)):
        assert found.percentiles[name][0] == pytest.approx(1.5 + spread * normal, abs=0.04 * spread), name
    assert list(found.percentiles) == ["0.1", "1", "5", "25", "50", "75", "95", "99", "99.9"]


def test_a_percentile_is_within_a_bin_of_the_values() -> None:
    values = np.array([-4000.0, -2.0, -0.7, 0.0, 1e-9, 0.3, 0.31, 1.5, 900.0], np.float32)
    counts = statistics._histogram(values)
    assert counts.sum() == len(values)
    for q, wanted in ((30, -0.7), (60, 0.3), (85, 1.5), (95, 900.0)):
        assert statistics._percentile(counts, q) == pytest.approx(wanted, rel=0.07)
    assert statistics._percentile(counts, 99.999) <= 1024  # the last bin's end
    assert abs(statistics._percentile(counts, 50)) < 1e-3


def test_a_kill_changes_no_byte(tiny_vae: Any, photos: Path, tmp_path: Path, monkeypatch: Any) -> None:
    encode(tiny_vae, photos, tmp_path / "whole")
    write, written = Worker._write, list[str]()

    def killed(worker: Worker, pending: Any) -> None:
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(pending.name)
        write(worker, pending)

    monkeypatch.setattr(Worker, "_write", killed)
    with pytest.raises(KeyboardInterrupt):
        encode(tiny_vae, photos, tmp_path / "pieces")
    monkeypatch.undo()
    assert len(written) == 2
    encode(tiny_vae, photos, tmp_path / "pieces")
    assert files(tmp_path / "whole") == files(tmp_path / "pieces")


def test_new_and_pruned_images_move_them(tiny_vae: Any, photos: Path, tmp_path: Path) -> None:
    encode(tiny_vae, photos, tmp_path / "store")
    (photos / "6.png").unlink()
    encode(tiny_vae, photos, tmp_path / "store", prune=True)
    encode(tiny_vae, photos, tmp_path / "six")
    assert read_manifest(tmp_path / "store").statistics == read_manifest(tmp_path / "six").statistics


def test_a_store_of_an_earlier_version_is_read(tmp_path: Path, command: Any) -> None:
    store = write_store(tmp_path / "store", [[(2, 3), (4, 2)], [(2, 3)]])
    assert b"statistics" not in (store / "store.json").read_bytes()
    manifest = read_manifest(store)
    assert manifest.statistics is None
    assert verify(store) == []
    figures = json.loads(command("info", store, "--json"))
    means = [
        Scaling.of(manifest).scale(moments_of(n, size)[:4]).flatten(1)
        for n, size in enumerate([(2, 3), (4, 2), (2, 3)])
    ]
    np.testing.assert_allclose(
        figures["statistics"]["mean"], torch.cat(means, 1).mean(1), rtol=1e-5, atol=1e-6
    )
    assert (figures["images"], figures["shards"], figures["statistics"]["values"]) == (3, 2, 20)


def test_a_run_keeps_shards_of_an_earlier_version(tiny_vae: Any, photos: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    encode(tiny_vae, photos, store)
    whole = read_manifest(store)
    records = []
    for record in whole.shards:
        path = tensors_path(store, record.name)
        tensors = load_file(path)
        del tensors[STATISTICS]
        save_file(tensors, path)
        records.append(record.model_copy(update={"sha256": file_sha256(path)}))
    old = whole.model_copy(update={"shards": records, "statistics": None})
    write_manifest(store, old)
    before = files(store)
    assert encode(tiny_vae, photos, store).encoded == 0
    assert files(store) == before
    assert statistics.compute(store, old) == whole.statistics
    Image.fromarray(textured(24, 16, 9)).save(photos / "9.png")
    assert encode(tiny_vae, photos, store).encoded == 1  # the new image alone
    assert read_manifest(store).statistics is None


def test_info_is_a_table(tiny_vae: Any, photos: Path, tmp_path: Path, command: Any) -> None:
    encode(tiny_vae, photos, tmp_path / "store")
    lines = command("info", tmp_path / "store").splitlines()
    assert "images          7" in lines
    header = next(line for line in lines if "channel" in line and "99.9 %" in line)
    assert header.split()[:3] == ["channel", "mean", "std"]
    assert "latents_std" in header
    assert len(lines) - lines.index(header) - 1 == 4


def test_a_shard_that_is_gone_is_named(tmp_path: Path) -> None:
    store = write_store(tmp_path / "store", [[(2, 3)]])
    manifest = read_manifest(store)
    assert len(read_entries(store, manifest.shards[0].name)) == 1
    tensors_path(store, manifest.shards[0].name).unlink()
    with pytest.raises(StoreError, match=r"latents-00000\.safetensors cannot be read"):
        statistics.compute(store, manifest)
