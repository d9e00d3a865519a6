"""Every knob of every stage, in plain types.

The field `learning_rate` is `--learning-rate` on the command line and LEARNING_RATE= in make. A default of ""
or 0 whose help ends in "by recipe" is filled in by the stage; said aloud, it must lie in its range.
"""

from dataclasses import dataclass, field
from typing import Any


def knob(default: Any, text: str, **more: Any) -> Any:
    """A field with its help text, and least and most, its choices, or switch where they apply."""
    return field(default=default, metadata={"help": text, **more})


_ARCHS = (
    "mlp:W,W  cnn  resnet8…110  resnet8x4  resnet32x4  wrn_16_1  wrn_16_2  wrn_40_1  wrn_40_2  vgg8  vgg13  "
    "mobilenet_v2  shufflenet_v1  shufflenet_v2  torchvision:NAME  my_package.module:factory; by recipe."
)
_VIEWS = "none, crop, crop-flip or resized-crop-flip, with knobs: crop:pad=4,mixup=1; by recipe."
_COMBINE = "mean_logit, geometric, weighted:0.7,0.3, vote, learned, per_teacher, ca_mkd"
SELECT = ("last", "accuracy", "f1_macro", "nll")
PRECISIONS = ("float32", "bfloat16", "auto")
_NORMALIZE = ("imagenet", "data", "none")


@dataclass(frozen=True)
class Data:
    """Which transfer set, and where it lies."""

    data: str = knob("", "digits, mnist, fashion-mnist, cifar10, cifar100 or folder:PATH.")
    data_root: str = knob("datasets", "Folder of the data sets that torchvision reads.")


@dataclass(frozen=True)
class Cut:
    """How a transfer set is cut."""

    val_fraction: float = knob(0.0, "Share of the training data to validate on; by recipe.", least=1e-6, most=0.9)
    train_size: int = knob(0, "Keep so many training rows, drawn by class; 0 keeps all.", least=0)
    imbalance: str = knob("", "Keep a long tail of the training rows: 100 or 100:step, largest to smallest class.")
    head_size: int = knob(0, "Rows of the largest class of --imbalance; 0: all that the data allow.", least=0)


@dataclass(frozen=True)
class Machine:
    """Where the work is done."""

    device: str = knob("auto", "auto, cpu, cuda or cuda:N.")
    workers: int = knob(0, "Processes that decode a folder of images; 0: a thread does.", least=0, most=256)


@dataclass(frozen=True)
class Arithmetic:
    """How networks compute."""

    precision: str = knob("float32", "Arithmetic of the networks.", choices=("float32", "bfloat16"))


@dataclass(frozen=True)
class Output:
    """What is printed."""

    json: bool = knob(False, "Print the result as one JSON object on standard output, and nothing else there.")


@dataclass(frozen=True)
class Training:
    """How a network is trained."""

    epochs: int = knob(0, "Rounds over the training rows; by recipe.", least=1)
    batch_size: int = knob(0, "Rows of a step; by recipe.", least=1)
    optimizer: str = knob("sgd", "SGD with momentum, or AdamW.", choices=("sgd", "adamw"))
    learning_rate: float = knob(0.0, "At its highest; by recipe.", least=1e-12)
    momentum: float = knob(0.9, "Of SGD.", least=0, most=0.9999)
    nesterov: bool = knob(True, "Nesterov momentum.", switch=True)
    weight_decay: float = knob(-1.0, "On all weights; by recipe.", least=0)
    schedule: str = knob(
        "cosine", "Learning rate; step: a tenth at each of --milestones.", choices=("cosine", "step", "constant")
    )
    milestones: str = knob("0.5,0.75", "Shares of the training at which the schedule `step` goes down.")
    warmup: float = knob(0.02, "Share of the steps in which the learning rate rises.", least=0, most=0.9)
    clip_norm: float = knob(0.0, "Clip the gradient's norm to this; 0 does not.", least=0)
    ema: float = knob(0.0, "Decay of a moving average of the weights, then the result; 0: off.", least=0, most=0.99999)
    select: str = knob("last", "Keep the last epoch's weights, or those best on validation by this.", choices=SELECT)
    compile: bool = knob(False, "Compile the network with torch.compile: seconds once, then faster steps.")
    sampler: str = knob("", "Show each class equally often, or by the root of its rows.", choices=("balanced", "sqrt"))
    seed: int = knob(0, "Of initial weights and order.", least=0, most=2**31)
    keep_every: int = knob(0, "Keep the weights of every so many epochs as well: teachers stopped early.", least=0)
    tensorboard: bool = knob(False, "Write TensorBoard's event files as well, in the folder of each training.")
    out: str = knob("", "Folder of the run; a new one under runs/ when not given.")
    resume: bool = knob(False, "Continue the run in --out, with the settings it was begun with.")


@dataclass(frozen=True)
class TeacherSettings(Data, Cut, Machine, Arithmetic, Output, Training):
    """`softcache teacher`: train a teacher, for those who have none."""

    arch: str = knob("", _ARCHS)
    views: str = knob("", _VIEWS)
    normalize: str = knob("data", "Mean and standard deviation of the input.", choices=_NORMALIZE)


@dataclass(frozen=True)
class CacheSettings(Data, Cut, Machine, Arithmetic, Output):
    """`softcache teacher-cache`: run the teacher once and keep what it said."""

    precision: str = knob(
        "float32", "Arithmetic of the teacher; auto: the fastest within --tolerance.", choices=PRECISIONS
    )
    # ResNet-56 in bfloat16 costs 4e-4 nats at T = 1 and 1e-4 at T = 4, and 7 flips in 2,000 test images, with no
    # change of its accuracy beyond noise: a thousandth lets it pass, and stops what is several times as coarse.
    tolerance: float = knob(1e-3, "Most KL of auto, in nats, to the float32 teacher at T=1 and at T=4.", least=0)
    compile: bool = knob(False, "Compile the teacher first, 5 to 25 s: for large sets. Wants a C++ compiler.")
    teacher: str = knob("", _ARCHS)
    weights: str = knob("", "State dict, folder of a run, or DEFAULT for torchvision's own; without: train one.")
    normalize: str = knob("", "Input of the teacher: as its run says, else data.", choices=_NORMALIZE)
    views: str = knob("", _VIEWS)
    draws: int = knob(0, "Views of each image; by recipe.", least=1, most=100_000)
    taps: str = knob("", "Layers whose outputs are kept, whole or a statistic: layer3,layer3:pool,layer2:attention.")
    codec: str = knob("float16", "How logits become bytes: float16, float32 or sqrt8.")
    batch_size: int = knob(256, "Views that the teacher is asked about together.", least=1)
    shard_rows: int = knob(0, "Rows of a shard; 0: as many as make 128 MB, at most 65,536.", least=0)
    seed: int = knob(0, "Of the views and of the cut.", least=0, most=2**31)
    license: str = knob("", "Under which licence the cache may be used, for its README.md.")
    out: str = knob("", "Folder of the cache; caches/DATA when not given.")


@dataclass(frozen=True)
class StudentSettings(Data, Machine, Arithmetic, Output, Training):
    """`softcache student`: train a student from a cache, with no teacher."""

    cache: tuple[str, ...] = knob((), "Folder of the cache; several are one teacher; caches/DATA when not given.")
    combine: str = knob("", f"How several become one: {_COMBINE}; mean_probability when not said.")
    map: str = knob("", "Of the teacher's distribution: temperature, vector, matrix, prior or prior:tau=0.5.")
    missing: str = knob("", "Rows without an answer: skip, learn from labels; or an error.", choices=("skip", "hard"))
    recipe: str = knob("", "A published recipe fills in what is not said: see `softcache recipes`.")
    draws: int = knob(0, "Use so many draws of the cache, from the first on; 0: all there are.", least=0)
    draws_per_decode: int = knob(1, "Views of a image in a batch, each of its own draw, from one decoding.", least=1)
    arch: str = knob("", _ARCHS)
    loss: tuple[str, ...] = knob((), "A term, repeatable: kd:temperature=4,weight=0.9; all: stages losses; by recipe.")
    finetune_epochs: int = knob(0, "After distillation, so many from hard targets alone.", least=0)
    finetune_learning_rate: float = knob(0.0, "Of fine-tuning; 0: a tenth of --learning-rate.", least=0)
    order_seed: int = knob(-1, "Of the order of rows; --seed when not given.", least=0, most=2**31)
    labelled: int = knob(0, "Only so many rows, drawn by class, keep their hard targets; 0: all.", least=0)
    baseline: bool = knob(False, "Train the same student from hard targets alone as well.")
    seeds: int = knob(1, "Train so many seeds, from --seed on; report mean and spread.", least=1, most=1000)


@dataclass(frozen=True)
class StudentsSettings(StudentSettings):
    """`softcache student`, where several archs, seeds or losses are several students of one stream."""

    arch: tuple[str, ...] = knob((), _ARCHS + " Repeatable: students that read each batch once.")  # type: ignore
    seed: tuple[int, ...] = knob((), "Of initial weights and order; repeatable.", least=0, most=2**31)  # type: ignore
    vectorize: bool = knob(False, "Those of one arch as one model, where small students leave a processor idle.")
    losses: tuple[str, ...] = knob((), "A whole loss, its terms parted by blanks; repeatable: a student for each.")


@dataclass(frozen=True)
class BlendSettings(Output):
    """`softcache blend`: several caches as one teacher."""

    cache: tuple[str, ...] = knob((), "Folder of a cache; say it for each.")
    combine: str = knob("", "One more way than those without weights: weighted:0.7,0.3.")


@dataclass(frozen=True)
class BornAgainSettings(StudentSettings):
    """`softcache born-again`: students that become teachers."""

    generations: int = knob(3, "So many students, each taught by the one before.", least=1, most=100)
    archs: str = knob("", "Their archs, joined by +, for a chain of teacher assistants: resnet32+resnet20+resnet8.")


@dataclass(frozen=True)
class MethodsSettings(StudentSettings):
    """`softcache methods`: every loss on one cache."""

    # One training for all: without it logit regression and class attention diverged in their first epoch.
    clip_norm: float = knob(1.0, "Clip the gradient's norm to this; 0 does not.", least=0)
    only: str = knob("", "Only these methods, joined by commas; hard is always there.")
    layers: str = knob("", "Layers of the teacher, shallow to deep, joined by +; those that are cached.")
    student_layers: str = knob("", "Layers of the student to go with them; the same names.")
    time_steps: int = knob(10, "Steps of each method that are timed in each of 7 interleaved rounds.", least=1)


@dataclass(frozen=True)
class SearchSettings(StudentSettings):
    """`softcache tune`: a search for loss weights and training settings."""

    search: tuple[str, ...] = knob((), "What is searched, repeatable: kd.temperature=1..20:log, ema=0|0.9.")
    trials: int = knob(20, "So many students, of all processes together.", least=1, most=100_000)
    grid: bool = knob(False, "Every combination of steps and choices, once each, in place of --trials.")
    prune: bool = knob(True, "Stop a trial that is below the median of the others at its epoch.", switch=True)
    together: int = knob(1, "Train so many trials at once, from one stream.", least=1, most=256)
    storage: str = knob("", "A database, as Optuna's URLs name it, which machines may share; a file in --out.")
    study: str = knob("", "The name of the search in its storage; DATA-ARCH when not given.")


@dataclass(frozen=True)
class ListSettings(Output):
    """`softcache recipes`, `softcache losses` and `softcache compare`."""


@dataclass(frozen=True)
class EvaluateSettings(Data, Machine, Output):
    """`softcache evaluate RUN`: a student's figures again, from its weights."""

    cache: tuple[str, ...] = knob((), "Folder of the cache, or of each, where no longer where the run says.")


@dataclass(frozen=True)
class ExportSettings(Data, Output):
    """`softcache export RUN`: a student's run as files that other programs take."""

    cache: tuple[str, ...] = knob((), "Folder of the cache, or of each, where no longer where the run says.")
    int8: bool = knob(False, "A file in 8 bits as well, calibrated on views of the cache.")
    tolerance: float = knob(1e-4, "Most that a logit may differ from PyTorch's.", least=0)
    most_drop: float = knob(0.01, "Most accuracy that --int8 may cost, as a share of the images.", least=0, most=1)


@dataclass(frozen=True)
class PredictSettings(Output):
    """`softcache predict MODEL PICTURES`: what an exported student says of images."""

    top: int = knob(3, "So many classes of each image, the likeliest first.", least=1)


@dataclass(frozen=True)
class CheckSettings(Data, Machine, Output):
    """`softcache check-cache CACHE`: is every byte what it was?"""

    deep: bool = knob(False, "Render every view again; with --weights, ask the teacher about some of them too.")
    repair: bool = knob(False, "Ask the teacher again for the shards that are bad, and for no others.")
    weights: str = knob("", "The teacher's weights, as for teacher-cache.")
    teacher: str = knob("", "Its arch, where that is code of yours: my_package.module:factory.")


@dataclass(frozen=True)
class InspectSettings(Output):
    """`softcache inspect CACHE`: what in the teacher matters."""

    rows: int = knob(10_000, "Training rows that are read, and held-out rows of the probes, at most.", least=10)
    repeats: int = knob(5, "Permutations of each tap and channel.", least=1, most=1000)
    temperature: float = knob(4.0, "Of the similarity of classes.", least=1e-3)
    seed: int = knob(0, "Of the permutations, and of the projection of very wide taps.", least=0, most=2**31)
    out: str = knob("", "Folder of the findings; a new one under runs/ when not given.")


@dataclass(frozen=True)
class PackSettings(Output):
    """`softcache cache-pack CACHE OUT.tar` and `softcache cache-unpack FILE.tar OUT`."""


@dataclass(frozen=True)
class ReportSettings(Output):
    """`softcache report RUNS`: runs as one page."""

    out: str = knob("", "Folder of report.html and report.md; a new one under runs/ when not given.")
    data: str = knob("", "Where the runs' data are now, for the images: folder:PATH.")
    data_root: str = knob("", "Folder of the data sets that torchvision reads, where not as the runs say.")
    show: int = knob(12, "Images of each run on which teacher and student differ most.", least=0, most=200)
    png: bool = knob(False, "Each image as a PNG beside the page as well, for papers and slides.")
    latency: bool = knob(True, "Measure the time that a image takes here, of every network.", switch=True)
