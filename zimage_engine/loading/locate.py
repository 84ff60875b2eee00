"""Finds the folder that a path or a hub id stands for; knows nothing of what is in a good model."""

from __future__ import annotations

import re
from pathlib import Path

from zimage_engine.checkpoint.features import CheckpointFeatures, read_features
from zimage_engine.errors import CheckpointNotFound, DownloadError
from zimage_engine.loading.hub import download_model

_HUB_ID = re.compile(
    r"(?P<repo>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@(?P<revision>[A-Za-z0-9][\w./-]*))?"
)
_COMMIT = re.compile(r"[0-9a-f]{40}")


def is_hub_id(text: str) -> bool:
    """Whether it is written as `locate` takes a model of the hub: owner/name, or owner/name@revision."""
    return _HUB_ID.fullmatch(text) is not None


def locate(path_or_repo_id: str | Path, *, fetch: bool = True) -> Path:
    """The folder or file on disk that `path_or_repo_id` stands for.

    A path that exists wins over a hub id of the same spelling. A hub id may end in `@` and a revision: a
    branch, a tag or a commit hash; without one it is the branch main. It is looked up in the Hugging
    Face cache first and fetched only where something of it is missing; `fetch` False refuses it then. Raises
    CheckpointNotFound.
    """
    path = Path(path_or_repo_id).expanduser()
    if path.exists():
        return path
    if isinstance(path_or_repo_id, str) and (match := _HUB_ID.fullmatch(path_or_repo_id)):
        obtain = _fetched if fetch else _refused
        return _cached(match["repo"], match["revision"]) or obtain(match["repo"], match["revision"])
    raise CheckpointNotFound(f"there is nothing at '{path}', and it is not a hub id such as 'owner/name'")


def missing_files(features: CheckpointFeatures) -> tuple[str, ...]:
    """What the checkpoint's own lists name and its folder lacks: components, their weights, shards."""
    if not features.model_index:
        return ("model_index.json",)
    missing: list[str] = []
    for component in features.components.values():
        shards = {shard for index in component.indexes for shard in index.shards}
        if not component.is_there:
            missing.append(f"{component.name}/")
        elif component.is_model and not component.weight_files and not shards:
            missing.append(f"the weights of {component.name}")
        else:
            missing += [f"{component.name}/{shard}" for shard in sorted(shards - set(component.files))]
    return tuple(missing)


def commit_of(path: Path) -> str | None:
    """The commit hash of a folder of the Hugging Face cache, which names it by that; None for any other."""
    is_snapshot = path.parent.name == "snapshots" and _COMMIT.fullmatch(path.name)
    return path.name if is_snapshot else None


def _cached(repo_id: str, revision: str | None) -> Path | None:
    """The snapshot of the revision in the cache, if all that its lists name is there."""
    folder = _in_cache(repo_id, revision)
    return None if folder is None or missing_files(read_features(folder)) else folder


def _in_cache(repo_id: str, revision: str | None) -> Path | None:
    """The snapshot of the revision in the cache, whole or not."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return Path(snapshot_download(repo_id, revision=revision, local_files_only=True))
    except LocalEntryNotFoundError:
        return None


def _refused(repo_id: str, revision: str | None) -> Path:
    """Raises CheckpointNotFound with the command that fetches it."""
    named = f"--model {repo_id}" + (f" --revision {revision}" if revision else "")
    raise CheckpointNotFound(
        f"'{repo_id}' is not whole in the Hugging Face cache{_lacks(repo_id, revision)}; fetch it first: "
        f"zimage-turbo download {named}"
    )


def _lacks(repo_id: str, revision: str | None) -> str:
    """In brackets what the cache lacks of it; "" where it has nothing at all."""
    present = _in_cache(repo_id, revision)
    missing = missing_files(read_features(present)) if present else ()
    return f" (missing: {', '.join(missing)})" if missing else ""


def _fetched(repo_id: str, revision: str | None) -> Path:
    """The folder that a checked download leaves in the cache; what is there already is not fetched again."""
    try:
        return download_model(repo_id, revision).path
    except DownloadError as error:
        raise CheckpointNotFound(
            f"'{repo_id}' is not whole in the Hugging Face cache{_lacks(repo_id, revision)} and could not be "
            "fetched: "
            f"{str(error).rstrip('.')}; or name a folder on disk"
        ) from error
