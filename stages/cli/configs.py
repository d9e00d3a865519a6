"""Every knob of every stage, in plain types.

The field `learning_rate` is `--learning-rate` on the command line and LEARNING_RATE= in make. A default of ""
or 0 whose help ends in "by recipe" is filled in by the stage; said aloud, it must lie in its range.
"""

from dataclasses import dataclass, field
from typing import Any


def option(default: Any, text: str, **more: Any) -> Any:
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
class DataOptions:
    """Which transfer set, and where it lies."""

    data: str = option("", "digits, mnist, fashion-mnist, cifar10, cifar100 or folder:PATH.")
    data_root: str = option("datasets", "Folder of the data sets that torchvision reads.")


@dataclass(frozen=True)
class CutOptions:
    """How a transfer set is cut."""

    val_fraction: float = option(0.0, "Share of the training data to validate on; by recipe.", least=1e-6, most=0.9)
    train_size: int = option(0, "Keep so many training rows, drawn by class; 0 keeps all.", least=0)
    imbalance: str = option("", "Keep a long tail of the training rows: 100 or 100:step, largest to smallest class.")
    head_size: int = option(0, "Rows of the largest class of --imbalance; 0: all that the data allow.", least=0)


@dataclass(frozen=True)
class MachineOptions:
    """Where the work is done."""

    device: str = option("auto", "auto, cpu, cuda or cuda:N.")
    workers: int = option(0, "Processes that decode a folder of images; 0: a thread does.", least=0, most=256)


@dataclass(frozen=True)
class PrecisionOptions:
    """How networks compute."""

    precision: str = option("float32", "PrecisionOptions of the networks.", choices=("float32", "bfloat16"))


@dataclass(frozen=True)
class OutputOptions:
    """What is printed."""

    json: bool = option(False, "Print the result as one JSON object on standard output, and nothing else there.")


@dataclass(frozen=True)
class TrainingOptions:
    """How a network is trained."""

    epochs: int = option(0, "Rounds over the training rows; by recipe.", least=1)
    batch_size: int = option(0, "Rows of a step; by recipe.", least=1)
    optimizer: str = option("sgd", "SGD with momentum, or AdamW.", choices=("sgd", "adamw"))
    learning_rate: float = option(0.0, "At its highest; by recipe.", least=1e-12)
    momentum: float = option(0.9, "Of SGD.", least=0, most=0.9999)
    nesterov: bool = option(True, "Nesterov momentum.", switch=True)
    weight_decay: float = option(-1.0, "On all weights; by recipe.", least=0)
    schedule: str = option(
        "cosine", "Learning rate; step: a tenth at each of --milestones.", choices=("cosine", "step", "constant")
    )
    milestones: str = option("0.5,0.75", "Shares of the training at which the schedule `step` goes down.")
    warmup: float = option(0.02, "Share of the steps in which the learning rate rises.", least=0, most=0.9)
    clip_norm: float = option(0.0, "Clip the gradient's norm to this; 0 does not.", least=0)
    ema: float = option(
        0.0, "Decay of a moving average of the weights, then the result; 0: off.", least=0, most=0.99999
    )
    select: str = option("last", "Keep the last epoch's weights, or those best on validation by this.", choices=SELECT)
    compile: bool = option(False, "Compile the network with torch.compile: seconds once, then faster steps.")
    sampler: str = option(
        "", "Show each class equally often, or by the root of its rows.", choices=("balanced", "sqrt")
    )
    seed: int = option(0, "Of initial weights and order.", least=0, most=2**31)
    keep_every: int = option(0, "Keep the weights of every so many epochs as well: teachers stopped early.", least=0)
    tensorboard: bool = option(False, "Write TensorBoard's event files as well, in the folder of each training.")
    out: str = option("", "Folder of the run; a new one under runs/ when not given.")
    resume: bool = option(False, "Continue the run in --out, with the settings it was begun with.")


@dataclass(frozen=True)
class TeacherConfig(DataOptions, CutOptions, MachineOptions, PrecisionOptions, OutputOptions, TrainingOptions):
    """`softcache teacher`: train a teacher, for those who have none."""

    arch: str = option("", _ARCHS)
    views: str = option("", _VIEWS)
    normalize: str = option("data", "Mean and standard deviation of the input.", choices=_NORMALIZE)


@dataclass(frozen=True)
class CacheConfig(DataOptions, CutOptions, MachineOptions, PrecisionOptions, OutputOptions):
    """`softcache teacher-cache`: run the teacher once and keep what it said."""

    precision: str = option(
        "float32", "Arithmetic of the teacher; auto: the fastest within --tolerance.", choices=PRECISIONS
    )
    # ResNet-56 in bfloat16 costs 4e-4 nats at T = 1 and 1e-4 at T = 4, and 7 flips in 2,000 test images, with no
    # change of its accuracy beyond noise: a thousandth lets it pass, and stops what is several times as coarse.
    tolerance: float = option(1e-3, "Most KL of auto, in nats, to the float32 teacher at T=1 and at T=4.", least=0)
    compile: bool = option(False, "Compile the teacher first, 5 to 25 s: for large sets. Wants a C++ compiler.")
    teacher: str = option("", _ARCHS)
    weights: str = option("", "State dict, folder of a run, or DEFAULT for torchvision's own; without: train one.")
    normalize: str = option("", "Input of the teacher: as its run says, else data.", choices=_NORMALIZE)
    views: str = option("", _VIEWS)
    draws: int = option(0, "Views of each image; by recipe.", least=1, most=100_000)
    taps: str = option("", "Layers whose outputs are kept, whole or a statistic: layer3,layer3:pool,layer2:attention.")
    codec: str = option("float16", "How logits become bytes: float16, float32 or sqrt8.")
    batch_size: int = option(256, "Views that the teacher is asked about together.", least=1)
    shard_rows: int = option(0, "Rows of a shard; 0: as many as make 128 MB, at most 65,536.", least=0)
    seed: int = option(0, "Of the views and of the cut.", least=0, most=2**31)
    license: str = option("", "Under which licence the cache may be used, for its README.md.")
    out: str = option("", "Folder of the cache; caches/DATA when not given.")


@dataclass(frozen=True)
class StudentConfig(DataOptions, MachineOptions, PrecisionOptions, OutputOptions, TrainingOptions):
    """`softcache student`: train a student from a cache, with no teacher."""

    cache: tuple[str, ...] = option((), "Folder of the cache; several are one teacher; caches/DATA when not given.")
    combine: str = option("", f"How several become one: {_COMBINE}; mean_probability when not said.")
    map: str = option("", "Of the teacher's distribution: temperature, vector, matrix, prior or prior:tau=0.5.")
    missing: str = option(
        "", "Rows without an answer: skip, learn from labels; or an error.", choices=("skip", "hard")
    )
    recipe: str = option("", "A published recipe fills in what is not said: see `softcache recipes`.")
    draws: int = option(0, "Use so many draws of the cache, from the first on; 0: all there are.", least=0)
    draws_per_decode: int = option(1, "Views of a image in a batch, each of its own draw, from one decoding.", least=1)
    arch: str = option("", _ARCHS)
    loss: tuple[str, ...] = option(
        (), "A term, repeatable: kd:temperature=4,weight=0.9; all: stages losses; by recipe."
    )
    finetune_epochs: int = option(0, "After distillation, so many from hard targets alone.", least=0)
    finetune_learning_rate: float = option(0.0, "Of fine-tuning; 0: a tenth of --learning-rate.", least=0)
    order_seed: int = option(-1, "Of the order of rows; --seed when not given.", least=0, most=2**31)
    labelled: int = option(0, "Only so many rows, drawn by class, keep their hard targets; 0: all.", least=0)
    baseline: bool = option(False, "Train the same student from hard targets alone as well.")
    seeds: int = option(1, "Train so many seeds, from --seed on; report mean and spread.", least=1, most=1000)


@dataclass(frozen=True)
class StudentsConfig(StudentConfig):
    """`softcache student`, where several archs, seeds or losses are several students of one stream."""

    arch: tuple[str, ...] = option((), _ARCHS + " Repeatable: students that read each batch once.")  # type: ignore
    seed: tuple[int, ...] = option((), "Of initial weights and order; repeatable.", least=0, most=2**31)  # type: ignore
    vectorize: bool = option(False, "Those of one arch as one model, where small students leave a processor idle.")
    losses: tuple[str, ...] = option((), "A whole loss, its terms parted by blanks; repeatable: a student for each.")


@dataclass(frozen=True)
class BlendConfig(OutputOptions):
    """`softcache blend`: several caches as one teacher."""

    cache: tuple[str, ...] = option((), "Folder of a cache; say it for each.")
    combine: str = option("", "One more way than those without weights: weighted:0.7,0.3.")


@dataclass(frozen=True)
class BornAgainConfig(StudentConfig):
    """`softcache born-again`: students that become teachers."""

    generations: int = option(3, "So many students, each taught by the one before.", least=1, most=100)
    archs: str = option("", "Their archs, joined by +, for a chain of teacher assistants: resnet32+resnet20+resnet8.")


@dataclass(frozen=True)
class MethodsConfig(StudentConfig):
    """`softcache methods`: every loss on one cache."""

    # One training for all: without it logit regression and class attention diverged in their first epoch.
    clip_norm: float = option(1.0, "Clip the gradient's norm to this; 0 does not.", least=0)
    only: str = option("", "Only these methods, joined by commas; hard is always there.")
    layers: str = option("", "Layers of the teacher, shallow to deep, joined by +; those that are cached.")
    student_layers: str = option("", "Layers of the student to go with them; the same names.")
    time_steps: int = option(10, "Steps of each method that are timed in each of 7 interleaved rounds.", least=1)


@dataclass(frozen=True)
class TuneConfig(StudentConfig):
    """`softcache tune`: a search for loss weights and training settings."""

    search: tuple[str, ...] = option((), "What is searched, repeatable: kd.temperature=1..20:log, ema=0|0.9.")
    trials: int = option(20, "So many students, of all processes together.", least=1, most=100_000)
    grid: bool = option(False, "Every combination of steps and choices, once each, in place of --trials.")
    prune: bool = option(True, "Stop a trial that is below the median of the others at its epoch.", switch=True)
    together: int = option(1, "Train so many trials at once, from one stream.", least=1, most=256)
    storage: str = option("", "A database, as Optuna's URLs name it, which machines may share; a file in --out.")
    study: str = option("", "The name of the search in its storage; DATA-ARCH when not given.")


@dataclass(frozen=True)
class ListConfig(OutputOptions):
    """`softcache recipes`, `softcache losses` and `softcache compare`."""


@dataclass(frozen=True)
class EvaluateConfig(DataOptions, MachineOptions, OutputOptions):
    """`softcache evaluate RUN`: a student's figures again, from its weights."""

    cache: tuple[str, ...] = option((), "Folder of the cache, or of each, where no longer where the run says.")


@dataclass(frozen=True)
class ExportConfig(DataOptions, OutputOptions):
    """`softcache export RUN`: a student's run as files that other programs take."""

    cache: tuple[str, ...] = option((), "Folder of the cache, or of each, where no longer where the run says.")
    int8: bool = option(False, "A file in 8 bits as well, calibrated on views of the cache.")
    tolerance: float = option(1e-4, "Most that a logit may differ from PyTorch's.", least=0)
    most_drop: float = option(0.01, "Most accuracy that --int8 may cost, as a share of the images.", least=0, most=1)


@dataclass(frozen=True)
class PredictConfig(OutputOptions):
    """`softcache predict MODEL PICTURES`: what an exported student says of images."""

    top: int = option(3, "So many classes of each image, the likeliest first.", least=1)


@dataclass(frozen=True)
class CheckConfig(DataOptions, MachineOptions, OutputOptions):
    """`softcache check-cache CACHE`: is every byte what it was?"""

    deep: bool = option(False, "Render every view again; with --weights, ask the teacher about some of them too.")
    repair: bool = option(False, "Ask the teacher again for the shards that are bad, and for no others.")
    weights: str = option("", "The teacher's weights, as for teacher-cache.")
    teacher: str = option("", "Its arch, where that is code of yours: my_package.module:factory.")


@dataclass(frozen=True)
class InspectConfig(OutputOptions):
    """`softcache inspect CACHE`: what in the teacher matters."""

    rows: int = option(10_000, "Training rows that are read, and held-out rows of the probes, at most.", least=10)
    repeats: int = option(5, "Permutations of each tap and channel.", least=1, most=1000)
    temperature: float = option(4.0, "Of the similarity of classes.", least=1e-3)
    seed: int = option(0, "Of the permutations, and of the projection of very wide taps.", least=0, most=2**31)
    out: str = option("", "Folder of the findings; a new one under runs/ when not given.")


@dataclass(frozen=True)
class ArchiveConfig(OutputOptions):
    """`softcache cache-pack CACHE OUT.tar` and `softcache cache-unpack FILE.tar OUT`."""


@dataclass(frozen=True)
class ReportConfig(OutputOptions):
    """`softcache report RUNS`: runs as one page."""

    out: str = option("", "Folder of report.html and report.md; a new one under runs/ when not given.")
    data: str = option("", "Where the runs' data are now, for the images: folder:PATH.")
    data_root: str = option("", "Folder of the data sets that torchvision reads, where not as the runs say.")
    show: int = option(12, "Images of each run on which teacher and student differ most.", least=0, most=200)
    png: bool = option(False, "Each image as a PNG beside the page as well, for papers and slides.")
    latency: bool = option(True, "Measure the time that a image takes here, of every network.", switch=True)
