"""Skips imports that no stage needs: a third of the time that a stage takes to start.

With any model transformers imports PyTorch's compiler (`torch._dynamo`, with triton), DTensor and scipy, and it reads
lists of all installed files, for features that no stage has. The compiler is imported when something is asked of it
that needs it; until then a stand-in has the rest. Only without NVIDIA's device file: on a GPU the compiler is used.
"""

import atexit
import gc
import os
import sys
from collections.abc import Callable
from functools import partial, wraps
from importlib import import_module, metadata
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from importlib.util import spec_from_file_location
from pathlib import Path
from types import ModuleType, SimpleNamespace

COMPILER = "torch._dynamo"
TENSOR = "torch.distributed.tensor"
PART = f"{COMPILER}._trace_wrapped_higher_order_op"
DRIVER = Path("/dev/nvidiactl")
OWN = ("accelerate", "mistral_common", "torch")  # packages whose distributions have their names


def import_quickly() -> None:
    """The above, no sklearn, and, in the whole process, less search for garbage, which by default takes a fifth of a
    start, and as long again at the end."""
    gc.set_threshold(50_000, 20, 20)
    sys.modules.setdefault("sklearn", None)
    if not any(isinstance(finder, Finder) for finder in sys.meta_path) and not DRIVER.exists():
        sys.meta_path.insert(0, Finder())
        atexit.register(_end_quickly)
        if COMPILER not in sys.modules:
            compiler = Compiler()
            StandIn(PART, TransformGetItemToIndex=lambda: compiler.real(PART).TransformGetItemToIndex())


def _end_quickly() -> None:
    """Python's end does not search for garbage, but where triton, which would complain, has been imported."""
    if "triton" not in sys.modules:
        gc.freeze()


class StandIn(ModuleType):
    """A module as long as it has not been imported: it has `plain`, and is replaced when something else is asked of
    it."""

    __path__ = ()  # a package's: for its modules Finder is asked

    def __init__(self, name: str, **plain: object):
        super().__init__(name)
        self.__spec__ = ModuleSpec(name, None)
        self.plain = plain
        sys.modules[name] = self

    @property
    def stands(self) -> bool:
        """Whether the module has not been imported."""
        return sys.modules.get(self.__name__) is self

    def __getattr__(self, name: str):
        if name.startswith("__") and name != "__version__":  # of those who look through all modules
            raise AttributeError(name)
        return self.plain[name] if name in self.plain and self.stands else getattr(self.real(), name)

    def real(self, part: str = "") -> ModuleType:
        """The module, or a part of it, imported in place of this."""
        if self.stands:
            sys.modules.pop(self.__name__, None)
        return import_module(part or self.__name__)


class Never(type):
    """DTensor, for those who ask whether something is one: nothing is until it has been imported."""

    def __instancecheck__(cls, thing: object) -> bool:
        module = sys.modules[TENSOR]
        return not isinstance(module, StandIn) and isinstance(thing, module.DTensor)


class Compiler(StandIn):
    """torch._dynamo: what it would do to functions it does `later`, when it has been imported."""

    def __init__(self):
        nothing = {"graph_break": lambda msg="": None, "eval_frame": SimpleNamespace(OptimizedModule=())}
        marks = {name: partial(self._mark, name) for name in ("allow_in_graph", "assume_constant_result")}
        super().__init__(COMPILER, disable=self._disable, **nothing, **marks)
        self.later: list[Callable[[ModuleType], object]] = []

    def real(self, part: str = "") -> ModuleType:
        """As any stand-in's."""
        if self.stands:
            sys.modules.pop(PART, None)
            compiler = super().real()
            for do in self.later:
                do(compiler)
        return super().real(part)

    def _mark(self, mark: str, function: Callable) -> Callable:
        self.later.append(lambda compiler: getattr(compiler, mark)(function))
        return function

    def _disable(self, function: Callable | None = None, recursive: bool = True, **how) -> Callable:
        if function is None:
            return partial(self._disable, recursive=recursive, **how)
        current = function

        @wraps(function)
        def either(*args, **kwargs):
            return current(*args, **kwargs)

        def disable(compiler: ModuleType) -> None:
            nonlocal current
            current = compiler.disable(function, recursive, **how)

        self.later.append(disable)
        return either


class Finder(MetaPathFinder):
    """Finds the modules of packages that have stand-ins, which they are parts of, and those that are changed."""

    def find_spec(self, name: str, path=None, target=None) -> ModuleSpec | None:
        """As any finder's; None: the next one's."""
        if loader := LOADERS.get(name):
            origin = PathFinder.find_spec(name, path).origin
            return spec_from_file_location(name, origin, loader=loader(name, origin))
        package = sys.modules.get(name.rpartition(".")[0])
        if not isinstance(package, StandIn):
            return None
        path = package.real().__path__
        if module := sys.modules.pop(name, None):  # the import in progress would execute it again
            return ModuleSpec(name, Loaded(module))
        return PathFinder.find_spec(name, path)


class Loaded(Loader):
    """Gives a module that has been loaded."""

    def __init__(self, module: ModuleType):
        self.module, self.spec = module, module.__spec__

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        """The module."""
        return self.module

    def exec_module(self, module: ModuleType) -> None:
        """It has been."""
        vars(module)["__spec__"] = self.spec


class Distributed(SourceFileLoader):
    """torch.distributed has DTensor's stand-in: peft relies on transformers having imported it."""

    def exec_module(self, module: ModuleType) -> None:
        """As any loader's."""
        super().exec_module(module)
        if TENSOR not in sys.modules:
            module.tensor = StandIn(TENSOR, DTensor=Never("DTensor", (), {}))


class Options(SourceFileLoader):
    """transformers finds no scipy, which is for losses of object detection, and, where a process works alone, no
    DTensor."""

    def exec_module(self, module: ModuleType) -> None:
        """As any loader's."""
        find_all, metadata.packages_distributions = metadata.packages_distributions, Packages
        try:
            super().exec_module(module)
        finally:
            metadata.packages_distributions = find_all
        fetch = module.fetch__all__  # of 3000 files; it looks at each line, and takes the last that defines __all__
        module.fetch__all__ = lambda text: fetch(text[max(0, text.rfind("\n__all__")) :])
        module.is_scipy_available = _no
        if "WORLD_SIZE" not in os.environ and isinstance(sys.modules.get(TENSOR), StandIn):
            module.is_torch_distributed_available = _no


class Packages(dict):
    """Package -> its distributions; the files of all are read for others than OWN."""

    find_all = staticmethod(metadata.packages_distributions)

    def get(self, name: str, default: list[str] | None = None) -> list[str] | None:
        """As a dict's."""
        return [name] if name in OWN else self.find_all().get(name, default)


def _no() -> bool:
    return False


class Kinds(SourceFileLoader):
    """accelerate asks whether a model is one of DeepSpeed's or FSDP's only where these have been imported."""

    def exec_module(self, module: ModuleType) -> None:
        """As any loader's."""
        super().exec_module(module)
        module.is_deepspeed_available = lambda: "deepspeed" in sys.modules
        module.is_torch_distributed_available = lambda: "torch.distributed.fsdp" in sys.modules


LOADERS = {
    "torch.distributed": Distributed,
    "transformers.utils.import_utils": Options,
    "accelerate.utils.other": Kinds,
}
