"""Checkpoints from and to the Hugging Face hub, and what to do when the hub says no.

Knows: which files are wanted (never pickles), the hub's exceptions and their remedies.
Doesn't know: what a checkpoint contains.
"""

from __future__ import annotations

import errno
import logging
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from libortho import checkpoint
from libortho.errors import ArtifactError, ModelLoadError

_WANTED = ["*.safetensors", "*.json", "tokenizer.model", "*.txt", "*.jinja"]
# Second copies of the same weights in other layouts.
_UNWANTED = ["original/*", "consolidated*", "onnx/*"]

log = logging.getLogger(__name__)


def download(hub_id: str, revision: str | None, cache: Path | None) -> Path:
    """The local snapshot of a hub model; no network is touched if a complete one is cached.

    `revision` None is the hub's main branch, as it was when it was first fetched. `cache` None is
    the hub client's own cache (HF_HOME). Raises `ModelLoadError`.
    """
    try:
        cached = _snapshot(hub_id, revision, cache, local_files_only=True)
        if checkpoint.is_complete(cached):
            return cached
    except HFValidationError as error:
        raise ModelLoadError(
            f"{hub_id!r} is not a valid hub id ({error}). It has the form owner/model; for a local "
            "folder give a path that exists, such as ./model."
        ) from error
    except (HTTPError, OSError):
        pass  # not cached
    try:
        folder = _snapshot(hub_id, revision, cache, local_files_only=False)
    except (HTTPError, OSError, ValueError) as error:
        raise ModelLoadError(_explain(error, hub_id, revision)) from error
    log.info("%s: commit %s", hub_id, folder.name)
    return folder


def beside(file: Path, hub_id: str) -> Path:
    """The folder with everything that belongs to a cached file of a hub model, weights aside.

    transformers fetches the files that it knows of; this fetches the rest of the same commit, if it
    isn't cached. Raises `ModelLoadError`.
    """
    snapshot = next((p for p in file.parents if p.parent.name == "snapshots"), None)
    if snapshot is None:
        return file.parent  # a folder after all
    commit, cache = snapshot.name, snapshot.parents[2]
    try:
        _snapshot(hub_id, commit, cache, local_files_only=False, ignore=[*_UNWANTED, "model*"])
    except (HTTPError, OSError, ValueError) as error:
        raise ModelLoadError(_explain(error, hub_id, commit)) from error
    return file.parent


def upload(folder: Path, hub_id: str, *, secret: bool, **options: Any) -> Any:
    """Upload a folder to a hub repository, made if it isn't there; returns the commit's facts.

    secret: whether the folder holds a private stream; then the repository has to be private
    options: `private` and `token` of the repository; `revision`, `create_pr`, `commit_message` and
        `commit_description` of the commit

    Raises `ArtifactError`, before anything is uploaded, if something secret would become public.
    What the hub refuses is raised as the hub's client does.
    """
    private = options.pop("private", None)
    remedy = (
        "Publish the folder that libortho.export_base writes; or, to keep the stream on the hub, "
        "use a private repository of its own and pass private=True."
    )
    if secret and not private:
        raise ArtifactError(
            f"this model has a private stream, and {hub_id} would not be asked to be private: who "
            f"reads the stream reads the records. {remedy}"
        )
    api = huggingface_hub.HfApi(token=options.pop("token", None))
    repository = api.create_repo(hub_id, private=private, exist_ok=True).repo_id
    if secret and not api.model_info(repository).private:
        raise ArtifactError(
            f"{repository} exists and is public, so the private stream was not uploaded. {remedy}"
        )
    return api.upload_folder(repo_id=repository, folder_path=folder, **options)


def _snapshot(
    hub_id: str,
    revision: str | None,
    cache: Path | None,
    *,
    local_files_only: bool,
    ignore: list[str] = _UNWANTED,
) -> Path:
    return Path(
        huggingface_hub.snapshot_download(
            hub_id,
            revision=revision,
            cache_dir=cache,
            allow_patterns=_WANTED,
            ignore_patterns=ignore,
            local_files_only=local_files_only,
        )
    )


def _explain(error: Exception, hub_id: str, revision: str | None) -> str:
    status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
    login = "log in with `hf auth login` or set HF_TOKEN"
    # GatedRepoError is a RepositoryNotFoundError, and both are OSErrors: from narrow to wide.
    if isinstance(error, GatedRepoError):
        return (
            f"{hub_id} is gated: its owner wants the licence accepted first. Accept it at "
            f"https://huggingface.co/{hub_id}, then {login} with a token of that account. The "
            "model smollm2 needs neither."
        )
    if isinstance(error, RevisionNotFoundError):
        return (
            f"{hub_id} has no revision {revision or 'main'}. If the owner has rewritten the "
            "repository, download the revision you trust with `hf download` and give its folder."
        )
    if isinstance(error, RepositoryNotFoundError):
        return (
            f"The hub has no model {hub_id}, or it is private. Check the spelling; if it is "
            f"private, {login}."
        )
    if status in (401, 403):
        return (
            f"The hub refused access to {hub_id} (HTTP {status}): the token is wrong, expired or "
            f"lacks the right to read this model. Make a new one, and {login}."
        )
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return (
            f"There is no room left on the disk for {hub_id}. Free some, or choose another folder "
            "with --cache-dir."
        )
    return (
        f"{hub_id} is not cached and the hub can't be reached ({type(error).__name__}: "
        f"{str(error).splitlines()[0] if str(error) else 'no details'}). Check the network, the "
        "proxy and HF_HUB_OFFLINE; or download the model on another machine with `hf download "
        f"{hub_id}` and give the folder."
    )
