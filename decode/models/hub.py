"""What goes wrong with the Hugging Face Hub, in words that say what to do."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

from kernels import UserError
from kernels.errors import first_line
from kernels.files import NO_ROOM

LOG_IN = "log in with `hf auth login`"


def chain(error: BaseException) -> Iterator[BaseException]:
    """An exception and what it was raised from, outermost first: the Hub's client wraps its errors."""
    seen: BaseException | None = error
    while seen is not None:
        yield seen
        seen = seen.__cause__


def status(error: BaseException) -> int | None:
    """The HTTP status that an error of the Hub's client goes back to, None where there was no answer."""
    for link in chain(error):
        code = getattr(getattr(link, "response", None), "status_code", None)
        if isinstance(code, int):
            return code
    return None


def server_message(error: BaseException) -> str:
    """What the Hub itself said, on one line; empty if nothing."""
    for link in chain(error):
        if said := getattr(link, "server_message", None):
            return " ".join(str(said).split())[:200].rstrip(".")
    return ""


def retry_after(error: BaseException) -> str:
    """When to try again: seconds from the answer's Retry-After or rate limit headers, else "later"."""
    from huggingface_hub.utils import parse_ratelimit_headers

    for link in chain(error):
        headers = getattr(getattr(link, "response", None), "headers", None) or {}
        limit = parse_ratelimit_headers(headers)
        seconds = limit.reset_in_seconds if limit is not None and limit.remaining == 0 else headers.get("Retry-After")
        if str(seconds or "").isdigit():
            return f"in {seconds} s"
    return "later"


def _told_to_stay_offline() -> bool:
    """Whether the user said so, and not a command that looks for what is here without fetching it (decode.doctor)."""
    said = os.environ.get("HF_HUB_OFFLINE") or os.environ.get("TRANSFORMERS_OFFLINE") or ""
    return said.upper() in ("1", "ON", "YES", "TRUE")


def explain(error: BaseException, repo: str) -> str:
    """Why the Hub did not do what was asked, and what to do about it.

    error: anything that `huggingface_hub` raised; repo: owner/name. One line, to follow "owner/name: ".
    """
    from huggingface_hub import constants
    from huggingface_hub.errors import (
        GatedRepoError,
        IncompleteSnapshotError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    links = list(chain(error))
    code, said = status(error), server_message(error)

    def any_is(kind: type[BaseException]) -> bool:
        return any(isinstance(link, kind) for link in links)

    if any(isinstance(link, OSError) and link.errno in NO_ROOM for link in links):
        return f"no room left in {constants.HF_HUB_CACHE}, where the Hub's client keeps files"
    partly, never = any_is(IncompleteSnapshotError), any_is(OfflineModeIsEnabled)
    if (partly or never) and constants.is_offline_mode() and not _told_to_stay_offline():
        had = "only a part of it was" if partly else "it was never"
        return f"{had} downloaded, which this command leaves to others, such as `decode plain`"
    if partly:
        why = "HF_HUB_OFFLINE is set" if constants.is_offline_mode() else f"{constants.ENDPOINT} does not answer"
        return f"only a part of it was downloaded, and {why}: the same command with a connection fetches the rest"
    if never:
        return "it was never downloaded, and HF_HUB_OFFLINE is set: unset it to download"
    if any_is(GatedRepoError):
        return f"it is gated: ask for access at {constants.ENDPOINT}/{repo}, then {LOG_IN}"
    if any_is(RevisionNotFoundError):
        return "it has no such revision (branch, tag or commit)"
    if any_is(RepositoryNotFoundError):
        return f"there is no such repository, or it is private: check the name, or {LOG_IN}"
    if code == 401:
        return f"the login is not valid (401): {LOG_IN}, or mend HF_TOKEN where that is set"
    if code == 403:
        return f"the login has no right to it (403{f': {said}' if said else ''}): {LOG_IN} as someone who has"
    if code == 429:
        return f"the Hub limits how often it is asked (429): try again {retry_after(error)}"
    if code is not None and code >= 500:
        return f"the Hub failed ({code}{f': {said}' if said else ''}): try again later"
    if code is not None:
        return f"the Hub refused it ({code}): {said or first_line(links[-1])}"
    if any(type(link).__module__.startswith("httpx") for link in links):
        reason = first_line(links[-1]).rstrip(".")
        return f"the connection to {constants.ENDPOINT} failed ({reason}): the same command tries again"
    return first_line(links[-1])


class NotFound(UserError):
    """A name that is neither here nor to be had from the Hub."""


def fetch_by_name(name: str, option: str, local: str, fetch: Callable[[str, str | None], str]) -> Path:
    """What `fetch(repo, revision)` downloads for a Hub name, `owner/name[@revision]`.

    option, local: for errors: what was given the name, and what there is none of under it here ("folder").
    """
    repo, _, revision = name.partition("@")
    if repo.count("/") != 1 or repo.startswith((".", "/", "~")):
        raise NotFound(f"{option} {name}: no such {local}, and not a Hub name (owner/name)")
    try:
        return Path(fetch(repo, revision or None))
    except Exception as error:  # the client raises errors of several libraries
        raise NotFound(
            f"{option} {name}: no such {local}, and not to be had from the Hub: {explain(error, repo)}"
        ) from error
