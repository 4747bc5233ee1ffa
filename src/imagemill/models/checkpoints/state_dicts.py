"""Which of a checkpoint's state dicts is used, and what its parameters are called.

Training programs nest the state dict (`{"model": …}`), keep several of them (`state_dict_ema`
beside `state_dict`), and put the names of their wrappers before the parameters' own (`module.`,
`model._orig_mod.`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Final, TypeVar

from imagemill.models.checkpoints.pickled import Refused, shown
from imagemill.system.messages import Notify

T = TypeVar("T")

_WRAPPER: Final = re.compile(
    r"(?:(?<=\.)|^)(?:module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\."
)
"""DataParallel, torch.compile, FSDP and activation checkpointing put these before the names of what
they wrap, which may be any module.
"""
_CONTAINER: Final = re.compile(
    r"^(?:(?:model|net|network|backbone|online_model|(?P<ema>ema|ema_model|model_ema|ema_net|net_ema))\.)+"
)
"""What Lightning modules and others call the network that they hold."""
_EMA: Final = re.compile(r"(?:^|[_/.-])ema(?:$|[_/.-])", re.IGNORECASE)
_TRAINING: Final = re.compile(r"(?:criterion|loss|loss_fn)\.|(?:n_averaged|initted|step)$")
"""What training alone needs: weights of classes in the loss, and counters of averages."""
_PREFERRED: Final = (
    "state_dict",
    "model_state_dict",
    "model",
    "net",
    "network",
    "module",
    "weights",
    "params",
)
"""Of several state dicts the first of these is used."""
_LISTED: Final = 5
_NO_PARAMETER: Final = ".num_batches_tracked"


def choose(found: Mapping[str, Mapping[str, T]], notify: Notify) -> dict[str, T]:
    """Choose a state dict and drop the wrappers from its names.

    An exponential moving average (EMA) of the weights is preferred to the plain weights, as in
    timm, because publishers evaluate with it; but only if it has every parameter that the plain
    weights have.

    Args:
        found: path in the checkpoint → name → tensor; the path of the outermost mapping is empty.
        notify: takes one line if there are several: which is used.

    Raises:
        Refused: none can be preferred, or two names mean the same parameter.
    """
    plain: dict[str, dict[str, T]] = {}
    averaged: dict[str, dict[str, T]] = {}
    for path, tensors in found.items():
        for name, tensor in tensors.items():
            inner = _WRAPPER.sub("", name)
            container = _CONTAINER.match(inner)
            short = inner[container.end() :] if container else inner
            if _TRAINING.match(short):
                continue
            is_ema = _EMA.search(path) is not None
            place = path
            if container and container["ema"]:
                is_ema, place = True, f"{path}/{container[0]}*".removeprefix("/")
            group = (averaged if is_ema else plain).setdefault(place, {})
            if short in group:
                raise Refused(
                    f"two of its tensors are called {shown(short)}, one of them {shown(name)}: it"
                    " holds several models"
                )
            group[short] = tensor
    used = _preferred(plain) if plain else ""
    for path, tensors in averaged.items():
        missing = [
            name
            for name in plain.get(used, {})
            if name not in tensors and not name.endswith(_NO_PARAMETER)
        ]
        if not missing:
            if plain:
                notify(
                    f"the EMA weights are used ({_place(path)}), not the plain ones"
                    f" ({_place(used)})"
                )
            return _without_prefix(tensors)
        notify(f"the EMA weights ({_place(path)}) are not used: they have no {shown(missing[0])}")
    if others := [path for path in plain if path != used]:
        notify(f"the weights under {_place(used)} are used, not those under {_places(others)}")
    return _without_prefix(plain.get(used, {}))


def _without_prefix(tensors: dict[str, T]) -> dict[str, T]:
    """Drop what all names begin with, such as `resnet.` if a user's module holds the network under
    that name. A number is a place in a sequence, which means something.
    """
    while len(first := {name.partition(".")[0] for name in tensors}) == 1:
        prefix = f"{first.pop()}."
        short = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
        if short.keys() == tensors.keys() or prefix[0].isdigit():
            break
        if any(name[:1] in "0123456789" for name in short):
            break
        tensors = short
    return tensors


def _preferred(groups: Mapping[str, object]) -> str:
    """Return the path of the state dict to use. Raises: Refused."""
    if len(groups) == 1:
        return next(iter(groups))
    for key in _PREFERRED:
        for path in groups:
            if key in path.split("/"):
                return path
    raise Refused(
        f"it has several state dicts ({_places(list(groups))}): save the one that you want in a"
        " file of its own"
    )


def _places(paths: list[str]) -> str:
    more = f" and {len(paths) - _LISTED} more" if len(paths) > _LISTED else ""
    return ", ".join(map(_place, paths[:_LISTED])) + more


def _place(path: str) -> str:
    return shown(path) if path else "the top level"
