"""`distill publish`: a finished draft and its model card, as one commit of a repository on the Hugging Face Hub.

Only files of a fixed list travel. Everything is checked here before the network is asked for anything; on the Hub the
repository changes in one commit at the end, so whoever downloads meanwhile has the old draft or the new one.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from decode.models.checkpoint import CARD, RUNS, find_model
from decode.models.drafts import newest_draft
from decode.models.hub import LOG_IN, chain, explain, server_message, status
from decode.tokenizer import TOKENIZER_FILES
from distill.provenance import LICENCE_KEYS, licence_file, licence_of, linked
from distill.recipe import RECIPE_FILE
from distill.release.card import CURVES, EVALUATION, Metadata, Subject, is_unchanged, model_card
from distill.training.checkpoint import FORMAT, OPTIONAL_FILES, WEIGHTS, check_files
from kernels import UserError
from kernels.errors import first_line
from kernels.files import listed_files, read_json, sha256

DRAFT = "draft.json"
LICENCE, LOG = "LICENSE", "log.jsonl"
RECORD = "published.json"  # names and hashes of what the last publish put there: all else is somebody's
REQUIRED = ("config.json", DRAFT, WEIGHTS, *TOKENIZER_FILES)
FILES = (*REQUIRED, *OPTIONAL_FILES, EVALUATION, RECIPE_FILE, LOG, CURVES, LICENCE)
# What makes a model of a repository, by suffix: of other formats too, for a card of ours would replace that model's.
MODEL_FILES = (".json", ".safetensors", ".jinja", ".gguf", ".bin", ".pt", ".pth", ".ckpt", ".onnx", ".h5", ".npz")


@dataclass(frozen=True)
class Package:
    """What would be uploaded. files: names and paths on this machine; card: the README.md; licence: its metadata."""

    repo: str
    folder: Path
    files: dict[str, Path]
    card: str
    licence: Metadata
    teacher: Metadata

    def sizes(self) -> dict[str, int]:
        """Bytes of each file, the card first."""
        sizes = {name: path.stat().st_size for name, path in self.files.items()}
        return {CARD: len(self.card.encode()), **sizes, RECORD: len(self.record)}

    @cached_property
    def record(self) -> bytes:
        """What the next publish has to know of this one."""
        hashes = {name: sha256(path) for name, path in sorted(self.files.items())}
        return (json.dumps({"files": hashes}, indent=1) + "\n").encode()


@dataclass(frozen=True)
class Published:
    """What came of it. commit: of the repository now; changed: whether there was anything to upload; card_kept: the
    card there is one that somebody wrote or edited, and stays."""

    url: str
    commit: str
    private: bool
    changed: bool
    deleted: list[str]
    card_kept: bool


def draft_to_publish() -> Path:
    """The finished draft under runs/, of whatever teacher, that was written last; UserError where there is none."""
    if (newest := newest_draft(None)) is None:
        raise UserError(f"no finished draft under {RUNS}/; train one, or give --draft")
    return newest


def prepare(
    folder: Path, repo: str, *, licence: str | None = None, base_model: str | None = None, force: bool = False
) -> Package:
    """Check a draft and write its card, without a network.

    licence, base_model: in place of what draft.json knows; force: take a draft whose training was stopped, or whose
    text was not the teacher's, too; its card says so. UserError names the file that is damaged or of another draft.
    """
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    for option, name in (("--repo", repo), ("--base-model", base_model)):
        try:
            if name is not None:
                validate_repo_id(name)
        except HFValidationError as error:
            raise UserError(f"{option} {name}: {error}") from None
        if name is not None and name.count("/") != 1:
            raise UserError(f"{option} {name}: a name on the Hub is owner/name")
    if not folder.is_dir():
        raise UserError(f"--draft {folder}: no such folder")
    about = read_json(folder / DRAFT)
    if about.get("format") != FORMAT:
        raise UserError(f"{folder / DRAFT}: not a draft of bitdraft's (format is {about.get('format')!r})")
    model = find_model(str(folder), "--draft")
    check_files(folder, about)
    if about.get("complete") is not True and not force:
        raise UserError(f"{folder}: its training is not finished; `distill train` goes on, --force publishes it as is")
    files = {name: folder / name for name in FILES if (folder / name).is_file()}
    if missing := [name for name in REQUIRED if name not in files]:
        raise UserError(f"{folder / missing[0]}: missing")
    _check_recipe(folder, about)
    subject = Subject.read(folder, repo)
    _check_evaluation(folder, subject, model.weights_hash, force)
    teacher = subject.get("teacher") or {}
    of_teacher = base_model or hub_name(teacher)
    known = {key: teacher[key] for key in LICENCE_KEYS if isinstance(teacher.get(key), str)} or licence_of(folder)
    terms, text = _reachable({"license": licence} if licence else known, folder, of_teacher)
    if text is not None:
        files[text.name] = text
    _check_links(folder, files, about)
    if LOG in files:
        _check_log(files[LOG], subject)
    subject = replace(subject, licence=terms, base_model=of_teacher)
    try:
        card = model_card(subject)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        named = f"{DRAFT}, {EVALUATION} or log.jsonl"
        raise UserError(f"{folder}: {named} is damaged, no card can be written ({first_line(error)})") from error
    return Package(repo, folder, files, card, terms, teacher)


def _reachable(terms: Metadata, folder: Path, teacher: str | None) -> tuple[Metadata, Path | None]:
    """A licence whose link leads somewhere, or has none, and the file in the folder that it leads to.

    teacher: its name on the Hub, where the file is if it is not here.
    """
    if (text := licence_file(folder, terms)) is not None:
        return terms | {"license_link": text.name}, text
    if teacher:
        terms = linked({"repo": teacher, **terms})
    has_link = bool(urlsplit(str(terms.get("license_link", ""))).scheme)
    return {key: terms[key] for key in LICENCE_KEYS if key in terms and (key != "license_link" or has_link)}, None


def _check_links(folder: Path, files: dict[str, Path], about: Metadata) -> None:
    """What nobody vouches for by its hash is a file of the folder's own, not a link to who knows what."""
    for name in sorted(files.keys() - about.get("files", {}).keys() - {DRAFT}):  # draft.json was read, and is one
        if not files[name].resolve().is_relative_to(folder.resolve()):
            raise UserError(f"{files[name]}: is a link out of its folder; put a copy there, or delete it")


def _check_log(path: Path, subject: Subject) -> None:
    """The log beside a draft reaches the last step of its training: it was not cut short, and is not another's."""
    last = max((line["step"] for line in subject.log if type(line.get("step")) is int), default=0)
    steps = subject.get("training", "steps")
    if isinstance(steps, int) and last != steps:
        raise UserError(f"{path}: ends at step {last}, the training of {DRAFT} at {steps}; put it back, or delete it")


def _check_recipe(folder: Path, about: Metadata) -> None:
    """The recipe beside a draft is the one that made it."""
    path, recipe = folder / RECIPE_FILE, about.get("recipe")
    if path.is_file() and (not isinstance(recipe, dict) or recipe.get("sha256") != sha256(path)):
        raise UserError(
            f"{path}: is not the recipe that draft.json names; `distill run` keeps the right one, or delete it"
        )


def _check_evaluation(folder: Path, subject: Subject, draft: str, force: bool) -> None:
    """The evaluation beside a draft is its own, and found the teacher's text. draft: the hash of its weights."""
    path, found = folder / EVALUATION, subject.evaluation
    if not path.is_file():
        return
    of = found.get("identity")
    if not isinstance(of, dict):
        raise UserError(f"{path}: was not written by `distill evaluate`; move it elsewhere")
    for name, wanted in (("draft", draft), ("teacher", subject.get("teacher", "hash"))):
        if of.get(name) != wanted:
            known = f" than draft.json names ({subject.get('teacher', 'name')})" if name == "teacher" else ""
            raise UserError(
                f"{path}: was measured with another {name}{known}; run `distill evaluate` again, or delete it"
            )
    if found.get("identical") is not True and not force:
        raise UserError(
            f"{path}: its text was not identical to plain decoding, which is a fault; `distill evaluate` again, or"
            " --force publishes it as it is"
        )


def hub_name(teacher: Metadata) -> str | None:
    """The owner/name of a teacher that came from the Hub."""
    name = str(teacher.get("repo") or teacher.get("name") or "").partition("@")[0]
    return name if re.fullmatch(r"[\w.-]+/[\w.-]+", name) else None


def publish(package: Package, *, private: bool | None = None, force: bool = False) -> Published:
    """Upload, in one commit, whatever the repository does not hold yet.

    private: None leaves a repository as it is and makes a new one private; force: also in place of another model, and
    of a card or files that were edited there.
    Interrupted, the same call goes on: what the Hub already has is not sent again. UserError for what stands against
    it, naming the repository.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants, get_token
    from huggingface_hub.errors import RepositoryNotFoundError

    repo = package.repo
    if constants.is_offline_mode():
        raise UserError(
            f"{repo}: publishing needs a connection, and HF_HUB_OFFLINE is set: unset it (--dry-run needs none)"
        )
    if get_token() is None:
        raise UserError(f"{repo}: publishing needs a login: run `hf auth login`, or set HF_TOKEN")
    api = HfApi(library_name="bitdraft")
    try:
        try:
            info = api.model_info(repo)
        except RepositoryNotFoundError:
            api.create_repo(repo, private=private is not False)
            info = api.model_info(repo)
        there = [sibling.rfilename for sibling in info.siblings or []]
        listed = _listed(api, package.repo, there, str(info.sha))
        stale = _stale(api, package, there, str(info.sha), force, listed)
        if not force:
            _check_unchanged(api, package, there, {*package.files, *stale}, str(info.sha), listed)
        card_kept = CARD in there and not force and not _is_ours(api, package, str(info.sha))
        if private and not info.private:  # before anything can be seen
            api.update_repo_settings(repo, private=True)
        commit = api.create_commit(
            repo,
            [
                *([] if card_kept else [CommitOperationAdd(CARD, package.card.encode())]),
                *(CommitOperationAdd(name, path) for name, path in package.files.items()),
                CommitOperationAdd(RECORD, package.record),
                *(CommitOperationDelete(name) for name in stale),
            ],
            commit_message=f"Draft for {package.teacher.get('name')}",
            parent_commit=info.sha,
        )
        if private is False and info.private:
            api.update_repo_settings(repo, private=False)
    except UserError:
        raise
    except Exception as error:  # the client raises errors of several libraries
        raise UserError(f"{repo}: {_refusal(error, repo)}") from error
    now_private = bool(info.private) if private is None else private
    return Published(f"{api.endpoint}/{repo}", commit.oid, now_private, commit.oid != info.sha, stale, card_kept)


def _is_ours(api: Any, package: Package, commit: str) -> bool:
    """Whether the card in the repository is as bitdraft wrote it: this one, or one whose last line has its hash."""
    text = Path(api.hf_hub_download(package.repo, CARD, revision=commit)).read_text(encoding="utf-8", errors="replace")
    return text == package.card or is_unchanged(text)


def _listed(api: Any, repo: str, there: list[str], commit: str) -> dict[str, str]:
    """Names and hashes of what was published to a repository, as far as that is known: before there were records, a
    draft.json listed the draft's files."""
    record = next((name for name in (RECORD, DRAFT) if name in there), None)
    return {} if record is None else listed_files(Path(api.hf_hub_download(repo, record, revision=commit)))


def _check_unchanged(
    api: Any, package: Package, there: list[str], names: set[str], commit: str, listed: dict[str, str]
) -> None:
    """UserError where one of these files in the repository, which would be replaced or deleted, is neither as it was
    published nor what would take its place: somebody changed it, or put it there. Where there is no record, what is
    beside a draft's files is taken to be ours."""
    for entry in api.list_repo_tree(package.repo, revision=commit):
        name = entry.path
        if name not in names or (name not in listed and DRAFT in there and RECORD not in there):
            continue
        lfs = getattr(entry, "lfs", None)
        digest = lfs.sha256 if lfs else sha256(Path(api.hf_hub_download(package.repo, name, revision=commit)))
        ours = package.files.get(name)
        if digest != listed.get(name) and (ours is None or digest != sha256(ours)):
            was = "was changed there since it was published" if name in listed else "was put there by somebody else"
            raise UserError(
                f"{package.repo}: {name} {was}; choose another --repo, or {'replace' if ours else 'delete'} it with"
                " --force"
            )


def _stale(api: Any, package: Package, there: list[str], commit: str, force: bool, listed: dict[str, str]) -> list[str]:
    """Files of the repository that would not fit the new draft; UserError where it holds another model."""
    repo, ours = package.repo, package.teacher
    same, holds = False, ""
    if DRAFT in there:
        try:
            teacher = read_json(Path(api.hf_hub_download(repo, DRAFT, revision=commit))).get("teacher")
        except UserError as error:
            holds = f"a {DRAFT} that is damaged ({str(error).partition(f'{DRAFT}: ')[2]})"
        else:
            theirs = teacher if isinstance(teacher, dict) else {}
            same = theirs.get("hash") == ours.get("hash") is not None
            holds = f"a draft for another teacher ({theirs.get('name')}, not {ours.get('name')})"
            if theirs.get("hash") is None or ours.get("hash") is None:
                holds = "a draft, and one of the two does not say which teacher it is for"
    elif models := [name for name in there if name.lower().endswith(MODEL_FILES)]:
        holds = f"{models[0]} and is no draft of bitdraft's"
    else:
        return []
    if not same and not force:
        raise UserError(f"{repo}: holds {holds}; choose another --repo, or replace it with --force")
    by_hand = {LICENCE} if same and LICENCE not in listed else set()
    kept = {CARD, RECORD, *package.files, *by_hand}
    stale = (name for name in there if name not in kept)
    return [name for name in stale if name in FILES or (not same and name.lower().endswith(MODEL_FILES))]


def _refusal(error: Exception, repo: str) -> str:
    """Why an upload failed, and what to do."""
    code = status(error)
    answers = [answer for link in chain(error) if (answer := getattr(link, "response", None)) is not None]
    asked = str(answers[0].request.url) if answers else ""
    if code == 403:
        said = server_message(error)
        return (
            f"the login has no right to write there (403{f': {said}' if said else ''}): use a token with write access"
            f" ({LOG_IN}), or a --repo of your own"
        )
    if code == 409 and "/repos/create" in asked:
        return "the name is taken by a repository that this login cannot see: choose another --repo"
    if code in (409, 412):
        return "the repository changed meanwhile: run the same command again"
    return explain(error, repo)
