"""Manifests of any content: a cache is read, or refused in one line, quickly and with little memory.

Three kinds of changes: of bytes; of the record, which is sealed again; and of the whole cache, whose shards agree with
the changed record.
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
from softcache.pipeline.cache.reader import CacheReader
from softcache.pipeline.cache.verification import verify_shard, verify_views
from softcache.stages.cli.copied_commands import format_remake_command
from softcache.stages.teacher_cache.cache_readme import format_readme
from tests.helpers.damage import read_manifest, seal_record
from tests.helpers.mutations import encode_record, make_shards_agree, mutate, mutate_bytes, update_fingerprint
from tests.helpers.trial import attempt, check_output, get_error_line, read_like_a_student, run_command

Dose = Callable[[int, int], int]
SECONDS, MEMORY = 5.0, 300 << 20
FROM_THE_NETWORK = ("mnist", "fashion-mnist", "cifar10", "cifar100")
QUIET = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much, HealthCheck.large_base_example]


def use_cache(folder: Path) -> dict[str, Any]:
    """Do with a cache all that softcache does, except training; return the errors and outputs."""
    results: dict[str, Any] = {"opened": get_error_line(lambda: CacheReader(folder))}
    if not results["opened"]:
        cache = CacheReader(folder)
        results["checked"] = [
            get_error_line(lambda r=record: verify_shard(cache, r)) for record in cache.manifest.shards
        ]
        results["head"] = get_error_line(cache.read_head)
        results["read"] = get_error_line(lambda: read_like_a_student(cache))
        results["proved"] = get_error_line(lambda: verify(cache))
        results["packed"] = get_error_line(
            lambda: pack.pack_cache(folder, cache.manifest, Path("x.tar"), lambda count: None)
        )
        results["words"] = [format_remake_command(cache), format_readme("name", cache.manifest).encode().decode()]
    results["command"] = run_command("check-cache", str(folder))
    return results


def verify(cache: CacheReader) -> None:
    """Verify the views against the transfer set, unless that would be downloaded."""
    if cache.data not in FROM_THE_NETWORK:
        verify_views(
            cache, cache.load_transfer_set("", Path("nowhere"), lambda items, *_: items), cache.manifest.draws
        )


def use_in_child(folder: Path) -> str:
    """Use a cache in a child process, and check errors, time and memory.

    Returns:
        `refused` when it could not be opened, `found bad` when a check failed, else `used`.
    """
    outcome = attempt(lambda: use_cache(folder), limit=20)
    assert not outcome.failure, outcome.failure
    assert outcome.seconds < SECONDS
    assert outcome.extra_memory < MEMORY, f"{outcome.extra_memory / 1e6:.0f} MB"
    code = check_output(outcome.value["command"])
    assert all(c.isprintable() for c in outcome.value.get("words", [""])[0])
    if outcome.value["opened"]:
        assert code == 1
        return "refused"
    lines = [*outcome.value["checked"], outcome.value["head"], outcome.value["read"], outcome.value["proved"]]
    return "found bad" if any(lines) else "used"


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def run_examples(examples: int, check_example: Callable[[st.DataObject], None]) -> None:
    """Call check_example for a number of examples, always the same ones."""
    run = settings(max_examples=examples, derandomize=True, deadline=None, database=None, suppress_health_check=QUIET)
    run(given(st.data())(lambda data: check_example(data)))()


def print_counts(author: str, counts: Counter[str]) -> None:
    print(f"mutated manifests, {author}: {counts.total()} trials, " + ", ".join(f"{n} {k}" for k, n in counts.items()))


def test_a_manifest_with_any_other_bytes_is_refused(cache: Path, dose: Dose) -> None:
    original, counts = (cache / "manifest.json").read_bytes(), Counter[str]()

    def check_example(data: st.DataObject) -> None:
        (cache / "manifest.json").write_bytes(mutate_bytes(original, data.draw))
        found = use_in_child(cache)
        assert found == "refused"
        counts[found] += 1

    run_examples(dose(30, 600), check_example)
    print_counts("bytes", counts)


def test_an_edited_manifest_under_a_new_seal_is_used_or_refused_in_one_line(cache: Path, dose: Dose) -> None:
    original, counts = read_manifest(cache), Counter[str]()

    def check_example(data: st.DataObject) -> None:
        record = json.loads(json.dumps(original))
        for _ in range(data.draw(st.integers(1, 3))):
            mutate(record, data.draw)
        if data.draw(st.booleans()):
            update_fingerprint(record)
        (cache / "manifest.json").write_bytes(encode_record(record))
        counts[use_in_child(cache)] += 1

    run_examples(dose(40, 900), check_example)
    print_counts("sealed again", counts)


def test_a_cache_whose_author_is_hostile_is_used_or_refused_in_one_line(cache: Path, dose: Dose) -> None:
    """The identity is false; the shards, the fingerprint and the checksums agree with it."""
    original, counts = read_manifest(cache), Counter[str]()

    def check_example(data: st.DataObject) -> None:
        record = json.loads(json.dumps(original))
        for _ in range(data.draw(st.integers(1, 2))):
            mutate(record["identity"], data.draw)
        make_shards_agree(cache, record)
        (cache / "manifest.json").write_bytes(encode_record(record))
        counts[use_in_child(cache)] += 1

    run_examples(dose(30, 500), check_example)
    print_counts("everything agrees", counts)


# What is large


def test_a_large_manifest_is_refused_or_read_in_seconds(cache: Path, dose: Dose) -> None:
    """With records of shards that do not exist; in the second trial one is out of order."""
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
        text = seal_record(record)
        assert most // 2 < len(text) <= most
        (cache / "manifest.json").write_bytes(text)
        shutil.rmtree(cache / "draw-000", ignore_errors=True)
        outcome = attempt(
            lambda: [
                get_error_line(lambda: CacheReader(cache)),
                get_error_line(lambda: read_like_a_student(CacheReader(cache))),
            ]
        )
        assert not outcome.failure
        assert reason in outcome.value[1]
    (cache / "manifest.json").write_bytes(text + b" " * (MAX_MANIFEST_BYTES - len(text) + 1))
    assert "more than the 16777216 that it may have" in get_error_line(lambda: CacheReader(cache))


@pytest.mark.parametrize("text", [b"[" * (8 << 20), b"[1," * (4 << 20), b'{"a":' * (3 << 20), b"9" * (16 << 20)])
def test_sixteen_megabytes_of_brackets_or_digits_are_refused_at_once(cache: Path, text: bytes) -> None:
    (cache / "manifest.json").write_bytes(text)
    assert use_in_child(cache) == "refused"
