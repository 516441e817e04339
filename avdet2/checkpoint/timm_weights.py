# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
Published weights for networks of timm, whoever published them.
"""

import logging
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from avdet2.checkpoint.convert import preferred, read_resnet
from avdet2.checkpoint.pixel_settings import WeightSettings
from avdet2.checkpoint.reading import read_checkpoint
from avdet2.checkpoint.resnet_names import LAYOUTS
from avdet2.checkpoint.sources import FORMAT, PIXEL_MEAN, PIXEL_STD
from avdet2.modeling.timm_backbone import TimmBackbone, create_network

logger = logging.getLogger(__name__)

# The value of WEIGHTS that stands for timm's own.
OF_TIMM = "timm"
# Names in torchvision's layout, which timm's ResNets share.
TORCHVISION = LAYOUTS[0]


def timm_settings(name: str) -> WeightSettings | None:
    """
    The pixels that timm's weights of a name ("vit_small_patch16_224.dino") were trained with; None
    where the name does not say of which weights.
    """
    from timm.models import get_pretrained_cfg

    config = get_pretrained_cfg(name) if "." in name else None
    if config is None:
        return None
    values = {
        FORMAT: "RGB",
        PIXEL_MEAN: [255 * x for x in config.mean],
        PIXEL_STD: [255 * x for x in config.std],
    }
    return WeightSettings(values, None)


def load_timm_weights(encoder: TimmBackbone, weights: str, key: str) -> None:
    """
    Start a network of timm from weights.

    Args:
        encoder: as it was built.
        weights: path of a file that :func:`read_checkpoint` reads, nothing of which is executed,
            with a network of this kind at any place and behind any prefix; or "timm", for timm's
            own.
        key: of the config, for messages.

    Raises:
        ValueError: the weights cannot be had, or are another network's, or are not finite.
    """
    name = encoder.create["model_name"]
    if weights == OF_TIMM:
        state = _downloaded(encoder.create, key)
    else:
        state = _find(read_checkpoint(weights), encoder, f"{key} {weights}")
    wanted = encoder.net.state_dict()
    state = _for_channels(state, encoder)
    counters = "num_batches_tracked"
    missing = [x for x in wanted if x not in state and not x.endswith(counters)]
    wrong = [x for x in wanted if x in state and state[x].shape != wanted[x].shape]
    # Of a deeper network, for example.
    own = {x.split(".")[0] for x in wanted}
    others = [x for x in state if x not in encoder.all_names and x.split(".")[0] in own]
    others = [x for x in others if not x.endswith(counters)]
    told = {"missing": missing, "of another shape": wrong, "left over": others}
    parts = [f"{len(x)} {what} ({', '.join(x[:3])})" for what, x in told.items() if x]
    if parts:
        raise ValueError(
            f"{key} {weights} is another network than timm's {name}, which has {len(wanted)} "
            f"tensors up to {encoder._out_features[-1]}: {'; '.join(parts)}. Set the NAME of the "
            "network that the file holds, and its OPTIONS where it is a variant of it"
        )
    used = {x: value for x, value in state.items() if x in wanted}
    if not all(value.isfinite().all() for value in used.values() if value.is_floating_point()):
        raise ValueError(f"{key} {weights} holds NaN or infinite numbers")
    encoder.net.load_state_dict(used, strict=False)
    logger.info(f"{key}: {name} starts from {weights} ({len(used)} tensors)")


def _downloaded(create: Mapping[str, Any], key: str) -> dict[str, torch.Tensor]:
    name = create["model_name"]
    if "." not in name:
        from timm import list_pretrained

        raise ValueError(
            f"{key} timm: the NAME {name!r} does not say which of timm's weights, most of which "
            f"are of supervised trainings: it has {list_pretrained(f'{name}.*') or 'none'}"
        )
    try:
        return create_network(pretrained=True, **create).state_dict()
    # Whatever a network, a hub and their libraries may raise.
    except Exception as error:
        raise ValueError(
            f"{key} timm: timm's weights of {name} cannot be had ({type(error).__name__}: "
            f"{str(error).strip().partition(chr(10))[0]}). Where there is no network, give the "
            "path of a file with them (model.safetensors from the model's page), or '' to start at "
            "random"
        ) from error


def _find(content: Mapping[str, Any], encoder: TimmBackbone, what: str) -> dict[str, torch.Tensor]:
    """
    The state dict of a network in a checkpoint, by timm's names.
    """
    wanted = encoder.net.state_dict()
    marker = next(x for x, value in wanted.items() if value.ndim == 4)
    found = dict(_search(content, marker, ""))
    whole = {
        place: state for place, state in found.items() if len(wanted.keys() - state.keys()) == 0
    }
    # Without counters of batches, a part of it, or by other names.
    whole = whole or {place: x for place, x in found.items() if len(wanted.keys() & x.keys()) > 1}
    if not whole and all(name in encoder.all_names for name in TORCHVISION.markers):
        tensors = read_resnet(what.split(" ", 1)[1], "torchvision").tensors
        names = TORCHVISION.translate(encoder.all_names)
        return {x: torch.from_numpy(tensors[new]) for x, new in names.items() if new in tensors}
    places = preferred(whole)
    if len(places) != 1:
        raise ValueError(
            f"{what} holds {len(places)} networks with tensors of timm's "
            f"{encoder.create['model_name']} (such as {marker}), behind {places[:3]}. The names "
            "must be timm's, with or without something before them"
        )
    logger.info(f"{what}: the network behind {places[0]!r} is used")
    return whole[places[0]]


def _search(
    content: Mapping[str, Any], marker: str, place: str
) -> Iterator[tuple[str, dict[str, torch.Tensor]]]:
    for name, value in content.items():
        if isinstance(value, Mapping):
            yield from _search(value, marker, f"{place}{name}/")
        elif isinstance(name, str) and name.endswith(marker):
            prefix = name.removesuffix(marker)
            if prefix and not prefix.endswith("."):
                continue
            tensors = {
                key.removeprefix(prefix): torch.as_tensor(x)
                for key, x in content.items()
                if isinstance(key, str) and key.startswith(prefix) and hasattr(x, "shape")
            }
            yield place + prefix, tensors


def _for_channels(state: dict[str, torch.Tensor], encoder: TimmBackbone) -> dict[str, torch.Tensor]:
    """
    The first convolution's weights for the encoder's number of channels, as timm adapts them: for
    one channel the sum over those of the file.
    """
    from timm.models import adapt_input_conv

    channels = encoder.create["in_chans"]
    first = f"{encoder.net.pretrained_cfg.get('first_conv')}.weight"
    weight = state.get(first)
    if weight is None or weight.ndim != 4 or weight.shape[1] in (1, channels):
        return state
    return {**state, first: adapt_input_conv(channels, weight)}
