"""Shards encoded elsewhere: by Ray, whose nodes come and go, the store is that of one process."""

import copy
import json
import re
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import textured
from PIL import Image

import latentvae
from latentvae.base.errors import SourceError, StoreError
from latentvae.cli.encode import _batch_size, equip_node, tile_large
from latentvae.cli.main import main
from latentvae.models.fingerprint import weight_hash
from latentvae.store.cluster import Ray
from latentvae.store.encoding import EncodeReport, Moments, Worker, Workload, encode_folder
from latentvae.store.format import assemble
from latentvae.store.journal import Journal
from latentvae.store.parts import WHOLE
from latentvae.store.settings import BATCH_SIZE

COUNT, SHARD = 11, 2


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Pictures of two sizes, and a file that is none."""
    (tmp_path / "photos").mkdir()
    for number in range(COUNT):
        Image.fromarray(textured((24, 16)[number % 2], 16, number)).save(
            tmp_path / f"photos/{number:02d}.png"
        )
    (tmp_path / "photos/05.png").write_bytes(b"no picture")
    return tmp_path / "photos"


def encode(vae: Any, photos: Path, store: Path, engine: Any = None, **options: Any) -> EncodeReport:
    work = Workload(threads=1, workers=1, engine=engine)
    options = {"shard_size": SHARD, "batch_size": 2, "flips": True, **options}
    return encode_folder(vae, photos, store, workload=work, **options)


def content(store: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in store.rglob("*") if path.is_file()}


def elsewhere(vae: Any, settings: Any, sources: Any, shards: Any) -> Iterator[Moments]:
    """An engine that has no folder of a store, and hands shards over in another order."""
    for shard in reversed(shards):
        worker = Worker(vae, Journal(Path("/nowhere")), settings, sources, Workload(1, 1), WHOLE)
        yield worker.compute(shard)


def test_another_engine_makes_the_same_bytes(tiny_vae: Any, photos: Path, tmp_path: Path) -> None:
    engine = partial(elsewhere, tiny_vae)
    reports = [
        encode(tiny_vae, photos, tmp_path / "local"),
        encode(tiny_vae, photos, tmp_path / "far", engine),
    ]
    assert content(tmp_path / "far") == content(tmp_path / "local")
    assert [(report.images, len(report.failures)) for report in reports] == [(COUNT - 1, 1)] * 2
    # one changes, and another of its shard is gone, whose moments are in the store alone
    Image.fromarray(textured(24, 16, 77)).save(photos / "02.png")
    (photos / "03.png").unlink()
    reports = [
        encode(tiny_vae, photos, tmp_path / "local"),
        encode(tiny_vae, photos, tmp_path / "far", engine),
    ]
    assert content(tmp_path / "far") == content(tmp_path / "local")
    assert [report.vanished for report in reports] == [["03.png"]] * 2


def test_what_an_engine_had_done_when_it_stopped_is_kept(tiny_vae: Any, photos: Path, tmp_path: Path) -> None:
    def breaks(*args: Any) -> Iterator[Moments]:
        for number, found in enumerate(elsewhere(tiny_vae, *args)):
            if number == 2:
                raise KeyboardInterrupt
            yield found

    with pytest.raises(KeyboardInterrupt):
        encode(tiny_vae, photos, tmp_path / "store", breaks)
    assert not (tmp_path / "store/store.json").exists()
    report = encode(tiny_vae, photos, tmp_path / "store", partial(elsewhere, tiny_vae))
    assert report.encoded == COUNT - 3  # of two shards, one of which holds a single image
    encode(tiny_vae, photos, tmp_path / "clean")
    assert content(tmp_path / "store") == content(tmp_path / "clean")


def test_without_ray_the_extra_is_named(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    for options, said in (
        ((), ("--engine ray needs ray, which cannot be imported", "[ray]")),
        (("--part", "0/2"), ("--engine ray came for part 0/2 of several",)),
        (("--device", "cpu"), ("--device came with --engine ray",)),
    ):
        with pytest.raises(SystemExit) as stop:
            main(["encode", str(photos), str(tmp_path / "store"), "--engine", "ray", *options])
        assert stop.value.code == 2
        found = capsys.readouterr().err
        assert all(each in found for each in said)
    assert not (tmp_path / "store").exists()


class Died(Exception):
    """What Ray raises where a node died too often."""


class Failed(Died):
    """What it raises where a task did."""

    def __init__(self, cause: Exception) -> None:
        super().__init__(str(cause))
        self.cause = cause


class OneNode:
    """As much of Ray as the engine asks for: tasks run at once, here, on a node of two cores."""

    exceptions = SimpleNamespace(RayTaskError=Failed, RayError=Died)

    def __init__(self, failures: dict[str, Exception] | None = None) -> None:
        self.failures, self.options = failures or {}, dict[str, Any]()
        self.waiting, self.most, self.cancelled = list[Any](), 0, list[Any]()

    def is_initialized(self) -> bool:
        return True

    def cluster_resources(self) -> dict[str, float]:
        return {"CPU": 2.0}

    def nodes(self) -> list[dict[str, Any]]:
        return [{"Alive": True, "Resources": {"CPU": 2.0}}, {"Alive": False, "Resources": {"CPU": 64.0}}]

    def put(self, value: Any) -> Any:
        return (value,)

    def remote(self, **options: Any) -> Any:
        self.options = options

        def submit(run: str, tools: list[Any], shard: Any) -> Any:
            task = object()
            self.waiting.append((task, tools, shard))
            self.most = max(self.most, len(self.waiting))
            return task

        return lambda function: SimpleNamespace(options=lambda **_: SimpleNamespace(remote=submit))

    def wait(self, tasks: list[Any], num_returns: int) -> tuple[list[Any], list[Any]]:
        return tasks[-1:], tasks[:-1]

    def get(self, task: Any) -> Any:
        (found,) = [each for each in self.waiting if each[0] is task]
        self.waiting.remove(found)
        (vae,), (sources,), ((settings, equip),) = found[1]
        if found[2].name in self.failures:
            raise self.failures[found[2].name]
        worker = Worker(*equip(vae)[:1], Journal(Path("/nowhere")), settings, sources, Workload(1, 1), WHOLE)
        _, rows, failures = worker.compute(found[2])
        return *assemble(rows), failures

    def cancel(self, task: Any, force: bool) -> None:
        self.cancelled.append(task)

    def get_runtime_context(self) -> Any:
        return SimpleNamespace(get_assigned_resources=dict)

    def get_gpu_ids(self) -> list[Any]:
        return []


def engine_on(cluster: OneNode, vae: Any, monkeypatch: pytest.MonkeyPatch) -> Ray:
    monkeypatch.setitem(sys.modules, "ray", cluster)
    return Ray(vae, lambda given: (given, Workload(1, 1)))


def test_tasks_are_no_more_than_twice_what_runs_at_once(
    tiny_vae: Any, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster = OneNode()
    engine = engine_on(cluster, tiny_vae, monkeypatch)
    assert (engine.cores, engine.gpus) == (2, 0)
    encode(tiny_vae, photos, tmp_path / "local")
    encode(tiny_vae, photos, tmp_path / "far", engine)
    assert content(tmp_path / "far") == content(tmp_path / "local")
    assert (cluster.most, cluster.options["num_cpus"], cluster.cancelled) == (4, 2, [])


def test_what_ray_says_of_its_nodes_is_no_part_of_the_result(
    tiny_vae: Any,
    photos: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    class Talkative(OneNode):
        def get(self, task: Any) -> Any:
            print("(raylet) a node has been marked dead")  # as Ray does, in a thread of its own
            return super().get(task)

    monkeypatch.setitem(sys.modules, "ray", Talkative())
    tiny_vae.save_pretrained(tmp_path / "model")
    (photos / "05.png").unlink()
    places = (str(photos), str(tmp_path / "store"))
    with pytest.raises(SystemExit) as ended:
        main(["encode", *places, "--model", str(tmp_path / "model"), "--engine", "ray", "--json"])
    assert not ended.value.code
    said = capsys.readouterr()
    assert json.loads(said.out)["images"] == COUNT - 1
    assert "marked dead" in said.err


def test_nodes_with_gpus_have_the_batches_of_gpus(tiny_vae: Any, photos: Path, tmp_path: Path) -> None:
    with_gpus, without = SimpleNamespace(gpus=0.5), SimpleNamespace(gpus=0.0)
    store = tmp_path / "store"
    assert [_batch_size(with_gpus, str(store), asked) for asked in (None, 3)] == [BATCH_SIZE, 3]
    assert _batch_size(without, str(store), None) is None
    encode(tiny_vae, photos, store)
    assert _batch_size(with_gpus, str(store), None) is None  # as the store has it


def test_an_address_where_nobody_listens_is_refused_at_once(
    tiny_vae: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray would ask again for a quarter of an hour."""
    cluster = OneNode()
    cluster.is_initialized = lambda: False  # type: ignore[method-assign]
    monkeypatch.setitem(sys.modules, "ray", cluster)
    for address in ("127.0.0.1:9", "ray://localhost:9", "[::1]:9"):
        with pytest.raises(StoreError, match=rf"there is no Ray cluster at {re.escape(address)} \("):
            Ray(tiny_vae, lambda given: (given, Workload(1, 1)), address)


def test_a_cluster_that_may_want_a_token_has_the_way_to_send_it_named(
    tiny_vae: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def init(*_: object, **__: object) -> None:
        raise ConnectionError("Failed to connect to Ray cluster at 127.0.0.1:6379")

    cluster = OneNode()
    cluster.is_initialized = lambda: False  # type: ignore[method-assign]
    monkeypatch.setattr(cluster, "init", init, raising=False)
    monkeypatch.setitem(sys.modules, "ray", cluster)
    with pytest.raises(StoreError, match="asks for a token, set RAY_AUTH_MODE=token"):
        Ray(tiny_vae, lambda given: (given, Workload(1, 1)), "auto")


def test_tasks_that_no_node_has_room_for_are_said_to_wait(
    tiny_vae: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "ray", OneNode())
    for cores in (2, 3):
        engine = Ray(tiny_vae, lambda given: (given, Workload(1, 1)), cores=cores)
        assert not caplog.messages
        assert list(engine(None, {}, [])) == []
    assert "no node of the cluster has 3 cores and 0 GPUs now: waiting" in caplog.text


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (Failed(SourceError("s3://b/x cannot be read")), "^s3://b/x cannot be read$"),
        (
            Failed(ModuleNotFoundError("no latentvae")),
            r"latents-00003 failed on a node \(ModuleNotFoundError: no latentvae\)",
        ),
        (Died("out of memory"), r"latents-00003 was not encoded: .* ended 21 times \(out of memory\)"),
    ],
)
def test_what_fails_on_a_node_is_named_and_the_rest_is_kept(
    tiny_vae: Any,
    photos: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
    message: str,
) -> None:
    cluster = OneNode({"latents-00003": error})
    with pytest.raises((StoreError, SourceError), match=message):
        encode(tiny_vae, photos, tmp_path / "store", engine_on(cluster, tiny_vae, monkeypatch))
    assert len(cluster.cancelled) == len(cluster.waiting) > 0
    encode(tiny_vae, photos, tmp_path / "clean")
    encode(tiny_vae, photos, tmp_path / "store", engine_on(OneNode(), tiny_vae, monkeypatch))
    assert content(tmp_path / "store") == content(tmp_path / "clean")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_nodes_that_die_and_join_change_no_byte(
    tiny_vae: Any, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The only node is killed while it works, as another joins."""
    monkeypatch.setenv("RAY_worker_niceness", "0")  # others on the machine are no reason to time out
    import ray
    from ray.cluster_utils import Cluster

    local = latentvae.optimize(copy.deepcopy(tiny_vae))  # as the verb does on one machine
    tile_large(local)
    weights = weight_hash(tiny_vae)
    encode(local, photos, tmp_path / "clean", weights_sha256=weights)
    memory = {"object_store_memory": 80_000_000, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, **memory})
    nodes = [cluster.add_node(num_cpus=1, **memory)]
    ray.init(cluster.address, log_to_driver=False, logging_level="error")
    try:
        engine = Ray(tiny_vae, partial(equip_node, precision="fp32", threads=None, workers=1), cores=1)

        def shaken(*arguments: Any) -> Iterator[Moments]:
            """Between two shards, that is while another is being encoded, the node goes."""
            for number, found in enumerate(engine(*arguments)):
                yield found
                if number == 1:
                    nodes.append(cluster.add_node(num_cpus=1, **memory))
                    cluster.remove_node(nodes.pop(0), allow_graceful=False)

        report = encode(tiny_vae, photos, tmp_path / "store", shaken, weights_sha256=weights)
        assert (report.images, len(report.failures)) == (COUNT - 1, 1)
        assert content(tmp_path / "store") == content(tmp_path / "clean")
    finally:
        ray.shutdown()
        cluster.shutdown()
