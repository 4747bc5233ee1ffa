"""Repositories of the Hugging Face Hub, by name: `hf:owner/name[@revision]`.

    name ─► listing of one commit ─► the few files that are needed ─► checked ─► a folder

`huggingface_hub` talks to the Hub: it knows tokens, mirrors (`HF_ENDPOINT`) and the cache that
other programs share (`HF_HOME`). The listing is kept in the models folder, and so are links to the
files. So the next run asks nobody, and a branch that moves does not change a model that is in
use.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import urllib.parse
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

from msgspec import Struct

from imagemill.errors import DownloadError, ModelError, OutputError, UsageError, printable
from imagemill.models import bundle as bundles
from imagemill.models import hub_library
from imagemill.models.folders import json_file
from imagemill.models.folders.json_file import (
    CONFIG,
    GRAPHS,
    INDEX,
    PREPROCESSOR,
    PROCESSOR,
    WEIGHTS,
)
from imagemill.system import files, serialization
from imagemill.system.messages import DownloadProgress, Notify
from imagemill.version import __version__

PREFIX: Final = "hf:"
_PART: Final = r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}"
NAME: Final = re.compile(
    rf"(?P<repo>{_PART}/{_PART})(?:@(?P<revision>[A-Za-z0-9][\w./-]{{0,199}}))?"
)
"""What follows `hf:`."""
_COMMIT: Final = re.compile(r"[0-9a-f]{40}")
_SHA256: Final = re.compile(r"[0-9a-f]{64}")
_CACHE_FOLDER: Final = re.compile(
    rf"/models--(?P<owner>{_PART}?)--(?P<name>{_PART})/snapshots/[0-9a-f]{{40}}$"
)
_FOLDER: Final = ".hub"
"""In the models folder: listings, and links to the files."""
_TEXTS: Final = (CONFIG, PREPROCESSOR, PROCESSOR)
_MAX_BYTES: Final = 16 * 2**30
_MAX_FILES: Final = 100_000
_TIMEOUT_S: Final = 10.0


class HubFile(Struct, frozen=True):
    """A file of a repository, as the Hub lists it."""

    size: int
    """Bytes."""
    sha256: str | None = None
    """Of the content; None if the Hub keeps the file in Git itself."""
    blob: str | None = None
    """Git's hash of a file that it keeps itself."""


class Listing(Struct, frozen=True):
    """What a repository holds at one commit."""

    repo: str
    commit: str
    licence: str
    """As the model card states it; `unknown` if it does not."""
    files: Mapping[str, HubFile]


class Snapshot(Struct, frozen=True):
    """The files of one commit that a model is made from, on disk."""

    folder: Path
    """Holds regular files under the names of the repository."""
    repo: str
    revision: str
    """Branch, tag or commit that was asked for; `main` by default."""
    commit: str
    licence: str
    sha256s: dict[str, str]
    """Of every file, by name; the weights come last."""

    @property
    def name(self) -> str:
        """The name that always means these files: `hf:owner/name@commit`."""
        return f"{PREFIX}{self.repo}@{self.commit}"

    @property
    def origin(self) -> dict[str, str | bool]:
        """What a card says about where the model comes from."""
        weights = list(self.sha256s)[-1]
        return {
            "source": "hub",
            "repository": self.repo,
            "revision": self.revision,
            "commit": self.commit,
            "file": weights,
            "sha256": self.sha256s[weights],
            "verified": True,
        }


Choose = Callable[[str, Mapping[str, HubFile]], list[str]]
"""From a repository's name and files to the names of those that are needed, the weights last."""


def is_hub_name(model: str) -> bool:
    """Return whether a model is named as a repository of the Hub."""
    return model.startswith(PREFIX)


def parse_name(name: str) -> tuple[str, str]:
    """Return repository and revision of `hf:owner/name[@revision]`.

    Raises:
        UsageError: it is no such name.
    """
    found = NAME.fullmatch(name.removeprefix(PREFIX))
    if found is None or ".." in name or "--" in found["repo"]:
        raise UsageError(
            f"{name!r} does not name a repository of the Hugging Face Hub. Write"
            " hf:owner/name, or hf:owner/name@revision with a branch, tag or commit."
        )
    return found["repo"], found["revision"] or "main"


def classifier_files(repo: str, names: Mapping[str, HubFile]) -> list[str]:
    """Return the files of a classifier: its configuration, and the best weights that there are.

    ONNX comes first, because it says everything about the network, then safetensors, then PyTorch's
    pickles, which imagemill reads without executing anything. A repository with a vision tower has
    both towers in `model.onnx`, which wants texts too. The configuration of a timm repository,
    which has no `preprocessor_config.json`, describes its safetensors: an ONNX file beside them may
    want other pixels.

    Raises:
        ModelError: the repository has no such weights.
    """
    texts = [name for name in _TEXTS if name in names]
    is_timm = PREPROCESSOR not in names and PROCESSOR not in names and WEIGHTS in names
    for name in () if is_timm else GRAPHS:
        if name in names:
            return [*texts, *_onnx_data(name, names), name]
    if WEIGHTS in names:
        return [*texts, WEIGHTS]
    if INDEX in names:
        shard = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")
        shards = sorted(name for name in names if shard.fullmatch(name))
        return [*texts, INDEX, *shards]
    graphs = [name for name in names if re.fullmatch(r"(onnx/)?[\w.-]+\.onnx", name)]
    if len(graphs) == 1:
        return [*texts, *_onnx_data(graphs[0], names), graphs[0]]
    if "pytorch_model.bin" in names:
        return [*texts, "pytorch_model.bin"]
    found = printable(", ".join(sorted(graphs or names)) or "nothing", 300)
    if graphs:
        raise ModelError(
            f"hf:{repo} has several ONNX files and none is called model.onnx: {found}. Download the"
            " one you want and use it with --model FILE.onnx."
        )
    raise ModelError(
        f"hf:{repo} has no model.onnx, model.safetensors or pytorch_model.bin. It holds: {found}."
    )


def _onnx_data(graph: str, names: Mapping[str, HubFile]) -> list[str]:
    """Return the files that hold an ONNX file's weights, by the names that exporters give them."""
    return sorted(
        name for name in names if re.fullmatch(re.escape(graph) + r"[._]data(_\d+)?", name)
    )


def snapshot(
    name: str,
    models_dir: Path,
    notify: Notify,
    progress: DownloadProgress | None = None,
    *,
    choose: Choose = classifier_files,
    refresh: bool = False,
) -> Snapshot:
    """Return the files of a repository, downloaded if they are not on disk.

    The first call asks the Hub which commit the revision means, and remembers it. Later calls use
    that commit and ask nobody.

    Args:
        name: `hf:owner/name` or `hf:owner/name@revision`.
        models_dir: what was found out is kept in its folder `.hub`.
        choose: which of the repository's files are needed.
        refresh: ask the Hub again which commit the revision means.

    Raises:
        UsageError: the name is wrong, or the package huggingface_hub is not installed.
        DownloadError: no such repository or revision, no access, no connection, or wrong bytes.
        ModelError: the repository does not hold the files that are needed.
    """
    repo, revision = parse_name(name)
    home = _home(repo, models_dir)
    note = home / f"{urllib.parse.quote(revision, safe='')}.json"
    noted = _noted(note)
    listing, is_new = noted, False
    if listing is None or refresh:
        try:
            listing, is_new = _ask_hub(repo, revision), True
        except hub_library.UnreachableError as error:
            listing = noted or _cached(repo, revision, choose)
            if listing is None:
                raise
            notify(f"{error} Going on with the commit that is on disk.")
    chosen = choose(repo, listing.files)
    _check_sizes(repo, chosen, listing)
    folder = home / listing.commit
    missing = [each for each in chosen if not _is_here(folder / each, listing.files[each])]
    branch = "" if revision == listing.commit else f" of {revision}"
    commit = f"commit {listing.commit[:12]}{branch}"
    notify(f"{PREFIX}{repo}: {commit}, {describe_licence(listing.licence)}")
    if missing:
        _download(listing, missing, folder, notify, progress)
    if is_new:
        files.write_whole(note, serialization.encode(listing))
    _warn_of_code(repo, folder, notify)
    sums = {each: listing.files[each].sha256 or bundles.sha256(folder / each) for each in chosen}
    return Snapshot(folder, repo, revision, listing.commit, listing.licence, sums)


def cached_snapshot(
    folder: Path, models_dir: Path, notify: Notify, *, choose: Choose = classifier_files
) -> Snapshot | None:
    """Return the snapshot that a folder of the Hub's cache is, as `snapshot_download` returns it.

    Such a folder holds links, which ONNX does not follow. Asks nobody.

    Returns:
        None if the folder is not one of the cache.

    Raises:
        ModelError: the folder does not hold the files that are needed.
    """
    found = _CACHE_FOLDER.search(folder.absolute().as_posix())
    if found is None:
        return None
    repo = f"{found['owner']}/{found['name']}"
    listing = _listing_of(folder, repo)
    chosen = choose(repo, listing.files)
    _check_sizes(repo, chosen, listing)
    target = _home(repo, models_dir) / listing.commit
    for name in chosen:
        if not _is_here(target / name, listing.files[name]):
            _check(repo, name, folder / name, listing.files[name])
            _link(folder / name, target / name)
    notify(f"{PREFIX}{repo}: commit {listing.commit[:12]}, {describe_licence(listing.licence)}")
    _warn_of_code(repo, target, notify)
    sums = {each: listing.files[each].sha256 or bundles.sha256(target / each) for each in chosen}
    return Snapshot(target, repo, listing.commit, listing.commit, listing.licence, sums)


def _home(repo: str, models_dir: Path) -> Path:
    return models_dir / _FOLDER / repo.replace("/", "--")


def describe_licence(licence: str) -> str:
    """Return a licence in words, with a note if it forbids commercial use."""
    restricted = re.search(r"(^|-)nc(-|$)", licence.lower()) is not None
    return f"licence {licence}{': not for commercial use' if restricted else ''}"


def _noted(note: Path) -> Listing | None:
    """Return the listing of an earlier call; None if there is none, or it is damaged."""
    try:
        return serialization.decode(note.read_bytes(), Listing, str(note), ModelError)
    except (OSError, ModelError):
        return None


def _check_sizes(repo: str, chosen: list[str], listing: Listing) -> None:
    for name in chosen:
        size = listing.files[name].size
        most = json_file.MAX_BYTES if name.endswith(".json") else _MAX_BYTES
        if size > most:
            raise ModelError(
                f"hf:{repo}: {name} has {size:,} bytes, at most {most:,} are read. Use another"
                " repository."
            )


def _is_here(path: Path, file: HubFile) -> bool:
    return path.is_file() and path.stat().st_size == file.size


def _warn_of_code(repo: str, folder: Path, notify: Notify) -> None:
    """Say that a repository's own Python code is not used."""
    with contextlib.suppress(ModelError):
        if "auto_map" in json_file.read(folder / CONFIG).values:
            notify(
                f"{PREFIX}{repo}: its own Python code (auto_map in config.json) is not downloaded"
                " and not run"
            )


# ── the Hub ───────────────────────────────────────────────────────────────────────────────────────


def _ask_hub(repo: str, revision: str) -> Listing:
    """Return what the Hub says about a revision."""
    api = hub_library.load().HfApi(library_name="imagemill", library_version=__version__)

    def ask() -> Listing:
        info = api.model_info(repo, revision=revision, files_metadata=True, timeout=_TIMEOUT_S)
        return _listing(repo, info)

    return hub_library.call(repo, revision, ask)


def _listing(repo: str, info: Any) -> Listing:
    """Return the Hub's answer as a listing. Raises: ValueError."""
    commit, siblings = info.sha, info.siblings or []
    if not isinstance(commit, str) or not _COMMIT.fullmatch(commit):
        raise ValueError(f"it names the commit {commit!r}")
    if len(siblings) > _MAX_FILES:
        raise ValueError(f"it lists {len(siblings):,} files")
    found = {}
    for entry in siblings:
        size, lfs = entry.size, entry.lfs
        sha256 = lfs.sha256 if lfs else None
        if not isinstance(size, int) or size < 0:
            continue
        if sha256 is not None and not _SHA256.fullmatch(sha256):
            raise ValueError(f"it gives {sha256!r} as the sha256 of {entry.rfilename!r}")
        found[entry.rfilename] = HubFile(size, sha256, None if lfs else entry.blob_id)
    licence = info.card_data.get("license") if info.card_data else None
    return Listing(repo, commit, _plain(licence) or "unknown", found)


def _plain(licence: object) -> str:
    return licence if isinstance(licence, str) and re.fullmatch(r"[\w. +-]{1,80}", licence) else ""


def _cached(repo: str, revision: str, choose: Choose) -> Listing | None:
    """Return what the Hub's cache holds of a revision; None if files are missing from it.

    Other programs may have filled it, such as `hf download`.
    """
    hub = hub_library.load()
    path = hub.try_to_load_from_cache(repo, CONFIG, revision=revision)
    if not isinstance(path, str) or not _COMMIT.fullmatch(Path(path).parent.name):
        return None
    listing = _listing_of(Path(path).parent, repo)
    try:
        choose(repo, listing.files)
    except ModelError:
        return None
    return listing


def _listing_of(folder: Path, repo: str) -> Listing:
    """Return what a folder of the Hub's cache holds. Its links name the hashes."""
    found = {}
    for file in sorted(folder.rglob("*")):
        if file.is_file():
            etag = file.resolve().name
            found[file.relative_to(folder).as_posix()] = HubFile(
                file.stat().st_size, etag if _SHA256.fullmatch(etag) else None
            )
    readme = folder / "README.md"
    text = readme.read_bytes()[:8192].decode("utf-8", "replace") if readme.is_file() else ""
    stated = re.search(r"^license: *(\S+) *$", text, re.M)
    return Listing(repo, folder.name, _plain(stated[1] if stated else "") or "unknown", found)


def _download(
    listing: Listing,
    missing: list[str],
    folder: Path,
    notify: Notify,
    progress: DownloadProgress | None,
) -> None:
    """Fetch files through the Hub's cache, check them, and link them into `folder`."""
    hub = hub_library.load()
    repo, commit = listing.repo, listing.commit
    cached = {name: hub.try_to_load_from_cache(repo, name, revision=commit) for name in missing}
    absent = [name for name in missing if not isinstance(cached[name], str)]
    total = sum(listing.files[name].size for name in absent)
    if absent:
        notify(f"{PREFIX}{repo}: downloading {', '.join(absent)} ({total / 2**20:,.1f} MiB)")
    done = 0
    for name in missing:
        bar = hub_library.make_bar(done, total, progress)
        path = Path(
            hub_library.call(
                repo,
                commit,
                lambda name=name, bar=bar: hub.hf_hub_download(  # type: ignore[misc]
                    repo,
                    name,
                    revision=commit,
                    library_name="imagemill",
                    library_version=__version__,
                    tqdm_class=bar,
                ),
                cleans_up=True,
            )
        )
        _check(repo, name, path, listing.files[name])
        _link(path, folder / name)
        done += listing.files[name].size if name in absent else 0


def _check(repo: str, name: str, path: Path, file: HubFile) -> None:
    """Compare a file of the cache with the listing; a damaged one is removed from the cache."""
    size = path.stat().st_size
    as_git = hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)
    digest = hashlib.sha256() if file.sha256 else as_git
    with path.open("rb") as opened:
        found = hashlib.file_digest(opened, lambda: digest).hexdigest()
    expected = file.sha256 or file.blob
    if size == file.size and (expected is None or found == expected):
        return
    with contextlib.suppress(OSError):
        path.resolve().unlink()
        path.unlink(missing_ok=True)
    what = f"{size:,} bytes instead of {file.size:,}"
    if size == file.size:
        what = f"the hash {found} instead of {expected}"
    raise DownloadError(
        f"hf:{repo}: {name} is damaged: it has {what}. It was removed from the cache. Run the"
        " command again to download it."
    )


def _link(source: Path, target: Path) -> None:
    """Make `target` the same file as `source`, or a copy if it is on another file system.

    A symbolic link will not do: ONNX refuses to read weights through one.
    """
    making = target.with_name(f".{target.name}.{os.urandom(6).hex()}.tmp")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(source.resolve(), making)
            making.replace(target)
            making.unlink(missing_ok=True)  # renaming does nothing if both are the same file
        except OSError:
            with source.open("rb") as opened:
                files.write_whole(target, iter(lambda: opened.read(2**20), b""))
    except (OSError, OutputError) as error:
        raise bundles.cannot_write(target, error) from error
