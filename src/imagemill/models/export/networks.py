"""Build a network of transformers or timm from its configuration and safetensors.

Only classes that are part of the two libraries are built. Nothing is fetched, no pickle is read,
and no code of a model folder is executed.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, cast

import torch

from imagemill.errors import ModelError

if TYPE_CHECKING:
    from imagemill.models.export.child import Request

_TOWERS: Final = {
    "CLIPModel": "CLIPVisionModelWithProjection",
    "SiglipModel": "SiglipVisionModel",
}
"""Networks of images and text, and the part of each that takes images."""
_OUTPUTS: Final = ("logits", "image_embeds", "pooler_output")
"""Outputs of transformers, the best first."""
_TOKENS: Final = "last_hidden_state"
"""The output (n, tokens, features) of a network without a pooler. `wrap` makes its embedding."""
_USED: Final = ("num_classes", "input_size", "fixed_input_size", "first_conv", "classifier")
"""Keys of timm's `pretrained_cfg` that decide how a network is built. Others say where weights are
fetched from.
"""
_TIMES: Final = 4
_MORE_TENSORS: Final = 1_000
_MORE_VALUES: Final = 10**8
"""A network may have this many times the tensors and values of its weights, and so many more.
transformers counts twice, when it builds a network and when it loads the weights.
"""


def load_transformers() -> Any:
    """Import transformers without torchvision, which no network needs, and which does not load
    beside some builds of PyTorch.
    """
    sys.modules.setdefault("torchvision", None)  # type: ignore[arg-type]
    import transformers

    return transformers


def load(request: Request, folder: Path) -> torch.nn.Module:
    """Return a network in evaluation mode, in fp32, with the weights of a folder.

    Raises:
        ModelError: the network is unknown, takes no images, or does not fit the weights.
    """
    with _bounded(request.shards):
        if request.library == "timm":
            return _timm(request, folder)
        return _transformers(request.network, folder)


def _transformers(name: str, folder: Path) -> torch.nn.Module:
    transformers = load_transformers()
    found: Any = getattr(transformers, _TOWERS.get(name, name), None)
    if not isinstance(found, type) or not issubclass(found, transformers.PreTrainedModel):
        raise ModelError(
            f"transformers {transformers.__version__} has no {name}, and code in a repository is"
            " never executed."
        )
    found = cast(Any, found)
    if found.main_input_name != "pixel_values":
        raise ModelError(f"it takes {found.main_input_name}, not images.")
    network, report = found.from_pretrained(
        folder,
        local_files_only=True,
        use_safetensors=True,
        dtype=torch.float32,
        attn_implementation="eager",  # a configuration may name kernels to fetch
        output_loading_info=True,
    )
    missing = sorted(report["missing_keys"])
    if missing and all(key.startswith("pooler.") for key in missing):
        network.pooler = None  # the weights of DINO have none: its embedding is the first token
    elif missing:
        raise ModelError(
            f"its weights lack {len(missing):,} of the network's tensors, {missing[0]} among them."
        )
    return cast(torch.nn.Module, network.eval())


def _timm(request: Request, folder: Path) -> torch.nn.Module:
    import timm
    from safetensors.torch import load_file

    if not timm.is_model(request.network):
        raise ModelError(f"timm {timm.__version__} has no network of that name.")
    config = json.loads((folder / "config.json").read_bytes())
    stated = config.get("pretrained_cfg", config) | {
        key: config[key] for key in ("num_classes",) if key in config
    }
    weights = {
        key.removeprefix("timm_model."): value  # transformers' wrapper of timm adds the prefix
        for shard in request.shards
        for key, value in load_file(shard).items()
    }
    network = timm.create_model(
        request.network,
        pretrained=True,
        pretrained_cfg={key: stated[key] for key in _USED if key in stated}
        | {"state_dict": weights},
        **config.get("model_args", {}),
    )
    return cast(torch.nn.Module, network.float().eval())


def simplify_pooling(network: torch.nn.Module, side: int) -> None:
    """Replace pooling over more than `side` pixels, the larger side of the input, by pooling over
    everything. OpenVINO refuses a window that is larger than what it slides over.
    """
    for module in list(network.modules()):
        for name, child in module.named_children():
            if isinstance(child, torch.nn.AvgPool2d) and child.ceil_mode:
                window = child.kernel_size
                if isinstance(window, int) and window > side:  # transformers' EfficientNet
                    setattr(module, name, torch.nn.AdaptiveAvgPool2d(1))


@contextlib.contextmanager
def constant_positions() -> Iterator[None]:
    """Make constants of position embeddings that are interpolated for the input's size.

    They are the only values with a batch of 1 that networks interpolate: they are traced with more
    images. The exporter has no operator for interpolation with antialiasing.
    """
    functional = torch.nn.functional
    interpolate = functional.interpolate

    def constant(values: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
        found = interpolate(values, *args, **options)
        return torch.from_numpy(found.numpy()) if len(values) == 1 else found

    functional.interpolate = constant
    try:
        yield
    finally:
        functional.interpolate = interpolate


@contextlib.contextmanager
def _bounded(shards: Sequence[Path]) -> Iterator[None]:
    """Raise an error as soon as a network is built that is far larger than its weights."""
    from safetensors import safe_open

    shapes: list[list[int]] = []
    for shard in shards:
        with safe_open(shard, framework="pt") as opened:
            shapes += [opened.get_slice(key).get_shape() for key in opened.keys()]  # noqa: SIM118
    tensors = _TIMES * len(shapes) + _MORE_TENSORS
    values = _TIMES * sum(torch.Size(shape).numel() for shape in shapes) + _MORE_VALUES

    def count(_module: object, _name: str, parameter: torch.nn.Parameter | None) -> None:
        nonlocal tensors, values
        if parameter is not None:
            tensors -= 1
            values -= parameter.numel()
        if tensors < 0 or values < 0:
            raise ModelError("config.json describes a much larger network than the weights are of.")

    hook = torch.nn.modules.module.register_module_parameter_registration_hook(count)
    try:
        yield
    finally:
        hook.remove()


class OneOutput(torch.nn.Module):  # type: ignore[misc]
    """A network with the one output that is exported."""

    def __init__(self, network: torch.nn.Module, output: str) -> None:
        super().__init__()
        self.network = network
        self.output = output

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Return the output for images (n, channels, height, width)."""
        found = self.network(pixel_values)
        if isinstance(found, torch.Tensor):
            return found
        values = found[self.output]
        # transformers' convolutional networks pool to (n, features, 1, 1)
        return values.flatten(1) if values.shape[2:] == (1, 1) else values


def with_one_output(network: torch.nn.Module, images: torch.Tensor) -> OneOutput:
    """Return a network with its scores as the only output, or its embedding if it has no head.

    Raises:
        ModelError: it has no scores (n, classes) and no embedding (n, features).
    """
    found = network(images)
    if isinstance(found, torch.Tensor):
        output = "pooler_output" if network.num_classes == 0 else "logits"
    elif getattr(network, "pooler", network) is None:
        output = _TOKENS
    else:
        known = [name for name in _OUTPUTS if found.get(name) is not None]
        if not known:
            raise ModelError(
                f"it returns {', '.join(found)}, but no {', '.join(_OUTPUTS[:-1])} or"
                f" {_OUTPUTS[-1]}."
            )
        output = known[0]
    one = OneOutput(network, output)
    shape = tuple(one(images).shape)
    if len(shape) != (3 if output == _TOKENS else 2):
        raise ModelError(f"its {output} have the shape {shape} for a batch of {len(images)}.")
    one.eval()  # the exporter gives every part the mode of the whole
    return one
