"""What a pickled checkpoint may name: tensors' constructors and inert configuration classes.

The restricted unpickler is torch's own (``weights_only``). It is given empty stand-ins for the
classes of omegaconf and Lightning configurations, so that neither is imported and nothing of such
an object comes into being.
"""

import pickletools
from typing import Any, Self

_STORAGES = ("Float", "Double", "Half", "BFloat16", "Long", "Int", "Short", "Char", "Byte", "Bool")
_DTYPES = ("float32", "float64", "float16", "bfloat16", "int64", "int32", "uint8", "bool")
# Constructors of tensors and plain containers.
_PLAIN = frozenset(
    (
        "collections.OrderedDict",
        "torch.Size",
        "torch._utils._rebuild_tensor_v2",
        "torch._utils._rebuild_parameter",
        "_codecs.encode",
        "builtins.set",
        *(f"torch.{storage}Storage" for storage in _STORAGES),
        *(f"torch.{dtype}" for dtype in _DTYPES),
    )
)


class _InertObject:
    """Stands for an object of a pickled configuration; keeps nothing that it is given."""

    def __new__(cls, *args: object, **kwargs: object) -> Self:
        """Take any arguments and drop them."""
        return super().__new__(cls)

    def __init__(self, *args: object, **kwargs: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        """Drop the state."""


class _InertMapping:
    """Stands for a dictionary of another class: calling it gives an empty plain one."""

    def __new__(cls, *args: object, **kwargs: object) -> Any:  # noqa: ANN401 - a dict instead
        return {}


_INERT_OBJECTS = (
    "omegaconf.dictconfig.DictConfig",
    "omegaconf.listconfig.ListConfig",
    "omegaconf.base.ContainerMetadata",
    "omegaconf.base.Metadata",
    "omegaconf.base.UnionNode",
    "omegaconf.nodes.AnyNode",
    "omegaconf.nodes.StringNode",
    "omegaconf.nodes.IntegerNode",
    "omegaconf.nodes.FloatNode",
    "omegaconf.nodes.BooleanNode",
    "omegaconf.nodes.BytesNode",
    "omegaconf.nodes.PathNode",
    "omegaconf.nodes.EnumNode",
    "omegaconf.nodes.InterpolationResultNode",
    *(f"builtins.{name}" for name in ("dict", "list", "tuple", "int", "float", "str", "bool")),
    "typing.Any",
    *(f"pathlib.{name}" for name in ("Path", "PosixPath", "WindowsPath")),
    *("numpy.dtype", "numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar"),
)
_INERT_MAPPINGS = (
    "collections.defaultdict",
    "lightning.fabric.utilities.data.AttributeDict",
    "lightning_fabric.utilities.data.AttributeDict",
    "lightning.pytorch.utilities.parsing.AttributeDict",
    "pytorch_lightning.utilities.parsing.AttributeDict",
)
# Pickles of torch's protocol spell some names as Python 2 did; unpicklers translate them.
_PYTHON_2_NAMES = {"builtins.long": "builtins.int", "builtins.unicode": "builtins.str"}


def stand_ins() -> list[Any]:
    """Pairs of a stand-in and the name it answers to, for ``torch.serialization.safe_globals``."""
    objects = [(_InertObject, name) for name in _INERT_OBJECTS]
    return objects + [(_InertMapping, name) for name in _INERT_MAPPINGS]


def refused_names(pickled: bytes) -> list[str]:
    """Everything that a pickle would import and may not, found without running it; sorted.

    Narrower than torch's list: that has constructors of arrays of any size, which need no data.

    Raises:
        ValueError: The bytes are no pickle.
    """
    names = set()
    for operation, argument, _ in pickletools.genops(pickled):
        if operation.name == "GLOBAL":
            name = str(argument).replace(" ", ".", 1).replace("__builtin__.", "builtins.", 1)
            names.add(_PYTHON_2_NAMES.get(name, name))
        elif operation.name in ("STACK_GLOBAL", "INST", "EXT1", "EXT2", "EXT4"):
            names.add(f"an import by {operation.name}")
    return sorted(names - _PLAIN.union(_INERT_OBJECTS, _INERT_MAPPINGS))
