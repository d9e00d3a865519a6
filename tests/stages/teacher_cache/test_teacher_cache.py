"""Stage one stores exactly what the teacher outputs, and continues an interrupted cache."""

import json
import shutil
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from softcache.data.transfer_set import load_transfer_set
from softcache.data.views.policy import parse_views
from softcache.data.views.render import render
from softcache.pipeline.cache.reader import CacheReader
from softcache.pipeline.cache.writer import CacheWriter
from softcache.pipeline.models import build
from softcache.pipeline.models.prepared_model import InputSpec, PreparedModel
from tests.helpers.commands import Stages, tiny_cache_command


def read_payloads(folder: Path) -> dict[str, str]:
    manifest = json.loads((folder / "manifest.json").read_text())
    return {shard["path"]: shard["payload"] for shard in manifest["shards"]}


def load_teacher(tiny: Path) -> PreparedModel:
    record = json.loads((tiny / "runs/teacher/result.json").read_text())["teacher"]
    network = build("cnn", 10, 1, 8)
    network.load_state_dict(torch.load(tiny / "runs/teacher/teacher.pt", weights_only=True))
    return PreparedModel(network, InputSpec.from_json(record["preparation"])).eval()


def test_every_row_holds_the_teachers_outputs_for_that_view(tiny: Path) -> None:
    """Read with h5py alone and compared with a plain run of the teacher, for every split and draw."""
    transfer_set = load_transfer_set("digits", Path("none"), val_fraction=0.125, train_size=300)
    teacher, policy = load_teacher(tiny), parse_views("crop:pad=1,size=8")
    manifest = json.loads((tiny / "cache/manifest.json").read_text())
    counts = {"train": 0, "val": 0, "test": 0}
    for shard in manifest["shards"]:
        with h5py.File(tiny / "cache" / shard["path"]) as file:
            index = file["index"][:].astype(np.int64)
            rows = transfer_set.splits[shard["split"]]
            split_policy = policy if shard["split"] == "train" else policy.without_augmentation()
            views = render(rows.images, split_policy, 0, index, shard["draw"])
            with torch.no_grad():
                logits = teacher(views).numpy()
                x = torch.addcmul(teacher.shift, views.float(), teacher.scale)
                layers = dict(teacher.network.named_children())
                features = {"pool1": teacher.network[:4](x), "flatten": teacher.network[:10](x)}
            assert [*layers][3] == "pool1"
            assert [*layers][9] == "flatten"
            np.testing.assert_allclose(file["logits"][:], logits, rtol=1e-3, atol=1e-3)
            for name, values in features.items():
                np.testing.assert_allclose(file[f"features/{name}"][:], values.numpy(), rtol=1e-3, atol=1e-3)
            np.testing.assert_array_equal(file["label"][:], rows.labels[index])
            counts[shard["split"]] += len(index)
    assert counts == {"train": 900, "val": 180, "test": 360}


def test_each_draw_holds_every_index_once(tiny: Path) -> None:
    cache = CacheReader(tiny / "cache")
    for split, draws in (("train", 3), ("val", 1), ("test", 1)):
        for draw in range(draws):
            index = cache.read_column(split, draw, "index")
            assert sorted(index) == list(range(cache.manifest.splits[split]))


def test_rows_are_stored_in_a_class_mixed_order(tiny: Path) -> None:
    labels = CacheReader(tiny / "cache").read_column("train", 0, "label")
    assert all(len(set(labels[i : i + 30])) >= 7 for i in range(0, 300, 30))


def test_twice_gives_equal_payload_digests(tiny: Path, stages: Stages, tmp_path: Path) -> None:
    command = tiny_cache_command(tiny)
    stages(*command[:-1], tmp_path / "again")
    assert read_payloads(tmp_path / "again") == read_payloads(tiny / "cache")


def test_the_same_weights_in_another_file_make_the_same_cache(tiny: Path, stages: Stages, tmp_path: Path) -> None:
    """A bare state dict, whose arch is an option; mean and std are measured on the data, as in the run."""
    state = torch.load(tiny / "runs/teacher/teacher.pt", weights_only=True)
    torch.save({"state_dict": {f"module.{k}": v for k, v in state.items()}}, tmp_path / "w.pth")
    command = tiny_cache_command(tiny)
    command[command.index("--weights") + 1] = str(tmp_path / "w.pth")
    stages(*command[:-1], tmp_path / "again", "--teacher", "cnn")
    assert read_payloads(tmp_path / "again") == read_payloads(tiny / "cache")
    assert CacheReader(tmp_path / "again").manifest.fingerprint == CacheReader(tiny / "cache").manifest.fingerprint


def test_the_manifest_reports_the_teachers_accuracy_on_each_split(tiny: Path) -> None:
    cache = CacheReader(tiny / "cache")
    for split in ("train", "val", "test"):
        accuracies = [
            (cache.read_column(split, draw, "logits").argmax(1) == cache.read_column(split, draw, "label")).mean()
            for draw in range(3 if split == "train" else 1)
        ]
        assert cache.manifest.teacher[split]["accuracy"] == pytest.approx(np.mean(accuracies), abs=1e-12)


def test_the_codecs_cost_is_measured_on_the_caches_own_rows(tiny: Path, stages: Stages, tmp_path: Path) -> None:
    """float32 costs nothing; half precision and sqrt8 cost what a plain comparison with float32 gives."""
    caches = {}
    held_out = (("val", 180), ("test", 360))
    for codec in ("float32", "float16", "sqrt8"):
        command = tiny_cache_command(tiny)
        stages(*command[:-1], tmp_path / codec, "--codec", codec)
        caches[codec] = CacheReader(tmp_path / codec)
    exact = torch.cat([caches["float32"].read_targets(s, 0, np.arange(n))[0] for s, n in held_out])
    assert caches["float32"].manifest.fidelity["kl_4"] == 0
    for codec, largest in (("float16", 1e-6), ("sqrt8", 2e-4)):
        fidelity = caches[codec].manifest.fidelity
        assert fidelity["rows"] == 900 + 180 + 360
        assert 0 < fidelity["kl_4"] < largest
        decoded = torch.cat([caches[codec].read_targets(s, 0, np.arange(n))[0] for s, n in held_out])
        p, q = (torch.log_softmax(x.double() / 4, 1) for x in (exact, decoded))
        kl = float((p.exp() * (p - q)).sum(1).mean())
        assert kl == pytest.approx(fidelity["kl_4"], rel=0.5)  # held-out rows against all rows


def test_the_teachers_head_gives_the_logits_from_the_features_below_it(tiny: Path) -> None:
    cache = CacheReader(tiny / "cache")
    assert cache.manifest.head is not None
    with h5py.File(tiny / "cache" / cache.manifest.head.path) as file:
        weight, bias = file["weight"][:], file["bias"][:]
    logits, features = cache.read_targets("train", 1, np.arange(300), ("flatten",))
    np.testing.assert_allclose(features["flatten"].numpy().astype(np.float32) @ weight.T + bias, logits, atol=0.02)


def test_an_interrupted_run_keeps_its_shards_and_ends_with_the_same_digests(
    tiny: Path, stages: Stages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command, out = tiny_cache_command(tiny)[:-1], tmp_path / "c"
    write_shard, written = CacheWriter.write_shard, []

    def stop_after_four(self, spec, arrays, measurements):  # type: ignore[no-untyped-def]
        if len(written) == 4:
            raise KeyboardInterrupt
        written.append(spec.path)
        write_shard(self, spec, arrays, measurements)

    monkeypatch.setattr(CacheWriter, "write_shard", stop_after_four)
    line = stages.fails(130, *command, out)
    assert "4 of 14 shards" in line
    assert "continue with" in line
    assert not (out / "manifest.json").exists()
    assert "no finished cache" in stages.fails(1, "student", "--cache", out)

    before = {path: (out / path).stat().st_mtime_ns for path in written}
    damaged = out / written[2]
    damaged.write_bytes(damaged.read_bytes()[:-100])
    monkeypatch.setattr(CacheWriter, "write_shard", write_shard)
    code, text, err = stages.call(*command, out)
    assert code == 0, err
    assert "continued: 3 of 14 shards" in text
    unchanged = [path for path in written if (out / path).stat().st_mtime_ns == before[path]]
    assert unchanged == [path for path in written if out / path != damaged]
    assert read_payloads(out) == read_payloads(tiny / "cache")
    assert not [p for p in out.rglob("*") if p.suffix == ".tmp" or p.name == "unfinished.json"]


def test_a_complete_cache_is_not_written_again_and_another_one_is_refused(tiny: Path, stages: Stages) -> None:
    command = tiny_cache_command(tiny)
    before = (tiny / "cache/manifest.json").stat().st_mtime_ns
    code, text, _ = stages.call(*command)
    assert code == 0
    assert "is complete" in text
    error = stages.fails(1, *command, "--views", "crop:pad=2")
    assert ["views.pad", "2", "1"] in [line.split() for line in error.splitlines()]
    assert "--train-size 300 --data digits" in error.splitlines()[-1]
    assert f"--weights {tiny}/runs/teacher --views crop:pad=2 --draws 3" in error.splitlines()[-1]
    assert error.endswith(f"--out {tiny}/cache-2")
    assert (tiny / "cache/manifest.json").stat().st_mtime_ns == before


@pytest.mark.parametrize(
    ("option", "value", "field"),
    [
        ("--views", "crop-flip:pad=1", "views.policy"),
        ("--codec", "float32", "codec"),
        ("--seed", "1", "transfer_set.content.train"),
        ("--precision", "bfloat16", "precision"),
        ("--train-size", "299", "transfer_set.cut.train_size"),
        ("--val-fraction", "0.2", "transfer_set.cut.val_fraction"),
    ],
)
def test_each_part_of_the_identity_is_named_when_it_differs(
    tiny: Path, stages: Stages, option: str, value: str, field: str
) -> None:
    assert field in stages.fails(1, *tiny_cache_command(tiny), option, value)


def test_other_weights_are_another_cache(tiny: Path, stages: Stages, tmp_path: Path) -> None:
    state = torch.load(tiny / "runs/teacher/teacher.pt", weights_only=True)
    state["linear.bias"][0] += 1e-3
    torch.save(state, tmp_path / "w.pt")
    command = tiny_cache_command(tiny)
    command[command.index("--weights") + 1] = str(tmp_path / "w.pt")
    assert "teacher.weights" in stages.fails(1, *command, "--teacher", "cnn")


def test_without_weights_a_teacher_is_trained_and_used_again_later(stages: Stages, tmp_path: Path) -> None:
    command = ("teacher-cache", "--train-size", "150", "--teacher", "mlp:8")
    code, text, err = stages.call(*command, "--out", tmp_path / "c")
    assert code == 0, err
    assert "training the teacher mlp:8 first" in text
    assert (tmp_path / "c-teacher/teacher.pt").is_file()
    shutil.rmtree(tmp_path / "c")
    code, text, err = stages.call(*command, "--out", tmp_path / "c")
    assert code == 0, err
    assert "using the teacher in" in text


def test_a_student_is_the_next_generations_teacher(tiny: Path, stages: Stages, tmp_path: Path) -> None:
    stages("student", "--cache", tiny / "cache", "--arch", "mlp:24", "--epochs", "2", "--out", "runs/one")
    report = stages("teacher-cache", "--train-size", "300", "--weights", "runs/one", "--out", "next")
    student = json.loads(Path("runs/one/result.json").read_text())["student"]
    assert CacheReader(tmp_path / "next").manifest.identity["teacher"]["arch"] == "mlp:24"
    assert report["teacher"]["test"]["accuracy"] == pytest.approx(student["test"]["accuracy"], abs=1e-9)


def test_a_row_that_is_not_finite_is_named(stages: Stages, tmp_path: Path) -> None:
    """A teacher that outputs NaN for one image, the brightest of the training split."""
    (tmp_path / "spoiled.py").write_text(
        "import torch\n"
        "class Net(torch.nn.Module):\n"
        "    def __init__(self): super().__init__(); self.linear = torch.nn.Linear(64, 10)\n"
        "    def forward(self, x):\n"
        "        z = self.linear(x.flatten(1)); z[x.flatten(1).sum(1) == WORST] = float('nan'); return z\n"
        "def make(classes, channels, size): return Net()\n"
    )
    rows = load_transfer_set("digits", Path("none"), val_fraction=0.125, train_size=50).splits["train"]
    pixels = rows.images.load_plain(np.arange(50), 8, 0).float() / 255
    worst = int(pixels.flatten(1).sum(1).argmax())
    value = float(torch.addcmul(torch.zeros(1), pixels * 255, torch.tensor(1 / 255.0))[worst].flatten().sum())
    source = (tmp_path / "spoiled.py").read_text().replace("== WORST", f"> {value - 1e-3}")
    (tmp_path / "spoiled.py").write_text(source)
    torch.save({"linear.weight": torch.zeros(10, 64), "linear.bias": torch.zeros(10)}, tmp_path / "w.pt")
    line = stages.fails(
        1,
        "teacher-cache",
        "--train-size",
        "50",
        "--teacher",
        "spoiled:make",
        "--weights",
        tmp_path / "w.pt",
        "--normalize",
        "none",
        "--out",
        tmp_path / "c",
    )
    assert f"train index {worst}, draw 0 is nan" in line
    assert not (tmp_path / "c/manifest.json").exists()


def test_logits_too_large_for_the_codec_are_refused_and_not_stored_as_infinity(stages: Stages, tmp_path: Path) -> None:
    weight = torch.zeros(10, 64)
    weight[3] = 1e6
    torch.save({"linear.weight": weight, "linear.bias": torch.zeros(10)}, tmp_path / "w.pt")
    (tmp_path / "linear_net.py").write_text(
        "import torch, collections\n"
        "def make(classes, channels, size):\n"
        "    parts = [('flatten', torch.nn.Flatten()), ('linear', torch.nn.Linear(64, 10))]\n"
        "    return torch.nn.Sequential(collections.OrderedDict(parts))\n"
    )
    command = ("teacher-cache", "--train-size", "50", "--teacher", "linear_net:make", "--weights", tmp_path / "w.pt")
    line = stages.fails(1, *command, "--normalize", "none", "--out", tmp_path / "c")
    assert "largest 65504" in line
    stages(*command, "--normalize", "none", "--codec", "float32", "--out", tmp_path / "d")
