"""One cache, many readers: workers, forks, threads, pickles and students at once all get the right rows."""

import gc
import multiprocessing
import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from softcache.base.errors import CacheError
from softcache.pipeline.cache import rows, shards
from softcache.pipeline.cache.reader import CacheReader
from tests.helpers.commands import Stages
from tests.helpers.damage import flip_bit
from tests.helpers.paths import ROOT

# Python warns of a fork where threads run; workers are forked all the same when a user asks for it.
pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
DRAWS, ROWS, TAP = 3, 300, "flatten"
METHODS = [method for method in ("fork", "spawn") if method in multiprocessing.get_all_start_methods()]
MANY = {"fork": 2, "spawn": 1}  # workers: each that is spawned takes seconds to load PyTorch
Truth = dict[int, tuple[np.ndarray, np.ndarray]]  # {draw: (logits, features)} in row order


@pytest.fixture(scope="module")
def truth(tiny: Path) -> Truth:
    """What the shards of `tiny`'s cache hold, read with h5py alone."""
    found = {}
    for draw in range(DRAWS):
        parts: list[list[np.ndarray]] = [[], []]
        for path in sorted((tiny / f"cache/draw-{draw:03d}").glob("shard-*.h5")):
            with h5py.File(path) as file:
                parts[0].append(file["logits"][:].astype(np.float32))
                parts[1].append(file[f"features/{TAP}"][:])
        found[draw] = (np.concatenate(parts[0]), np.concatenate(parts[1]))
    return found


def opened_and_used(folder: Path) -> CacheReader:
    """A cache with shards open and rows in memory."""
    cache = CacheReader(folder)
    cache.read_targets("train", 0, np.arange(ROWS), (TAP,))
    cache.read_rows("train", 1, "logits", np.arange(5))
    return cache


def wrong_rows(cache: CacheReader, truth: Truth, draw: int, positions: np.ndarray, from_disk: bool = False) -> int:
    """How many of these rows are not those of the shards."""
    if from_disk:
        logits = cache.codec.decode({"logits": cache.read_rows("train", draw, "logits", positions)}, cache.classes)
        features = cache.read_rows("train", draw, f"features/{TAP}", positions)
    else:
        found, taps = cache.read_targets("train", draw, positions, (TAP,))
        logits, features = found.numpy(), taps[TAP].numpy()
    right = (logits == truth[draw][0][positions]).all(1) & (features == truth[draw][1][positions]).all(1)
    return int((~right).sum())


class Rows(Dataset[tuple[int, torch.Tensor, torch.Tensor, int]]):
    """Number of a row -> that number, its logits and features, and the process that read them."""

    def __init__(self, cache: CacheReader):
        self.cache = cache

    def __len__(self) -> int:
        return DRAWS * ROWS

    def __getitem__(self, i: int) -> tuple[int, torch.Tensor, torch.Tensor, int]:
        draw, position = divmod(i, ROWS)
        logits, features = self.cache.read_targets("train", draw, np.array([position]), (TAP,))
        return i, logits[0], features[TAP][0], os.getpid()


@pytest.mark.parametrize("method", METHODS)
def test_workers_that_were_given_an_open_cache_read_the_right_rows(tiny: Path, truth: Truth, method: str) -> None:
    """Two rounds by workers that stay."""
    loader: Any = DataLoader(
        Rows(opened_and_used(tiny / "cache")),
        batch_size=60,
        shuffle=True,
        num_workers=MANY[method],
        multiprocessing_context=method,
        persistent_workers=True,
    )
    for _ in range(2):
        seen: list[int] = []
        pids: set[int] = set()
        for number, logits, features, pid in loader:
            draw, position = number.numpy() // ROWS, number.numpy() % ROWS
            for i in range(len(number)):
                np.testing.assert_array_equal(logits[i], truth[draw[i]][0][position[i]])
                np.testing.assert_array_equal(features[i], truth[draw[i]][1][position[i]])
            seen += number.tolist()
            pids |= set(pid.tolist())
        assert sorted(seen) == list(range(DRAWS * ROWS))
        assert len(pids) == MANY[method]
        assert os.getpid() not in pids
    loader._iterator._shutdown_workers()


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The checksums of whole files that are computed from now on."""
    checksum, found = shards.hash_file, []

    def counted(fd: int) -> str:
        found.append(checksum(fd))
        return found[-1]

    monkeypatch.setattr(shards, "hash_file", counted)
    return found


def test_a_pickled_cache_reads_the_right_rows_and_verifies_its_own_shards(
    cache: Path, truth: Truth, computed: list[str]
) -> None:
    """Neither a file nor a row travels, nor the word that a file was right."""
    used = opened_and_used(cache)
    pickled = pickle.dumps(used)
    assert len(pickled) < 50_000
    again = pickle.loads(pickled)
    computed.clear()
    assert all(wrong_rows(again, truth, draw, np.arange(ROWS)) == 0 for draw in range(DRAWS))
    assert sorted(computed) == sorted(r.checksum for r in used.manifest.shards if r.split == "train")
    flip_bit(cache / "draw-000/shard-00000.h5", 80_000)
    late = pickle.loads(pickled)
    with pytest.raises(CacheError, match=r"draw-000/shard-00000\.h5: damaged"):
        late.read_targets("train", 0, np.arange(3))


def in_a_fork(work: Callable[[], bool]) -> int:
    """The process number of a child that ends with code 0 when work() is true."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            code = 0 if work() else 1
        finally:
            os._exit(code)
    return pid


def read_at_random(cache: CacheReader, truth: Truth, seed: int, times: int) -> int:
    """How many of many rows, from disk and in runs of three, are wrong."""
    random = np.random.default_rng(seed)
    starts = random.integers(0, ROWS - 3, times)
    return sum(wrong_rows(cache, truth, int(s) % DRAWS, np.arange(s, s + 3), from_disk=True) for s in starts)


@pytest.mark.skipif("fork" not in METHODS, reason="needs fork")
def test_forks_of_a_process_with_an_open_cache_read_the_right_rows_beside_it(tiny: Path, truth: Truth) -> None:
    """They share open files: a reader that seeks would move the others'."""
    cache = opened_and_used(tiny / "cache")
    assert read_at_random(cache, truth, 9, 50) == 0
    children = [in_a_fork(lambda seed=i: read_at_random(cache, truth, seed, 400) == 0) for i in range(3)]  # type: ignore[misc]
    wrong = read_at_random(cache, truth, 10, 400)
    assert [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children] == [0, 0, 0]
    assert wrong == 0


@pytest.fixture
def hasty_threads() -> Iterator[None]:
    """Threads that take turns 5,000 times as often as usual."""
    usual = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(usual)


@pytest.mark.parametrize(("open_shards", "from_disk"), [(256, False), (256, True), (2, True)])
def test_threads_read_the_right_rows_from_one_cache(
    tiny: Path, truth: Truth, monkeypatch: pytest.MonkeyPatch, hasty_threads: None, open_shards: int, from_disk: bool
) -> None:
    """Also where one thread's shard makes room for another's, and one's draw for another's."""
    monkeypatch.setattr(rows, "MAX_OPEN_SHARDS", open_shards)
    cache = CacheReader(tiny / "cache")

    def read(seed: int) -> int:
        random = np.random.default_rng(seed)
        where = [
            (int(random.integers(DRAWS)), random.integers(0, ROWS, 4)) for _ in range(150 if open_shards > 2 else 12)
        ]
        return sum(wrong_rows(cache, truth, draw, positions, from_disk) for draw, positions in where)

    with ThreadPoolExecutor(8) as threads:
        assert list(threads.map(read, range(8))) == [0] * 8


AT_ONCE = """
import os, sys, torch
from softcache.stages.main import main
import softcache.stages.student.command
torch.set_num_threads(1)
pids = []
for run in range(3):
    pids.append(os.fork())
    if pids[-1] == 0:
        main([*sys.argv[1:], str(run)])
        os._exit(0)
sys.exit(any(os.waitpid(pid, 0)[1] for pid in pids))
"""


def test_students_at_once_from_one_cache_are_each_the_student_alone(
    tiny: Path, stages: Stages, tmp_path: Path
) -> None:
    """Three processes, forked from one that has loaded PyTorch and the cache and trained nothing yet."""
    asked = ["student", "--cache", f"{tiny}/cache", "--arch", "mlp:8", "--epochs", "3", "--batch-size", "60"]
    stages(*asked, "--out", "alone")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", AT_ONCE, *asked, "--out"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    alone = Path("alone/student.pt").read_bytes()
    assert [Path(run, "student.pt").read_bytes() == alone for run in ("0", "1", "2")] == [True] * 3


def open_handles() -> int:
    """Of files and of all that is in them; h5py keeps 30 data types of its own."""
    gc.collect()
    kinds = h5py.h5f.OBJ_FILE | h5py.h5f.OBJ_DATASET | h5py.h5f.OBJ_GROUP | h5py.h5f.OBJ_ATTR
    count: int = h5py.h5f.get_obj_count(h5py.h5f.OBJ_ALL, kinds)
    return count


def test_no_hdf5_handle_stays_open_nor_crosses_a_fork(tiny: Path, truth: Truth) -> None:
    cache = opened_and_used(tiny / "cache")
    assert len(cache._rows._shards) >= 3
    assert open_handles() == 0
    with h5py.File(tiny / "cache/head.h5"):
        assert open_handles() == 1
    if "fork" in METHODS:
        child = in_a_fork(lambda: open_handles() == 0 and wrong_rows(cache, truth, 1, np.arange(ROWS)) == 0)
        assert os.waitpid(child, 0)[1] == 0


@pytest.fixture
def two_open(cache: Path, computed: list[str], monkeypatch: pytest.MonkeyPatch) -> tuple[CacheReader, list[str]]:
    """A cache of which two shards stay open, and the checksums that are computed of them."""
    monkeypatch.setattr(rows, "MAX_OPEN_SHARDS", 2)
    return CacheReader(cache), computed


def test_more_shards_than_stay_open_are_read_right_and_verified_once(
    two_open: tuple[CacheReader, list[str]], truth: Truth
) -> None:
    cache, computed = two_open
    open_files = len(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").is_dir() else 0
    for seed in range(3):
        assert read_at_random(cache, truth, seed, 60) == 0
    assert sorted(computed) == sorted(r.checksum for r in cache.manifest.shards if r.split == "train")
    if open_files:
        assert len(os.listdir("/proc/self/fd")) <= open_files + 2


def test_a_shard_that_changed_since_it_was_verified_is_verified_again(
    two_open: tuple[CacheReader, list[str]], truth: Truth
) -> None:
    cache, computed = two_open
    path, first = cache.folder / "draw-000/shard-00000.h5", np.arange(3)

    def read_others() -> None:
        for draw in (1, 2):
            assert wrong_rows(cache, truth, draw, np.arange(ROWS), from_disk=True) == 0

    assert wrong_rows(cache, truth, 0, first, from_disk=True) == 0
    read_others()
    whole, before = path.read_bytes(), len(computed)
    path.write_bytes(whole)  # the same bytes, at another time
    assert wrong_rows(cache, truth, 0, first, from_disk=True) == 0
    assert len(computed) == before + 1
    read_others()
    times = path.stat()
    flip_bit(path, 8 * len(whole) - 3)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    with pytest.raises(CacheError, match="damaged, its checksum is"):
        cache.read_rows("train", 0, "logits", first)
