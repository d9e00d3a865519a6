"""Students of embeddings: their width, the projection that is trained with them, and several teachers."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.helpers.commands import Stages

STUDENT = ("student", "--arch", "mlp:8", "--epochs", 2, "--cache", "a")


@pytest.fixture
def folder(embedding_folder: Path) -> Path:
    return embedding_folder


def read_weights(path: str) -> dict[str, torch.Tensor]:
    state: dict[str, torch.Tensor] = torch.load(path, weights_only=True)
    return state.get("model", state)  # type: ignore[return-value]


def test_a_student_of_its_own_width_has_a_projection_that_is_no_part_of_it(folder: Path, stages: Stages) -> None:
    code, out, err = stages.call(*STUDENT, "--width", 5, "--out", "s")
    assert code == 0, err
    line = "loss 'embed': the projection 5 -> 12 (linear) is trained with the student and not part of it"
    assert line in out.splitlines()
    result = json.loads((folder / "s/result.json").read_text())
    assert (result["settings"]["width"], result["student"]["test"]["cosine"]) == (5, None)
    weights = read_weights("s/student.pt")
    assert [list(x.shape) for x in weights.values()][-2:] == [[5, 8], [5]]
    assert not any("projection" in name for name in weights)
    assert stages("evaluate", "s")["0"]["test"]["cosine"] is None


def test_the_width_is_recorded_where_it_is_set_alone(folder: Path, stages: Stages) -> None:
    result = stages(*STUDENT, "--out", "s")
    assert "width" not in json.loads((folder / "s/settings.json").read_text())
    assert "width" not in result["settings"]
    assert result["student"]["test"]["cosine"] > -1
    stages("evaluate", "s")


def test_the_projection_is_that_of_the_seed_and_in_the_checkpoint(
    folder: Path, stages: Stages, monkeypatch: pytest.MonkeyPatch
) -> None:
    from softcache.pipeline.losses.embedding import Embed

    weights: list[torch.Tensor] = []
    build_projection = Embed._build_projection

    def record(self: Embed, own: int, width: int) -> nn.Module | None:
        projection = build_projection(self, own, width)
        assert isinstance(projection, nn.Linear)
        weights.append(projection.weight.detach().clone())
        return projection

    monkeypatch.setattr(Embed, "_build_projection", record)
    for name, seed in (("s", 0), ("t", 0), ("u", 1)):
        stages(*STUDENT, "--width", 5, "--seed", seed, "--out", name)
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    first, second = (read_weights(f"{name}/student.pt") for name in ("s", "t"))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("losses", [("embed:standardize=std",), ("embed:standardize=axes", "rkd", "cc")])
def test_several_teachers_of_embeddings_have_a_projection_each(
    losses: tuple[str, ...], folder: Path, stages: Stages
) -> None:
    terms = [x for loss in losses for x in ("--loss", loss)]
    code, out, err = stages.call(*STUDENT, "--cache", "b", "--width", 7, *terms, "--out", "s")
    assert code == 0, err
    assert "the projection 7 -> 12 of 'a' (linear) is trained" in out
    assert "of 'b'" not in out
    result = json.loads((folder / "s/result.json").read_text())
    assert result["student"]["test"]["cosine"] is None
    assert [member["arch"] for member in result["members"]] == ["mlp:12", "mlp:7"]
    assert json.loads((folder / "s/targets.json").read_text())["combine"]["combine"] == "per_teacher"


def test_a_network_of_any_width_is_trained_from_python(folder: Path) -> None:
    import softcache
    from softcache import losses

    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
    cache = softcache.Cache(["a", "b"])
    result = softcache.train_student(cache, network, [losses.Embed(kind="l2"), "similarity"], epochs=1, out="s")
    assert result["student"]["test"]["cosine"] is None
    batch = next(iter(cache.loader("train", 16)))
    assert batch.logits is not None
    assert list(batch.logits.shape) == [16, 2, 12]
    assert not batch.logits[:, 1, 7:].any()


WRONG = [
    (("--cache", "b"), 2, "the teachers' embeddings have 12 and 7 numbers: name the student's own width"),
    (("--cache", "b", "--width", 9, "--combine", "mean_logit"), 2, "--combine mean_logit is for one class an image"),
    (("--width", 5, "--select", "cosine"), 2, "--select cosine compares embeddings of one width"),
    (("--loss", "hint"), 2, "loss 'hint' needs layers"),
    (("--loss", "kd"), 2, "loss 'kd' is for classes"),
    (("--loss", "embed:kind=cos"), 2, "kind=cos: there are cosine, mse, smooth_l1, l2"),
    (("--width", 5, "--labelled", 20), 2, "--labelled is for hard targets"),
]


@pytest.mark.parametrize(("more", "code", "message"), WRONG, ids=[message[:30] for *_, message in WRONG])
def test_what_does_not_fit_embeddings_is_refused(
    more: tuple[object, ...], code: int, message: str, folder: Path, stages: Stages
) -> None:
    error = stages.fails(code, *STUDENT, *more, "--out", "s")
    assert message in error
    assert not (folder / "s").exists()


def test_a_width_is_for_embeddings_alone(tiny: Path, stages: Stages) -> None:
    error = stages.fails(2, "student", "--cache", tiny / "cache", "--width", 5)
    assert error == "Error: --width 5 is for the task embedding, and the task here is classes: leave it out"
    error = stages.fails(2, "student", "--cache", tiny / "cache", "--loss", "rkd")
    assert error == "Error: loss 'rkd' needs layers: --loss rkd:teacher=layer3,student=layer3"
