"""Objects beside the weights: inert stand-ins for the classes that are known.

torch reads a checkpoint with ``weights_only=True``, which builds tensors and plain containers and refuses every other
class. Training code saves its settings, counters and logs beside the weights all the same: an argparse.Namespace, a
CfgNode, numbers of numpy. For each name in ``STAND_INS`` the reader is given a class of ours that takes whatever it is
made of and keeps none of it. The real class is neither imported nor called, nor is anything of its module, and what was
read in its place is never taken for weights. Every name that is not listed stays refused.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from torch.serialization import safe_globals

_NUMBERS = ("Bool", "Int8", "Int16", "Int32", "Int64", "UInt8", "UInt16", "UInt32", "UInt64", "Float16", "Float32")

STAND_INS = (
    "argparse.Namespace",
    "types.SimpleNamespace",
    *(f"builtins.{name}" for name in ("bool", "int", "float", "str", "list", "dict", "tuple", "object", "type")),
    *(f"builtins.{name}" for name in ("bytes", "frozenset", "slice", "range")),
    "builtins.getattr",  # names a method: of HistoryBuffer, of a scheduler
    *(f"datetime.{name}" for name in ("date", "datetime", "time", "timedelta", "timezone")),
    *(f"pathlib.{name}" for name in ("Path", "PosixPath", "WindowsPath", "PurePath", "PurePosixPath")),
    *(f"pathlib.{name}" for name in ("PureWindowsPath", "_local.Path", "_local.PosixPath", "_local.WindowsPath")),
    *(f"numpy.{core}.multiarray.{name}" for core in ("core", "_core") for name in ("scalar", "_reconstruct")),
    *(f"numpy.{core}.numeric._frombuffer" for core in ("core", "_core")),
    *("numpy.ndarray", "numpy.dtype", "numpy.bool", "numpy.bool_", "numpy.str_"),
    *(f"numpy.{kind}{bits}" for kind in ("int", "uint") for bits in (8, 16, 32, 64)),
    *(f"numpy.float{bits}" for bits in (16, 32, 64)),
    *(f"numpy.dtypes.{name}DType" for name in (*_NUMBERS, "Float64", "Complex64", "Complex128")),
    *(f"numpy.dtypes.{name}DType" for name in ("Str", "Bytes", "Object", "DateTime64", "TimeDelta64")),
    "torch.torch_version.TorchVersion",
    "typing.Any",
    "mmengine.config.config.Config",
    "mmengine.logging.history_buffer.HistoryBuffer",
    "mmcv.utils.config.Config",
    "fvcore.common.history_buffer.HistoryBuffer",
    "ml_collections.config_dict.config_dict.ConfigDict",
    "ml_collections.config_dict.config_dict.FrozenConfigDict",
    "omegaconf.dictconfig.DictConfig",
    "omegaconf.listconfig.ListConfig",
    *(f"omegaconf.base.{name}" for name in ("Metadata", "ContainerMetadata")),
    *(f"omegaconf.nodes.{name}Node" for name in ("Any", "Boolean", "Bytes", "Enum", "Float", "Integer", "Path")),
    *(f"omegaconf.nodes.{name}Node" for name in ("String", "Interpolation", "InterpolationResult")),
)
"""The dotted names of objects that are read as nothing."""

DICT_STAND_INS = (
    "collections.defaultdict",
    "addict.addict.Dict",
    "detectron2.config.config.CfgNode",
    "easydict.EasyDict",
    "fastreid.config.config.CfgNode",
    "fvcore.common.config.CfgNode",
    "lightning.fabric.utilities.data.AttributeDict",
    "lightning_fabric.utilities.data.AttributeDict",
    "lightning.pytorch.utilities.parsing.AttributeDict",
    "mmcv.utils.config.ConfigDict",
    "mmengine.config.config.ConfigDict",
    "munch.Munch",
    "pytorch_lightning.utilities.parsing.AttributeDict",
    "yacs.config.CfgNode",
)
"""Those that are dicts, which the reader then fills as it would fill one."""

LIST_STAND_INS = ("collections.deque",)
"""Those that are filled as a list."""

_MARK = "stand-in for"


class StandIn:
    """What is read in place of an object: takes any arguments and any state, and keeps nothing."""

    dotted = ""

    def __init__(self, *_: object, **__: object) -> None:
        """Takes the arguments of the real class."""

    def __setstate__(self, state: object) -> None:
        """Takes the state of the real object."""


class _DictStandIn:
    """Makes an OrderedDict, since the reader fills no dict of another class, marked by what it stands for."""

    dotted = ""

    def __new__(cls, *_: object, **__: object) -> Any:
        made: OrderedDict[object, object] = OrderedDict()
        vars(made)[_MARK] = cls.dotted
        return made


class _ListStandIn:
    dotted = ""

    def __new__(cls, *_: object, **__: object) -> Any:
        return []


_SAFE_GLOBALS: list[Callable[..., Any] | tuple[Callable[..., Any], str]] = [
    (type(dotted, (base,), {"dotted": dotted}), dotted)
    for base, names in ((StandIn, STAND_INS), (_DictStandIn, DICT_STAND_INS), (_ListStandIn, LIST_STAND_INS))
    for dotted in names
]


def stand_ins() -> AbstractContextManager[None]:
    """While inside, ``torch.load`` with ``weights_only=True`` reads every stand-in."""
    return safe_globals(_SAFE_GLOBALS)


def stand_in_name(value: object) -> str | None:
    """The dotted name of the class that ``value`` was read in place of; None for what is itself."""
    if isinstance(value, StandIn):
        return value.dotted
    return vars(value).get(_MARK) if type(value) is OrderedDict else None
