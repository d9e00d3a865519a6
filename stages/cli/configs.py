"""The options of every command, in plain types.

The field `learning_rate` is `--learning-rate` on the command line, LEARNING_RATE= in make, and "learning_rate" in
settings.json. A field that is left at its default and has `by_recipe` is filled in from the data set's own defaults
(`softcache.stages.cli.defaults`).

The class in which a field is declared gives its heading in `--help`.
"""

from dataclasses import dataclass
from typing import ClassVar

from .option_groups import (
    ARCH_HELP,
    CACHE_HELP,
    CUSTOM_ARCH_HELP,
    FILE_TEACHER_HELP,
    INDEX_HELP,
    INIT_HELP,
    NORMALIZE_HELP,
    OUTPUT_HELP,
    OUTPUTS,
    PRECISIONS,
    REHASH_HELP,
    VIEWS_HELP,
    WEIGHTS_KEY_HELP,
    CacheSourceOptions,
    DataOptions,
    FolderOptions,
    MachineOptions,
    OutputOptions,
    PrecisionOptions,
    SplitOptions,
    TrainingOptions,
    option,
)


@dataclass(frozen=True)
class TeacherConfig(
    DataOptions, FolderOptions, SplitOptions, MachineOptions, PrecisionOptions, OutputOptions, TrainingOptions
):
    """`softcache teacher`: train a teacher."""

    heading: ClassVar[str] = "Teacher"
    arch: str = option("", ARCH_HELP, by_recipe=True)
    init: str = option("", INIT_HELP)
    output: str = option("", OUTPUT_HELP)
    views: str = option("", VIEWS_HELP, by_recipe=True)
    normalize: str = option(
        "",
        "Mean and standard deviation of the input; when not given, data, or model where --init starts from a network"
        f" that has one. {NORMALIZE_HELP}",
    )


@dataclass(frozen=True)
class StageOneOptions(DataOptions, FolderOptions, SplitOptions, MachineOptions, PrecisionOptions, OutputOptions):
    """What a cache holds, and how its teacher is run."""

    heading: ClassVar[str] = "Cache"
    precision: str = option(
        "float32", "Numeric precision of the teacher; auto: the fastest within --tolerance.", choices=PRECISIONS
    )
    # ResNet-56 in bfloat16 costs 4e-4 nats at T = 1 and 1e-4 at T = 4, and changes 7 top-1 predictions of 2,000 test
    # images, with no change of its accuracy beyond noise: a thousandth accepts it, and rejects what is several times
    # as coarse.
    tolerance: float = option(
        1e-3,
        "Largest KL divergence, in nats, of --precision auto from the float32 teacher, at T=1 and at T=4; of an"
        " embedding 1 - cosine, of numbers the difference in standard deviations.",
        least=0,
    )
    compile: bool = option(
        False,
        "Compile the teacher first: takes 5 to 25 s, pays for large sets, needs a C++ compiler. On a CPU, later"
        " commands with this teacher use what was compiled.",
    )
    teacher: str = option("", f"{ARCH_HELP} {FILE_TEACHER_HELP}", by_recipe=True)
    output: str = option("", OUTPUT_HELP)
    weights: str = option(
        "",
        "Weights: a file of them (torch.save or safetensors), the folder of a run, or DEFAULT for those published with"
        " a torchvision:, timm: or hf: network; when not given, a teacher is trained.",
    )
    weights_key: str = option("", WEIGHTS_KEY_HELP)
    class_map: str = option(
        "",
        "Which of the teacher's classes are which of the data: names, or a file of lines 'data class, teacher class'.",
    )
    normalize: str = option(
        "",
        "Input of the teacher; when not given, as its run recorded or as published with a timm: or hf: network, else"
        f" data. {NORMALIZE_HELP}",
    )
    outputs: str = option(
        "logits",
        "What the teacher's network outputs; probabilities, after a softmax or log_softmax, are stored as logarithms;"
        " of several labels, after a sigmoid, as log-odds.",
        choices=OUTPUTS,
    )
    views: str = option("", VIEWS_HELP, by_recipe=True)
    teacher_size: int = option(
        0,
        "Pixels of the teacher's views, where not those of the students': both are cut out of the image alike.",
        least=1,
        most=4096,
    )
    draws: int = option(0, "Views of each image.", least=1, most=100_000, by_recipe=True)
    taps: str = option(
        "", "Layers whose outputs are written, whole or a statistic of them: layer3,layer3:pool,layer2:attention."
    )
    codec: str = option(
        "float16",
        "How logits are stored: float16, float32 or sqrt8; some of many classes: top:20, sample:50; an embedding"
        " also as int8, numbers always as float32.",
    )
    axes: bool = option(False, "Keep the principal axes of an embedding as well, for losses with standardize=axes.")
    batch_size: int = option(256, "Views in a batch of the teacher.", least=1)
    shard_rows: int = option(0, "Rows of a shard; 0: as many as make 128 MB, at most 65,536.", least=0)
    seed: int = option(0, "Seed of the views and of the split.", least=0, most=2**31)


@dataclass(frozen=True)
class CacheConfig(StageOneOptions):
    """`softcache teacher-cache`: run the teacher once and write its outputs."""

    heading: ClassVar[str] = "Cache"
    license: str = option("", "Licence under which the cache may be used, for its README.md.")
    out: str = option("", "Folder of the cache; caches/DATA when not given.")


@dataclass(frozen=True)
class PlanConfig(StageOneOptions):
    """`softcache plan`: what a cache of these options will take."""

    heading: ClassVar[str] = "Plan"
    rows: str = option("", "Training images, with those for validation, such as 14e6; those of --data when not given.")
    classes: str = option(
        "",
        "Number of classes, such as 21841, or their order, as for teacher-cache; when not given, those of --data.",
    )
    rate: float = option(
        0.0,
        "Views a second of the teacher, where that is known: no teacher is built then. With --rows and a number of"
        " --classes the data are not opened either.",
        least=1e-6,
    )
    ranks: int = option(1, "Processes that share stage one, each as fast as this machine.", least=1, most=100_000)
    epochs: int = option(100, "Epochs of a student.", least=1)
    students: int = option(1, "Students that are trained from the cache.", least=1)
    student_rate: float = option(1000.0, "Views a second of a student.", least=1e-6)
    budget: str = option("", "Most bytes of the cache, such as 500GB or 2TiB: which codec, draws and taps fit.")


@dataclass(frozen=True)
class StudentConfig(CacheSourceOptions, DataOptions, MachineOptions, PrecisionOptions, OutputOptions, TrainingOptions):
    """`softcache student`: train a student from a cache."""

    heading: ClassVar[str] = "Student and loss"
    recipe: str = option("", "A published recipe, for options that are not given: see `softcache recipes`.")
    arch: str = option("", ARCH_HELP, by_recipe=True)
    init: str = option("", INIT_HELP)
    output: str = option("", OUTPUT_HELP)
    normalize: str = option(
        "",
        "Mean and standard deviation of the student's input; when not given, model where --init starts from a network"
        f" that has one, else the teacher's. {NORMALIZE_HELP}",
    )
    loss: tuple[str, ...] = option(
        (),
        "A term of the loss, such as kd:temperature=4,weight=0.9, or my_module:MyLoss:weight=0.5 of your own; repeat"
        " for several; see `softcache losses`.",
        by_recipe=True,
    )
    width: int = option(
        0,
        "Width of the student's embedding, for teachers of the task embedding; that of the teacher when not given.",
        least=0,
        most=1 << 16,
    )
    finetune_epochs: int = option(0, "Epochs from hard targets alone, after distillation.", least=0)
    finetune_learning_rate: float = option(
        0.0, "Learning rate of fine-tuning; 0: a tenth of --learning-rate.", least=0
    )
    order_seed: int = option(-1, "Seed of the order of rows; --seed when not given.", least=0, most=2**31)
    labelled: int = option(0, "Only this many rows, drawn by class, keep their labels; 0: all.", least=0)
    baseline: bool = option(False, "Train the same student from hard targets alone as well.")
    seeds: int = option(1, "Train this many seeds, from --seed on; report mean and spread.", least=1, most=1000)


@dataclass(frozen=True)
class StudentsConfig(StudentConfig):
    """`softcache student`, where several archs, seeds or losses make several students that read each batch once."""

    heading: ClassVar[str] = "Several students"
    arch: tuple[str, ...] = option(  # type: ignore[assignment]
        (), f"{ARCH_HELP} Repeat for several students, which read each batch once.", by_recipe=True
    )
    seed: tuple[int, ...] = option(  # type: ignore[assignment]
        (), "Seed of the initial weights and of the order of rows; repeat for several students.", least=0, most=2**31
    )
    vectorize: bool = option(
        False, "Train those of one arch as one model: pays where small students leave a processor idle."
    )
    losses: tuple[str, ...] = option(
        (), "A whole loss, its terms separated by blanks; repeat for a student with each."
    )


@dataclass(frozen=True)
class BlendConfig(OutputOptions):
    """`softcache blend`: compare ways to combine several caches."""

    heading: ClassVar[str] = "Teachers"
    cache: tuple[str, ...] = option((), "Folder of a cache; repeat for each.")
    combine: str = option("", "One more way, beside those without weights: weighted:0.7,0.3.")


@dataclass(frozen=True)
class BornAgainConfig(StudentConfig):
    """`softcache born-again`: a chain of students, each the teacher of the next."""

    heading: ClassVar[str] = "Chain"
    generations: int = option(3, "Number of students, each trained from the one before.", least=1, most=100)
    archs: str = option(
        "", "An arch for each generation, joined by +, for a chain of teacher assistants: resnet32+resnet20+resnet8."
    )


@dataclass(frozen=True)
class MethodsConfig(StudentConfig):
    """`softcache methods`: one student by every loss on one cache."""

    heading: ClassVar[str] = "Methods"
    # The same training for all: without clipping, logit regression and class attention diverged in their first epoch.
    clip_norm: float = option(1.0, "Clip the norm of the gradient to this; 0: off.", least=0)
    only: str = option("", "Only these methods, joined by commas; hard is always among them.")
    layers: str = option("", "Layers of the teacher, shallow to deep, joined by +; the cached ones when not given.")
    student_layers: str = option("", "Layers of the student to match them; the same names when not given.")
    time_steps: int = option(10, "Steps of each method that are timed in each of 7 interleaved rounds.", least=1)


@dataclass(frozen=True)
class TuneConfig(StudentConfig):
    """`softcache tune`: search loss weights and training options."""

    heading: ClassVar[str] = "Search"
    search: tuple[str, ...] = option(
        (), "What is searched: kd.temperature=1..20:log or ema=0|0.9; repeat for several."
    )
    trials: int = option(20, "Number of students, of all processes together.", least=1, most=100_000)
    grid: bool = option(False, "Try every combination of steps and choices once, in place of --trials.")
    prune: bool = option(True, "Stop a trial that is below the median of the others at its epoch.", switch=True)
    together: int = option(1, "Train this many trials at once, from one stream.", least=1, most=256)
    storage: str = option(
        "", "URL of an Optuna database, which several machines may share; a file in --out when not given."
    )
    study: str = option("", "Name of the search in its database; DATA-ARCH when not given.")


@dataclass(frozen=True)
class ListConfig(OutputOptions):
    """`softcache recipes`, `softcache losses` and `softcache compare`."""


@dataclass(frozen=True)
class EvaluateConfig(DataOptions, MachineOptions, OutputOptions):
    """`softcache evaluate RUN`: measure a student again, from its weights."""

    heading: ClassVar[str] = "Data"
    cache: tuple[str, ...] = option((), CACHE_HELP)
    arch: str = option("", CUSTOM_ARCH_HELP)


@dataclass(frozen=True)
class ExportConfig(DataOptions, OutputOptions):
    """`softcache export RUN`: write a student in formats that other programs read."""

    heading: ClassVar[str] = "Export"
    cache: tuple[str, ...] = option((), CACHE_HELP)
    arch: str = option("", CUSTOM_ARCH_HELP)
    int8: bool = option(False, "Write an int8 quantised file as well, calibrated on views of the cache.")
    tolerance: float = option(
        1e-4,
        "Largest difference of a logit from PyTorch's; of numbers and embeddings in standard deviations.",
        least=0,
    )
    most_drop: float = option(
        0.01,
        "Largest loss by --int8: of accuracy, as a share of the images; of mAP; of numbers the relative increase of"
        " the RMSE; of embeddings 1 - the cosine.",
        least=0,
        most=1,
    )


@dataclass(frozen=True)
class PredictConfig(OutputOptions):
    """`softcache predict MODEL IMAGES`: run an exported student on images."""

    heading: ClassVar[str] = "Output"
    top: int = option(
        3,
        "Number of classes printed for each image, the most probable first; of several labels those above their"
        " thresholds when not given.",
        least=1,
    )


@dataclass(frozen=True)
class CheckConfig(DataOptions, MachineOptions, OutputOptions):
    """`softcache check-cache CACHE`: check every byte of a cache."""

    heading: ClassVar[str] = "Check"
    deep: bool = option(
        False, "Render every view again as well; with --weights, compute some of the teacher's outputs again too."
    )
    repair: bool = option(False, "Compute the damaged shards again, and no others; needs --weights.")
    weights: str = option("", "The teacher's weights, as for teacher-cache.")
    weights_key: str = option("", WEIGHTS_KEY_HELP)
    teacher: str = option(
        "", "The teacher's arch, where it is code of yours: my_package.module:factory; or its file: onnx:FILE."
    )


@dataclass(frozen=True)
class HeadConfig(DataOptions, OutputOptions):
    """`softcache head-cache CACHE`: make the cache of a classifier of a cache of embeddings."""

    heading: ClassVar[str] = "Cache"
    head: str = option(
        "",
        "probe: logistic regression; centroids: cosines to the means of the classes; FILE.npz: weight [K, D], and"
        " where they differ bias [K], classes [K], scale and normalize.",
    )
    labelled: int = option(0, "Fit the head to this many training rows, drawn by class.", least=0)
    seed: int = option(0, "Seed of the labelled rows, as of a student with --labelled.", least=0, most=2**31)
    out: str = option("", "Folder of the cache; CACHE-probe, CACHE-centroids or CACHE-file when not given.")


@dataclass(frozen=True)
class InspectConfig(OutputOptions):
    """`softcache inspect CACHE`: measure what of the teacher matters."""

    heading: ClassVar[str] = "Inspection"
    rows: int = option(10_000, "Most training rows, and most held-out rows of the linear probes, to read.", least=10)
    repeats: int = option(5, "Permutations of each tap and channel.", least=1, most=1000)
    temperature: float = option(4.0, "Temperature of the similarity of classes.", least=1e-3)
    seed: int = option(
        0, "Seed of the permutations, and of the random projection of very wide taps.", least=0, most=2**31
    )
    out: str = option("", "Folder of the results; a new one under runs/ when not given.")


@dataclass(frozen=True)
class ArchiveConfig(OutputOptions):
    """`softcache cache-pack CACHE OUT.tar` and `softcache cache-unpack FILE.tar OUT`."""


@dataclass(frozen=True)
class ReportConfig(OutputOptions):
    """`softcache report RUNS`: runs as one page."""

    heading: ClassVar[str] = "Report"
    out: str = option("", "Folder of report.html and report.md; a new one under runs/ when not given.")
    data: str = option("", "Where the runs' data are now, for the images: folder:PATH.")
    data_root: str = option("", "Folder of the data sets that torchvision reads, where not as the runs recorded.")
    index: str = option("", INDEX_HELP)
    rehash: bool = option(False, REHASH_HELP)
    show: int = option(12, "Images of each run on which teacher and student differ most.", least=0, most=200)
    png: bool = option(False, "Write each plot as a PNG beside the page as well.")
    latency: bool = option(True, "Measure here the time that each network takes for an image.", switch=True)
