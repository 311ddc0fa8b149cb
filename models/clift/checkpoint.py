"""Exchange of weights with the released CLiFT checkpoints, and safe reading of such files.

A released checkpoint is a Lightning file: a zip archive with a pickle that holds, beside the
weights, optimiser states and a configuration pickled as omegaconf objects. Here nothing but
tensors and plain values comes into being: a pickle may name tensors' own constructors and the
classes of such a configuration, which are replaced by empty stand-ins; any other name is refused.
Optimiser states, loops and callbacks are never returned.
"""

from collections import defaultdict
from collections.abc import Mapping
from math import isqrt
from pathlib import Path
from typing import NamedTuple

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from models.clift.clift import Clift, CliftShape
from models.layers.weights_archive import check_state, load_archive

# Prefixes of the network's keys in released checkpoints, in ours, and in a bare state dict.
_PREFIXES = ("transformer.", "network.", "")
_LOSS_PREFIX = "perceptual_loss."
_CONDENSER_PREFIX = "squeezer."
# Parts that a network may have beyond its file; they are the identity or start afresh.
_QK_NORMS = (".q_norm.weight", ".k_norm.weight")


class CliftImport(NamedTuple):
    """What became of the keys of a file.

    Attributes:
        missing: Keys of the network that the file lacks; they keep their initialisation.
        ignored: Reason -> keys of the file that were not used.
    """

    missing: tuple[str, ...]
    ignored: Mapping[str, tuple[str, ...]]

    def describe(self) -> str:
        """One line for a log; empty if every key found its place."""
        parts = [f"{len(keys)} keys ignored ({reason})" for reason, keys in self.ignored.items()]
        if self.missing:
            names = sorted({_part_of(key) for key in self.missing})
            parts.append(f"{len(self.missing)} keys keep their start: {', '.join(names)}")
        return "; ".join(parts)


def read_checkpoint(path: Path) -> dict[str, Tensor]:
    """Read the state dict of a CLiFT checkpoint: released, ours, or plain weights.

    Args:
        path: A Lightning checkpoint or a torch state dict (zip archive), or ``.safetensors``.

    Returns:
        Tensors by the file's own keys, mapped from disk where the format allows it.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is damaged, or holds more than tensors, plain values and inert
            configuration objects; the message names what was refused.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: no such file; expected a CLiFT checkpoint, for example second_stage.ckpt"
        )
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except SafetensorError as error:
            raise ValueError(f"{path}: incomplete or damaged ({error})") from None
    content = load_archive(path)
    state = content.get("state_dict", content) if isinstance(content, dict) else None
    return check_state(path, state, "a checkpoint of CLiFT")


def load_clift(network: Clift, state: Mapping[str, Tensor]) -> CliftImport:
    """Copy a state dict into a network.

    Weights of stage 1 may go into a network of stage 2, whose condenser then keeps its
    initialisation, and weights without QK-norm and ``input_norm`` into one with them (the order in
    which the released models were trained). The condenser of a file is left out where the network
    has none.

    Args:
        network: Network of the same width and depth.
        state: Tensors as ``read_checkpoint`` returns them.

    Raises:
        ValueError: The state dict is of another method, or keys or shapes do not fit.
    """
    weights, ignored = official_weights(state)
    expected = network.state_dict()
    if not any(key.startswith(_CONDENSER_PREFIX) for key in expected):
        dropped = tuple(key for key in weights if key.startswith(_CONDENSER_PREFIX))
        if dropped:
            ignored["condenser, which this network has not"] = dropped
            weights = {key: weights[key] for key in weights if key not in dropped}
    missing = tuple(key for key in expected if key not in weights)
    wrong = [key for key in missing if not _may_miss(key, weights)]
    wrong += [key for key in weights if key not in expected]
    wrong += [k for k in weights if k in expected and weights[k].shape != expected[k].shape]
    if wrong:
        raise ValueError(_describe_misfit(wrong, weights, expected))
    network.load_state_dict(weights, strict=False)
    return CliftImport(missing, ignored)


def export_clift(network: nn.Module) -> dict[str, Tensor]:
    """State dict of a network under the released keys (prefix ``transformer.``), on the CPU."""
    return {f"transformer.{k}": v.detach().cpu().clone() for k, v in network.state_dict().items()}


def official_weights(
    state: Mapping[str, Tensor],
) -> tuple[dict[str, Tensor], dict[str, tuple[str, ...]]]:
    """Split a state dict into the network's weights by official key and ignored keys by reason.

    Raises:
        ValueError: The state dict holds no CLiFT network.
    """
    found = [prefix for prefix in _PREFIXES if f"{prefix}linear_input.weight" in state]
    if not found:
        raise ValueError(
            f"no CLiFT weights: none of the {len(state)} keys is [transformer.|network.]"
            f"linear_input.weight; the first are {', '.join(list(state)[:3]) or 'none'}"
        )
    weights: dict[str, Tensor] = {}
    ignored: dict[str, list[str]] = defaultdict(list)
    for key, value in state.items():
        if key.startswith(_LOSS_PREFIX):
            ignored["network of the perceptual loss"].append(key)
        elif key.startswith(found[0]):
            weights[key.removeprefix(found[0])] = value
        else:
            ignored["no part of the network"].append(key)
    return weights, {reason: tuple(keys) for reason, keys in ignored.items()}


def has_condenser(state: Mapping[str, Tensor]) -> bool:
    """Whether a state dict is of stage 2, that is, holds a condenser."""
    return any(key.startswith(_CONDENSER_PREFIX) for key in official_weights(state)[0])


def shape_of(
    state: Mapping[str, Tensor], heads: int = 8, frequencies: tuple[float, ...] = ()
) -> CliftShape:
    """Shape of the network in a state dict, dropout as released.

    Args:
        state: Tensors as ``read_checkpoint`` returns them.
        heads: Attention heads, used where the weights do not show them (no QK-norm).
        frequencies: Ray frequencies; the weights show only how many there are.

    Raises:
        ValueError: No CLiFT weights, or the given numbers do not fit them.
    """
    weights, _ = official_weights(state)
    try:
        width, inputs = weights["linear_input.weight"].shape[:2]
        patch_size = isqrt(len(weights["patch_to_image.0.weight"]) // 3)
        extra = (inputs - 9 * patch_size**2) // 12  # sine and cosine of six ray coordinates
        feed_forward = len(weights["encoder.layers.0.linear1.weight"])
        norm = weights.get("encoder.layers.0.self_attn.q_norm.weight")
    except (KeyError, ValueError) as error:
        raise ValueError(f"no whole CLiFT network in the state dict ({error})") from None
    heads = heads if norm is None else width // len(norm)
    if width % heads or extra != len(frequencies):
        raise ValueError(
            f"heads={heads}, {len(frequencies)} frequencies: the weights are {width} wide and "
            f"take {extra} frequencies"
        )
    return CliftShape(
        width=width,
        heads=heads,
        encoder_layers=_count_layers(weights, "encoder.layers."),
        decoder_layers=_count_layers(weights, "decoder.layers."),
        feed_forward=feed_forward,
        patch_size=patch_size,
        qk_norm=norm is not None,
        input_norm="input_norm.weight" in weights,
        condenser_layers=max(1, _count_layers(weights, "squeezer.cross_attn.layers.")),
        frequencies=frequencies,
    )


def _count_layers(weights: Mapping[str, Tensor], prefix: str) -> int:
    return len({key[len(prefix) :].split(".")[0] for key in weights if key.startswith(prefix)})


def _may_miss(key: str, weights: Mapping[str, Tensor]) -> bool:
    """Whether a network may keep its own ``key`` because the file has none of that part."""
    if key.startswith(_CONDENSER_PREFIX):
        return not any(other.startswith(_CONDENSER_PREFIX) for other in weights)
    if key.startswith("input_norm."):
        return not any(other.startswith("input_norm.") for other in weights)
    return key.endswith(_QK_NORMS) and not any(other.endswith(_QK_NORMS) for other in weights)


def _part_of(key: str) -> str:
    if key.endswith(_QK_NORMS):
        return "QK-norm"
    part = key.split(".")[0]
    return "condenser" if part == "squeezer" else part


def _describe_misfit(
    wrong: list[str], weights: Mapping[str, Tensor], expected: Mapping[str, Tensor]
) -> str:
    key = wrong[0]
    ours, theirs = (
        f"{tuple(side[key].shape)}" if key in side else "nothing" for side in (expected, weights)
    )
    try:
        shape = shape_of(weights)
        sizes = ["width", "encoder_layers", "decoder_layers", "feed_forward", "patch_size"]
        options = ["qk_norm", "input_norm", "condenser_layers"]
        remedy = ", ".join(f"{name}={getattr(shape, name)}" for name in sizes + options)
    except ValueError as error:
        remedy = str(error)
    return (
        f"CLiFT weights do not fit the network: {len(wrong)} keys differ, first {key}: the file "
        f"has {theirs}, the network {ours}; set the model's shape to the file's ({remedy})"
    )
