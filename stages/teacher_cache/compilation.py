"""Compiling a teacher into a program that later processes load, identified by every operation and weight of it.

ResNet-56 in batches of 256, float32, PyTorch 2.14.1, one thread, seconds of processor time: torch.compile takes 26 s,
and in a second process 10 s, though PyTorch's caches are full (frozen weights bypass the cache of the traced graph).
A program takes 31 s, and in a second process 1.8 s, which is a batch of the plain teacher and one of the program.
The program takes 0.86 times as long for a batch as what torch.compile makes.
"""

import json
import os
import platform
import tempfile
import warnings
from collections.abc import Callable
from contextlib import suppress
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.weak import WeakTensorKeyDictionary

from .kept_programs import open_kept_programs

Program = Callable[[torch.Tensor], list[torch.Tensor]]  # of views of the shape that it was compiled for
_OPTIONS = {"freezing": True}  # weights become constants, cast and packed once
_PREFIXES = ("ATEN_", "DNNL_", "ONEDNN_", "TORCHINDUCTOR_")  # of variables that change what is compiled or how it runs


def make_program(infer: Program, model: nn.Module, views: torch.Tensor, tell: Callable[[str], object]) -> Program:
    """Compile a function, or load what was compiled of it before.

    On a CPU the program is kept for later processes. A network that cannot be exported, and any on another device, is
    compiled by torch.compile, in each process.

    Args:
        infer: Runs `model`, without gradients.
        model: What `infer` runs, in eval mode, on the device of `views`.
        views: uint8 [B, C, S, S], contiguous: the one shape that the program is for.
        tell: Called with a line for the user that says which of the two is done, before it is.

    Raises:
        Exception: Whatever the compiler raises.
    """
    kept, name = open_kept_programs(), ""
    if views.device.type == "cpu":
        with suppress(Exception):  # a network may be a user's code, with operations that cannot be recorded
            name = identify(infer, views)
            if payload := kept.read(name):
                program = _load(payload)
                tell("the compiled teacher of an earlier command is used")
                return program
    tell("compiling the teacher, 5 to 25 s")
    if name:
        with suppress(Exception):  # it cannot be exported; where there is no compiler, torch.compile fails as well
            payload = _compile(infer, model, views)
            program = _load(payload)
            if not kept.write(name, payload):
                tell(f"the compiled teacher is not kept for the next command: {kept.describe_obstacle()}")
            return program
    torch.compiler.reset()  # compiled code is cached for the function `infer`, at most eight versions of it
    options: dict[str, Any] = dict(_OPTIONS) if views.device.type == "cpu" else {}
    compiled: Program = torch.compile(infer, fullgraph=True, dynamic=False, options=options)
    return compiled


def _compile(infer: Program, model: nn.Module, views: torch.Tensor) -> bytes:
    """Compile a function ahead of time; return the program as the bytes of a PT2 archive."""
    from torch._inductor import aoti_compile_and_package  # here, because it takes 2 s

    with tempfile.TemporaryDirectory(prefix="softcache-") as folder, warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # for developers of PyTorch
        path = f"{folder}/teacher.pt2"
        exported = torch.export.export(_Function(infer, model).eval(), (views,), strict=False)
        aoti_compile_and_package(exported, package_path=path, inductor_configs=_OPTIONS)
        return Path(path).read_bytes()


class _Function(nn.Module):
    """A function as a module, which is what can be exported.

    Args:
        infer: The function.
        model: The module whose weights it uses.
    """

    def __init__(self, infer: Program, model: nn.Module):
        super().__init__()
        self.model, self.infer = model, infer

    def forward(self, views: torch.Tensor) -> list[torch.Tensor]:
        return self.infer(views)


def identify(infer: Program, views: torch.Tensor) -> str:
    """Return the digest of all that a program depends on: operations, weights, shapes, versions, processor, threads.

    The function is run once, and every operation is recorded. That also sees code and tensors which are in no state
    dict, and takes no longer than a batch; to export the network, PyTorch's compiler is imported, for 2 s.
    """
    with torch.no_grad(), _Recorder(views) as recorder:
        outputs = infer(views)
    surroundings = {
        "torch": [torch.__version__, str(torch.version.git_version), torch.__config__.show()],
        "options": [_OPTIONS, torch.get_float32_matmul_precision(), torch.are_deterministic_algorithms_enabled()],
        "processor": [torch.backends.cpu.get_cpu_capability(), platform.machine(), *_describe_processor()],
        "threads": torch.get_num_threads(),
        "variables": sorted(item for item in os.environ.items() if item[0].startswith(_PREFIXES)),
        "outputs": [recorder.describe(output) for output in outputs],
    }
    recorder.digest.update(json.dumps(surroundings).encode())
    digest: str = recorder.digest.hexdigest()
    return digest


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Adds to a digest which operations run on which tensors; a tensor that no operation has made, with its content.

    Args:
        views: The input, of which the shape alone counts.
    """

    def __init__(self, views: torch.Tensor):
        super().__init__()  # type: ignore[no-untyped-call]
        self.digest = sha256()
        self._numbers = WeakTensorKeyDictionary()
        self._count = 0
        self._add(f"{self._assign_number(views)} {_describe_form(views)}")

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # else PyTorch's compiler is imported, for 2 s, to be told that it has nothing to do here

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        inputs = tree_map(self.describe, (args, kwargs or {}))
        outputs = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(outputs):
            if isinstance(leaf, torch.Tensor) and leaf not in self._numbers:
                self._assign_number(leaf)
        forms = [_describe_form(leaf) for leaf in tree_leaves(outputs) if isinstance(leaf, torch.Tensor)]
        self._add(f"{func} {inputs} {tree_map(self.describe, outputs)} {forms}")
        return outputs

    def describe(self, value: Any) -> Any:
        """Return the name of a tensor; any other value as it is."""
        if not isinstance(value, torch.Tensor):
            return value
        if value not in self._numbers:
            content = sha256(value.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data)
            self._add(f"{self._assign_number(value)} {_describe_form(value)} {content.hexdigest()}")
        return f"%{self._numbers[value]}"

    def _assign_number(self, tensor: torch.Tensor) -> str:
        self._count += 1
        self._numbers[tensor] = self._count
        return f"%{self._count}"

    def _add(self, line: str) -> None:
        self.digest.update(f"{line}\n".encode())


def _describe_form(tensor: torch.Tensor) -> tuple[Any, ...]:
    return tuple(tensor.shape), tensor.stride(), str(tensor.dtype), str(tensor.device)


def _describe_processor() -> list[str]:
    """Return the model and the features of the first processor, as the kernel names them."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").split("\n\n")[0].splitlines()
    except OSError:
        return [platform.processor()]
    names = ("model name", "flags", "Features", "CPU implementer", "CPU part")
    return [line for line in lines if line.startswith(names)]


def _load(payload: bytes) -> Program:
    """Load a program whose signature was right, or that was made just now; raise RuntimeError where that fails."""
    with tempfile.TemporaryDirectory(prefix="softcache-") as folder:  # the loader copies what it needs
        path = Path(folder) / "teacher.pt2"
        path.write_bytes(payload)
        # As torch._inductor.aoti_load_package does, without importing PyTorch's compiler, which takes 2 s.
        loader = torch._C._aoti.AOTIModelPackageLoader(str(path), "model", False, 1, -1)

    def run(views: torch.Tensor) -> list[torch.Tensor]:
        outputs: list[torch.Tensor] = loader.boxed_run([views])
        return outputs

    return run
