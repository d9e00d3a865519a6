"""Manifests of any content: a cache is read, or refused in one line, quickly and in little memory.

Three authors: one who changes bytes, one who edits the record and seals it again, and one who made the whole cache, so
that its shards agree with whatever he says.
"""

import json
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from softcache.pipeline.cache import archive as pack
from softcache.pipeline.cache.manifest import MAX_MANIFEST_BYTES
from softcache.pipeline.cache.reader import Cache
from softcache.pipeline.cache.verification import verify_shard, verify_views
from softcache.stages.cli.copied_commands import format_remake_command
from softcache.stages.teacher_cache.cache_readme import format_readme
from tests.helpers.damage import read_manifest, sealed
from tests.helpers.mutations import agree, mutate, mutated_bytes, with_its_fingerprint, written
from tests.helpers.trial import attempt, command, line_of, one_line, read_like_a_student

Dose = Callable[[int, int], int]
SECONDS, MEMORY = 5.0, 300 << 20
FROM_THE_NETWORK = ("mnist", "fashion-mnist", "cifar10", "cifar100")
QUIET = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much, HealthCheck.large_base_example]


def use(folder: Path) -> dict[str, Any]:
    """What this program says while it does everything that it does with a cache, short of training."""
    said: dict[str, Any] = {"opened": line_of(lambda: Cache(folder))}
    if not said["opened"]:
        cache = Cache(folder)
        said["checked"] = [line_of(lambda r=record: verify_shard(cache, r)) for record in cache.manifest.shards]
        said["head"] = line_of(cache.read_head)
        said["read"] = line_of(lambda: read_like_a_student(cache))
        said["proved"] = line_of(lambda: prove(cache))
        said["packed"] = line_of(lambda: pack.pack_cache(folder, cache.manifest, Path("x.tar"), lambda count: None))
        said["words"] = [format_remake_command(cache), format_readme("name", cache.manifest).encode().decode()]
    said["command"] = command("check-cache", str(folder))
    return said


def prove(cache: Cache) -> None:
    """Against its transfer set, unless that would be looked for on the network."""
    if cache.data not in FROM_THE_NETWORK:
        verify_views(
            cache, cache.load_transfer_set("", Path("nowhere"), lambda items, *_: items), cache.manifest.draws
        )


def well_behaved(folder: Path) -> str:
    """Use a cache in a process of its own; how far one came. Fails where it does not end as it should."""
    found = attempt(lambda: use(folder), limit=20)
    assert not found.failed, found.failed
    assert found.seconds < SECONDS
    assert found.extra < MEMORY, f"{found.extra / 1e6:.0f} MB"
    code = one_line(found.value["command"])
    assert all(c.isprintable() for c in found.value.get("words", [""])[0])
    if found.value["opened"]:
        assert code == 1
        return "refused"
    lines = [*found.value["checked"], found.value["head"], found.value["read"], found.value["proved"]]
    return "found bad" if any(lines) else "used"


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def many(examples: int, one: Callable[[st.DataObject], None]) -> None:
    """Call one for so many examples, always the same ones."""
    run = settings(max_examples=examples, derandomize=True, deadline=None, database=None, suppress_health_check=QUIET)
    run(given(st.data())(lambda data: one(data)))()


def told(author: str, counts: Counter[str]) -> None:
    print(f"mutated manifests, {author}: {counts.total()} trials, " + ", ".join(f"{n} {k}" for k, n in counts.items()))


def test_a_manifest_with_any_other_bytes_is_refused(cache: Path, dose: Dose) -> None:
    whole, counts = (cache / "manifest.json").read_bytes(), Counter[str]()

    def one(data: st.DataObject) -> None:
        (cache / "manifest.json").write_bytes(mutated_bytes(whole, data.draw))
        found = well_behaved(cache)
        assert found == "refused"
        counts[found] += 1

    many(dose(30, 600), one)
    told("bytes", counts)


def test_an_edited_manifest_under_a_new_seal_is_used_or_refused_in_one_line(cache: Path, dose: Dose) -> None:
    whole, counts = read_manifest(cache), Counter[str]()

    def one(data: st.DataObject) -> None:
        record = json.loads(json.dumps(whole))
        for _ in range(data.draw(st.integers(1, 3))):
            mutate(record, data.draw)
        if data.draw(st.booleans()):
            with_its_fingerprint(record)
        (cache / "manifest.json").write_bytes(written(record))
        counts[well_behaved(cache)] += 1

    many(dose(40, 900), one)
    told("sealed again", counts)


def test_a_cache_whose_author_is_hostile_is_used_or_refused_in_one_line(cache: Path, dose: Dose) -> None:
    """The identity is what he lies about; the shards, the fingerprint and the checksums agree with him."""
    whole, counts = read_manifest(cache), Counter[str]()

    def one(data: st.DataObject) -> None:
        record = json.loads(json.dumps(whole))
        for _ in range(data.draw(st.integers(1, 2))):
            mutate(record["identity"], data.draw)
        agree(cache, record)
        (cache / "manifest.json").write_bytes(written(record))
        counts[well_behaved(cache)] += 1

    many(dose(30, 500), one)
    told("everything agrees", counts)


# What is large


def test_a_large_manifest_is_refused_or_read_in_seconds(cache: Path, dose: Dose) -> None:
    """As large as one may be, under torture: records of shards that are not there, in order but for one of them."""
    most = dose(MAX_MANIFEST_BYTES // 8, MAX_MANIFEST_BYTES)
    record = read_manifest(cache)
    first = next(shard for shard in record["shards"] if shard["split"] == "train")
    others = [shard for shard in record["shards"] if shard["split"] != "train"]
    per_draw = 300
    draws = (most - 10_000) // (len(json.dumps(first, indent=1)) + 80) // per_draw
    record["shards"] = [
        {**first, "path": f"draw-{d:03d}/shard-{i:05d}.h5", "draw": d, "start": i, "rows": 1, "bytes": 4000}
        for d in range(draws)
        for i in range(per_draw)
    ] + others
    record["draws"] = draws
    for change, reason in (({}, "No such file"), ({"start": 7}, "it does not follow on")):
        record["shards"][draws * per_draw - 1].update(change)
        text = sealed(record)
        assert most // 2 < len(text) <= most
        (cache / "manifest.json").write_bytes(text)
        shutil.rmtree(cache / "draw-000", ignore_errors=True)
        found = attempt(lambda: [line_of(lambda: Cache(cache)), line_of(lambda: read_like_a_student(Cache(cache)))])
        assert not found.failed
        assert reason in found.value[1]
    (cache / "manifest.json").write_bytes(text + b" " * (MAX_MANIFEST_BYTES - len(text) + 1))
    assert "more than the 16777216 that it may have" in line_of(lambda: Cache(cache))


@pytest.mark.parametrize("text", [b"[" * (8 << 20), b"[1," * (4 << 20), b'{"a":' * (3 << 20), b"9" * (16 << 20)])
def test_sixteen_megabytes_of_brackets_or_digits_are_refused_at_once(cache: Path, text: bytes) -> None:
    (cache / "manifest.json").write_bytes(text)
    assert well_behaved(cache) == "refused"
