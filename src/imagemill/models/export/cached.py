"""Find the exported ONNX file of a model folder, or have a child process export it.

    config.json, *.safetensors ─► staging folder: links to these alone ─► child: PyTorch ─► ONNX,
    compared with PyTorch ─► MODELS/.exported/NAME-HASH/model.onnx

The hash covers the configuration, the weights, the size of the input and the versions of the
exporting libraries.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import time
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any, Final

from imagemill.errors import ImagemillError, Interrupted, ModelError, UsageError, printable
from imagemill.models import bundle as bundles
from imagemill.models.export.child import Exported, Request
from imagemill.models.folders import json_file, timm_config
from imagemill.models.folders.json_file import CONFIG, INDEX, WEIGHTS, Document
from imagemill.system import files
from imagemill.system.messages import Notify
from imagemill.system.processes import Child, ChildError

FOLDER: Final = ".exported"
"""Subfolder of the models folder. No model's name begins with a dot."""
_EXPORTER: Final = 1
"""Version of the exporting: files of another version are exported again."""
_PLAIN_NAME: Final = re.compile(r"[\w-][\w.-]*\.safetensors", re.ASCII)
_MAX_SIDE: Final = 4_096
"""Pixels. The memory that attention takes grows with the fourth power of the side."""
_MAX_S: Final = 3_600.0
"""How long an export may take. ViT-L takes about a minute."""
_OFFLINE: Final = {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "DO_NOT_TRACK": "1",
    "HF_TOKEN": "",
    "CUDA_VISIBLE_DEVICES": "",  # one image is computed: starting CUDA would take longer
}
"""Variables of the child. Its `HF_HOME` is the staging folder, so that it finds nothing cached."""


def onnx_for(
    folder: Path, models_dir: Path, notify: Notify, size: tuple[int, int] | None = None
) -> Path:
    """Return the ONNX file of a model folder that has none, and export it if that was not done yet.

    The file has one input `pixel_values`, float32 (n, channels, height, width), n open, and one
    output: `logits` (n, classes), or for a network without a head `image_embeds` (n, features),
    `pooler_output` (n, features) or `last_hidden_state` (n, tokens, features).

    Args:
        folder: has `config.json` of transformers or timm, and safetensors.
        models_dir: the exported file is kept below it.
        notify: is called with lines for the user.
        size: height and width of the input in pixels; None: as `config.json` says.

    Raises:
        UsageError: PyTorch, transformers or timm is not installed. ModelError: the folder lacks
        weights as safetensors, its network is unknown or does not fit the weights, or the exported
        network answers differently from PyTorch.
    """
    document = json_file.read(folder / CONFIG)
    network, library = _network(document)
    shards, versions = weights_of(folder), _versions(folder, network, library)
    request = Request(network, library, _shape(document, size), shards)
    config = document.values
    key = _key(request, config, versions)
    home = models_dir / FOLDER / f"{network}-{key[:12]}"
    file = home / bundles.MODEL
    if not file.is_file():
        notify(
            f"exporting {network} to ONNX, once (PyTorch {versions['torch']}, {library}"
            f" {versions[library]})"
        )
        started = time.monotonic()
        exported = _export(request, config, home)
        notify(
            f"exported in {time.monotonic() - started:.0f} s; its answers differ from PyTorch's by"
            f" at most {exported.difference:.1g} of the largest"
        )
    return file


def _network(document: Document) -> tuple[str, str]:
    """Return the name of a network and the library that has it. Raises: ModelError."""
    config = document.values
    if "quantization_config" in config:
        raise document.error(
            "quantization_config: the weights are quantised, and imagemill exports networks in fp32"
            " only. Use the unquantised model"
        )
    if timm_config.is_timm(document):
        network, key, library = config.get("architecture"), "architecture", "timm"
    else:
        named = config.get("architectures")
        network = named[0] if isinstance(named, list) and len(named) == 1 else None
        key, library = "architectures", "transformers"
    if not isinstance(network, str) or not network.isidentifier() or len(network) > 100:
        raise document.error(f"{key} does not name one network of {library}")
    return network, library


def weights_of(folder: Path) -> tuple[Path, ...]:
    """Return the files that hold a folder's weights. Raises: ModelError."""
    if (folder / WEIGHTS).is_file():
        return (folder / WEIGHTS,)
    if not (folder / INDEX).is_file():
        pickles = [printable(file.name) for file in sorted(folder.glob("*.bin"))]
        instead = f" {pickles[0]} is not read here, since a pickle may run code." if pickles else ""
        raise ModelError(
            f"{printable(folder)} has neither model.onnx nor {WEIGHTS}, which imagemill exports"
            f" from.{instead} Save the model again as safetensors: model.save_pretrained(FOLDER)."
        )
    document = json_file.read(folder / INDEX)
    places = document.values.get("weight_map")
    if not isinstance(places, dict) or not places:
        raise document.error("weight_map names no files")
    names: set[str] = set()
    for name in places.values():
        if not isinstance(name, str) or not _PLAIN_NAME.fullmatch(name):
            raise document.error(f"weight_map: {str(name)!r} is not the name of a safetensors file")
        if not (folder / name).is_file():
            raise document.error(f"weight_map: there is no {name}. Copy it there")
        names.add(name)
    return tuple(folder / name for name in sorted(names))


def _versions(folder: Path, network: str, library: str) -> dict[str, str]:
    """Return the versions of the libraries that export. Raises: UsageError."""
    try:
        return {name: metadata.version(name) for name in ("torch", library)}
    except metadata.PackageNotFoundError as error:
        raise UsageError(
            f"{printable(folder)} has no model.onnx, and imagemill does not build {network} itself:"
            f" exporting it takes PyTorch and {library}, and {error.name} is not installed. Type:"
            " pip install 'imagemill[export]'"
        ) from error


def _shape(document: Document, size: tuple[int, int] | None) -> tuple[int, int, int]:
    """Return channels, height and width of the input. Raises: ModelError."""
    config = document.values
    vision = config.get("vision_config")
    cfg = config.get("pretrained_cfg", config) if timm_config.is_timm(document) else None
    if isinstance(cfg, dict):
        shape = cfg.get("input_size")
    else:
        stated = config | (vision if isinstance(vision, dict) else {})
        side = stated.get("image_size")
        sides = side if isinstance(side, list) else [side, side]
        shape = [stated.get("num_channels", 3), *sides]
    if size is not None and isinstance(shape, list):
        shape = [*shape[:1], *size]
    if (
        not isinstance(shape, list)
        or len(shape) != 3
        or any(type(side) is not int or not 1 <= side <= _MAX_SIDE for side in shape)
    ):
        raise document.error(
            f"the size of the input is {printable(shape, 100)}; expected channels, height and"
            f" width, from 1 to {_MAX_SIDE:,}"
        )
    channels, height, width = shape
    return channels, height, width


def _key(request: Request, config: Mapping[str, Any], versions: Mapping[str, str]) -> str:
    """Return the hash of what decides the exported file."""
    return bundles.key_of(request.shards, _EXPORTER, request.shape, config, versions)


def _export(request: Request, config: Mapping[str, Any], home: Path) -> Exported:
    """Export into the folder `home`, which appears whole.

    Raises:
        ModelError: the child failed, died or took too long. Its log is then beside `home`.
    """
    with _staging(request, config, home) as staging:
        log = staging / "log"
        try:
            exported = _run_child(request, staging, log)
        except Interrupted:
            raise
        except (ImagemillError, ChildError) as error:
            log = log.replace(home.with_name(f"{home.name}.log"))
            reason = f"its process {error}." if isinstance(error, ChildError) else str(error)
            raise ModelError(
                f"{request.network} cannot be exported: {reason} Log: {log}"
            ) from error
        try:
            (staging / "onnx").rename(home)
        except OSError as error:
            if not (home / bundles.MODEL).is_file():  # another process may have made it meanwhile
                raise files.cannot_write(home, error) from error
    return exported


def _run_child(request: Request, staging: Path, log: Path) -> Exported:
    variables = _OFFLINE | {"HF_HOME": str(staging), "TORCH_HOME": str(staging)}
    with log.open("w+b") as output:
        child = Child("imagemill.models.export.child", log=output, variables=variables)
        with contextlib.closing(child):
            child.send((request, staging))
            exported = child.receive(_MAX_S)
    assert isinstance(exported, Exported)
    return exported


@contextlib.contextmanager
def _staging(request: Request, config: Mapping[str, Any], home: Path) -> Iterator[Path]:
    """Make a folder that has the configuration and links to the weights, and nothing else that a
    library might read or execute.
    """
    # Not by process id: processes of two machines, or containers, may have the same one.
    staging = home.with_name(f".{home.name}.{os.urandom(6).hex()}.tmp")
    try:
        for name in ("model", "onnx"):
            files.make_folder(staging / name)
        plain = {key: value for key, value in config.items() if key != "auto_map"}
        files.write_whole(staging / "model" / CONFIG, json.dumps(plain).encode())
        for shard in request.shards:
            (staging / "model" / shard.name).symlink_to(shard.resolve())
        if (first := request.shards[0]).name != WEIGHTS:
            (staging / "model" / INDEX).symlink_to(first.with_name(INDEX).resolve())
        yield staging
    finally:
        shutil.rmtree(staging, ignore_errors=True)
