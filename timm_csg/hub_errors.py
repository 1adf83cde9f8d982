"""Errors of the Hub and of the connection to it, with what to do about them."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from timm_csg.manifest import CheckpointError, short

# Of httpx2, httpx or requests: whichever this huggingface_hub is built on.
TRANSPORT_ERROR: type[Exception] = next(kind for kind in HfHubHTTPError.__bases__ if issubclass(kind, Exception))
CONFLICTS, TROUBLES = (409, 412), (429, 500, 502, 503, 504)


class HubError(OSError):
    """The Hub cannot be reached, refuses, or does not have what was requested; nothing is left half-written.

    Attributes:
        status: HTTP status of the answer; None if there was none.
    """

    status: int | None = None


@contextmanager
def explained(what: str, repo_id: str | None = None) -> Iterator[None]:
    """Turn errors of Hub, network and disk in calls of huggingface_hub into one that says what to do.

    Args:
        what: What cannot be done then.
        repo_id: The repository that is downloaded from; None where there is none.
    """
    try:
        yield
    except (HubError, CheckpointError):
        raise
    except (OSError, TRANSPORT_ERROR, ValueError, RuntimeError) as error:
        root = _root(error)
        status = root.response.status_code if isinstance(root, HfHubHTTPError) else None
        reason = _reason(root, status, repo_id)
        if reason is None:
            raise
        translated = HubError(f"cannot {what}: {reason}")
        translated.status = status
        raise translated from root


def _root(error: BaseException) -> BaseException:
    """The error behind what huggingface_hub makes of failed look-ups and of uploads in threads."""
    wrapped = isinstance(error, RuntimeError) or (
        isinstance(error, LocalEntryNotFoundError) and isinstance(error.__cause__, HfHubHTTPError)
    )
    return error.__cause__ if wrapped and error.__cause__ is not None else error


def _reason(error: BaseException, status: int | None, repo_id: str | None) -> str | None:
    """What happened and what to do; None where the error already says it."""
    otherwise = ""
    if repo_id is not None:
        otherwise = (
            f" Without a network: 'hf download {repo_id} --local-dir FOLDER' on a machine that has one, copy the "
            "folder here, and name it as local-dir:FOLDER; or copy that machine's cache, ~/.cache/huggingface."
        )
    server = getattr(error, "server_message", None)
    said = f" The Hub says: {short(str(server), 500)}" if server else ""
    if isinstance(error, GatedRepoError):
        return "access to this repository must be granted; request it on its page, and log in with 'hf auth login'."
    if isinstance(error, RevisionNotFoundError):
        return "the repository has no such revision; look at its branches, or create one with HfApi().create_branch()."
    if status == 401 and not isinstance(error, RepositoryNotFoundError):
        return "the Hub does not accept the token; log in again with 'hf auth login', or pass a valid token=..."
    if isinstance(error, RepositoryNotFoundError):
        return (
            "there is no such repository, or it is private and your token may not see it (and no folder of that name). "
            "Check the spelling, and log in with 'hf auth login' or pass token=..."
        )
    if status == 403:
        return f"the token lacks permission; create one with write access to this repository.{said}"
    if status in CONFLICTS:
        return f"somebody else pushed at the same time; push again.{said}"
    if status in TROUBLES:
        return f"the Hub has trouble (status {status}); try again later.{said}"
    if status is not None:
        return f"the Hub answered with status {status}.{said}"
    if isinstance(error, LocalEntryNotFoundError):
        missing = "there is no such folder, it is not in the cache, and the Hub cannot be reached or must not be asked "
        missing += "(offline); connect once."
        return missing + otherwise
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"the disk is full ({error}); free disk space, or choose another place with cache_dir=... or TMPDIR."
    if isinstance(error, ConnectionError):  # offline mode
        return str(error)
    if isinstance(error, TRANSPORT_ERROR):
        failed = (
            f"the connection to the Hub failed ({type(error).__name__}: {error}); check the network, and try again."
        )
        return failed + otherwise
    if isinstance(error, OSError) and "Consistency check failed" in str(error):
        return "the download was incomplete; try again."
    if isinstance(error, ValueError) and "Invalid metadata in README.md" in str(error):
        return f"the Hub does not accept the metadata of README.md, nothing was uploaded. {error}"
    return None
