"""Hugging Face's hub: huggingface_hub fetches, keeps its cache and its tokens; this chooses the
files, compares them with their digests, and says in words what went wrong.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from flax_resblock.errors import InputError, optional, reason, some, visible
from flax_resblock.hub.names import HUB, HUB_PREFIX, Fetched, RepositoryName, parsed, say

_MAIN = "main"
_INDEX = ".index.json"
_LARGEST_INDEX = 64 << 20
_OF_TRANSPORT = ("httpx", "httpx2", "httpcore", "httpcore2", "requests", "urllib3")
"""Packages whose errors say that a server was not reached."""


def fetch_from_hub(name: str, weights: Sequence[str], texts: Sequence[str]) -> Fetched:
    """See :func:`flax_resblock.hub.fetch`. ``HF_ENDPOINT``, ``HF_HOME``, ``HF_TOKEN`` and
    ``HF_HUB_OFFLINE`` count as everywhere.
    """
    hub, wanted = _huggingface_hub(), parsed(name)
    try:
        info = hub.HfApi().model_info(wanted.repository, revision=wanted.revision)
    except Exception as error:  # see _explained
        if not _unreachable(error):
            raise _explained(error, name) from error
        return _from_cache(hub, name, wanted, weights, texts, error)
    present = [one.rfilename for one in info.siblings or ()]
    chosen = _chosen(name, wanted, present, weights)
    with _explaining(name, "fetched"):

        def get(file: str, revision: str) -> Path:
            found = hub.hf_hub_download(wanted.repository, file, revision=revision)
            return _verified(Path(found), name)

        # first what describes the weights, so that the cache never has weights without it
        for text in texts:
            if text in present:
                get(text, info.sha)
        # under the name of its branch, by which it is found again without a network
        path = get(chosen, wanted.revision or _MAIN)
        if _commit_of(path) != info.sha:
            raise InputError(f"{name} was changed while it was fetched. Run this again.")
        for shard in _shards(path):
            if shard in present:
                get(shard, info.sha)
    return _found(name, wanted, info.sha, path)


def _commit_of(path: Path) -> str:
    """The commit of a file in the cache."""
    return next(one.name for one in path.parents if one.parent.name == "snapshots")


def _chosen(
    name: str, wanted: RepositoryName, present: Sequence[str], weights: Sequence[str]
) -> str:
    """The file with the weights; raises InputError where there is none."""
    candidates = weights if wanted.file is None else [wanted.file]
    found = next((one for one in candidates if one in present), None)
    if found is not None:
        return found
    what = f"no file {wanted.file}" if wanted.file else f"none of {', '.join(weights)}"
    raise InputError(
        f"{name} has {what}; it has {some(sorted(present), 8) or 'nothing'}. Name the file with "
        f"the weights: {HUB_PREFIX}{wanted.repository}/FILE."
    )


def _shards(path: Path) -> list[str]:
    """The files that an index names; empty for anything else. The reader checks it again."""
    if not path.name.endswith(_INDEX) or path.stat().st_size > _LARGEST_INDEX:
        return []
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return sorted({str(file) for file in content["weight_map"].values()})
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return []


def _from_cache(
    hub: Any,
    name: str,
    wanted: RepositoryName,
    weights: Sequence[str],
    texts: Sequence[str],
    error: Exception,
) -> Fetched:
    """The weights that an earlier call fetched, where the hub cannot be asked."""

    def cached(file: str) -> Path | None:
        revision = wanted.revision or _MAIN
        found = hub.try_to_load_from_cache(wanted.repository, file, revision=revision)
        return _verified(Path(found), name) if isinstance(found, str) else None

    why = f"{hub.constants.ENDPOINT} cannot be reached ({_first_line(error)})"
    if hub.constants.HF_HUB_OFFLINE:
        why = "HF_HUB_OFFLINE is set"
    names = weights if wanted.file is None else [wanted.file]
    path = next((found for one in names if (found := cached(one)) is not None), None)
    lacking = [one for one in _shards(path) if cached(one) is None] if path is not None else []
    if path is None or lacking:
        raise InputError(
            f"{name} is not in the cache ({hub.constants.HF_HUB_CACHE})"
            + (f" as a whole, {some(lacking)} missing" if lacking else "")
            + f", and {why}. Fetch it where there is a network, or give the path of a file."
        ) from error
    for text in texts:
        cached(text)
    say(f"{why}; {name} is read from the cache.")
    return _found(name, wanted, _commit_of(path), path)


def _found(name: str, wanted: RepositoryName, commit: str, path: Path) -> Fetched:
    file = f"/{wanted.file}" if wanted.file else ""
    pinned = f"{HUB_PREFIX}{wanted.repository}{file}@{commit}"
    if wanted.revision != commit:
        say(f"{name} is at revision {commit}; {pinned} names this one for good.")
    return Fetched(path, {HUB: pinned})


def _verified(path: Path, name: str) -> Path:
    """A file of the cache, compared with the digest by which the cache names it.

    Raises:
      InputError: It is damaged; it is removed, so that the next call fetches it again.
    """
    blob = Path(os.path.realpath(path))
    if re.fullmatch(r"[0-9a-f]{64}", blob.name):
        empty = hashlib.sha256()
    elif re.fullmatch(r"[0-9a-f]{40}", blob.name):  # as git names what it keeps
        header = f"blob {blob.stat().st_size}\0".encode()
        empty = hashlib.sha1(header, usedforsecurity=False)
    else:  # a cache without links, whose names are no digests
        return path
    with blob.open("rb") as handle:
        digest = hashlib.file_digest(handle, lambda: empty).hexdigest()
    if digest != blob.name:
        path.unlink(missing_ok=True)
        blob.unlink(missing_ok=True)
        raise InputError(
            f"{name}: {path.name} is damaged: its digest is {digest}, and the hub says "
            f"{blob.name}. It was removed from the cache. Run this again; if the digest differs "
            f"again, a proxy or a mirror changes the file."
        )
    return path


def push_folder(folder: Path, name: str, message: str) -> str:
    """Creates a repository on the hub unless it exists, and puts the files of a folder into it, as
    one commit.

    Args:
      name: ``hf-hub:USER/NAME``, or with ``@BRANCH``.
    Returns:
      The name with the new revision.
    Raises:
      InputError: No access or no network; nothing was changed, as a commit is whole or not at all.
    """
    hub, wanted = _huggingface_hub(), parsed(name)
    if wanted.file is not None:
        raise InputError(f"{name} names a file; a model is pushed to {HUB_PREFIX}USER/NAME.")
    with _explaining(name, "pushed"):
        api = hub.HfApi()
        api.create_repo(wanted.repository, exist_ok=True)
        commit = api.upload_folder(
            repo_id=wanted.repository,
            folder_path=folder,
            commit_message=message,
            revision=wanted.revision,
        )
    return f"{HUB_PREFIX}{wanted.repository}@{commit.oid}"


def _huggingface_hub() -> Any:
    words = "names of Hugging Face's hub need huggingface_hub: pip install 'flax-resblock[hub]'."
    optional("huggingface_hub.constants", words)
    return optional("huggingface_hub", words)


@contextmanager
def _explaining(name: str, done: str) -> Iterator[None]:
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # see _explained
        raise _explained(error, name, done) from error


def _unreachable(error: BaseException) -> bool:
    """Whether an error says that the hub was not reached, and not what it answered."""
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    if isinstance(error, HfHubHTTPError):
        return False
    packages = {kind.__module__.split(".")[0] for kind in type(error).__mro__}
    return isinstance(error, OfflineModeIsEnabled | ConnectionError) or bool(
        packages & set(_OF_TRANSPORT)
    )


def _explained(error: Exception, name: str, done: str = "fetched") -> InputError:
    """An error of huggingface_hub as one paragraph; ``done`` is what was not."""
    from huggingface_hub import constants, errors

    status = getattr(getattr(error, "response", None), "status_code", None)
    where = constants.ENDPOINT
    login = "log in with `hf auth login`, or set HF_TOKEN"
    if isinstance(error, errors.GatedRepoError):
        words = f"asks for consent before it is fetched. Give it on {where}, and {login}."
    elif isinstance(error, errors.RevisionNotFoundError):
        words = "has no such revision. Give a branch, a tag or a commit that it has."
    elif isinstance(error, errors.RepositoryNotFoundError):
        words = f"does not exist on {where}, or is private. Check the name, or {login}."
    elif status == 401:
        words = f"was refused: the token is not valid on {where} (401). To get one, {login}."
    elif status == 403:
        words = f"was refused: the token does not allow it (403). With another account, {login}."
    elif status == 429:
        words = f"was refused: too many requests (429). Wait some minutes, or {login}."
    elif status is not None:
        words = f"could not be served: {where} answered {status}. Try again later."
    elif isinstance(error, errors.HFValidationError):
        words = f"is no name of a repository: {_first_line(error)}"
    elif isinstance(error, errors.LocalEntryNotFoundError) or _unreachable(error):
        cause = error.__cause__ or error
        words = (
            f"could not be {done}: {where} cannot be reached ({_first_line(cause)}). Check the "
            f"network and run this again."
        )
    elif isinstance(error, OSError):  # also what arrived in another size than was announced
        words = f"could not be {done}: {_first_line(error)}. Run this again."
    else:
        words = f"could not be {done}: {type(error).__name__}: {_first_line(error)}."
    return InputError(f"{name} {words}")


def _first_line(error: BaseException) -> str:
    return visible(next(iter(reason(error).strip().splitlines()), type(error).__name__)[:200])
