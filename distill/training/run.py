"""`distill train`: a dataset of teacher logits in, a draft model out.

While it runs, the output folder holds `log.jsonl`, `curves.png` and `state/`; the draft itself
appears at the end or when interrupted, all its files at once. What else lies there stays. Running
the same command again goes on from `state/`, and ends with the same weights as a run that was
never stopped; once it is finished, the same command says what came out.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlx.core as mx

from decode.metal import limit_memory
from decode.models.checkpoint import RUNS, Checkpoint, has_tokenizer, tokenizer_hash
from decode.tokenizer import Tokenizer, check_tokenizer
from distill.data.joined import Datasets
from distill.data.ranks import Ranks
from distill.data.shards import Dataset
from distill.provenance import (
    FORMS_PROMPTS,
    completed,
    origin,
    teacher_files,
)
from distill.training.assembly import LoadedTeacher, make_step
from distill.training.checkpoint import Draft, check_draft_folder, check_files, load, start_hash
from distill.training.draft_config import DraftConfig
from distill.training.live import Live, held_out_prompts
from distill.training.loader import DataLoader
from distill.training.loop import MEASURED, Progress, Run, Summary
from distill.training.losses import check_draws
from distill.training.memory import check_memory, disk_bytes
from distill.training.parallel import Shared
from distill.training.settings import TrainSettings, check_layers
from distill.training.state import CURVES, LOG, STATE, State, check_shown, difference, discard, of_finished
from distill.training.vocabulary import as_draft_vocabulary, select_draft_vocabulary
from kernels.backends import use_fast_blas
from kernels.console import say
from kernels.errors import UserError
from kernels.files import (
    read_json,
    read_json_lines,
    stored_bytes,
    working_in,
)
from kernels.memory import memory_bytes


def train(
    data: Path | Sequence[Path],
    teacher_folder: Path,
    out: Path,
    settings: TrainSettings,
    progress: Progress | None = None,
    quiet: bool = False,
    init: Path | None = None,
    ranks: Ranks | None = None,
    cache_features: bool = False,
) -> Summary:
    """Train a draft for a teacher on a dataset, or several, and save it in `out`; where it is there already, say what
    it is.

    init: a draft to go on from, which keeps its shape and its draft vocabulary; ranks: those that compute gradients
    too; cache_features: keep what a reader reads of its teacher, as far as a third of the memory holds it; progress:
    called with every line that also goes to log.jsonl; quiet: no bar on standard error.
    Raises UserError for unusable input, KeyboardInterrupt when interrupted: what was learned so
    far is then saved as a draft, and the same command continues.
    """
    folders = [Path(data)] if isinstance(data, str | Path) else [Path(folder) for folder in data]
    teacher_folder, out = Path(teacher_folder), Path(out)
    dataset = Datasets.open(folders)
    described = read_json(teacher_folder / "config.json")
    first = None if init is None else load(init)
    settings = (settings if first is None else settings.like(first.config)).for_teacher(described)
    settings.check(dataset.settings.vocab_size)
    check_draws(settings.loss, dataset.settings.sampled)
    check_tokenizer(teacher_folder)
    other = other_teacher(dataset, teacher_folder)
    files = teacher_files(Tokenizer(teacher_folder))
    fingerprint = settings.record() | {"data": dataset.sha256, "teacher_files": files}
    if init is not None and first is not None:
        check_start(first, init, out, dataset.settings.teacher_hash, teacher_folder)
        fingerprint["init"] = start_hash(init)
    if other is not None:
        fingerprint["teacher"] = other["hash"]
    for part in dataset.parts:
        _check_template(part, teacher_folder, files)
    if (summary := finished_run(out, fingerprint)) is not None:
        return summary
    tell = say(quiet)
    _tell_of_data(dataset, other, teacher_folder, tell)
    if first is not None and first.provenance.get("complete") is False:
        tell(f"--init {init}: its training is not finished")
    if mx.default_device() == mx.Device(mx.cpu):
        use_fast_blas()
    limit_memory()
    vocabulary = None
    if first is not None and first.d2t is not None:
        vocabulary = as_draft_vocabulary(dataset, first.d2t)
    elif settings.vocab is not None:
        vocabulary = select_draft_vocabulary(dataset, settings.vocab, teacher_folder)
    if first is None:
        config = settings.shape(teacher_folder, None if vocabulary is None else len(vocabulary.d2t))
    else:
        config = first.config
    _check_teacher(config, dataset, described, teacher_folder, read=other is None)
    loader = DataLoader(
        dataset, settings.temperature, settings.batch, settings.seed, settings.eval_share, settings.eval_rows
    )
    if loader.batch < settings.batch:
        tell(f"{dataset.folder}: has {loader.rows} rows to train on, so --batch {settings.batch} is {loader.batch}")
    check_room(settings, config, teacher_folder, loader.batch, dataset.settings.seq_len, decodes=other is None)
    with working_on_draft(out, config):
        if (summary := finished_run(out, fingerprint)) is not None:  # a kill had kept it from its place
            return summary
        state = State.open(out / STATE, fingerprint)
        d2t = None if vocabulary is None else vocabulary.d2t
        decodes = other is None and settings.live_prompts > 0
        loaded = LoadedTeacher.load(teacher_folder) if decodes or config.taps else None
        live = None
        if decodes and loaded is not None:
            prompts = held_out_prompts(loader.held_out_batches(), settings.live_prompts, loaded.model.context)
            ends = Tokenizer(teacher_folder).end_tokens
            live = Live(loaded.model, loaded.head, prompts, ends, config, settings.bits, d2t)
        first_batch = next(loader.batches(0)) if config.taps else None
        room = memory_bytes() // 3 if cache_features else 0
        step = make_step(settings, config, teacher_folder, loaded, d2t, first_batch, room)
        shared = Shared(ranks, settings, config, d2t) if ranks is not None and ranks.connections else None
        run = Run(
            loader, teacher_folder, other, out, settings, config, step, shared, live, state, vocabulary, progress, quiet
        )
        if init is not None and first is not None:
            unfinished = first.provenance.get("complete") is False
            run.init = {"name": init.resolve().name} | ({"complete": False} if unfinished else {})
        return run.go(None if first is None else first.weights)


def _tell_of_data(
    dataset: Datasets, other: dict[str, Any] | None, teacher_folder: Path, tell: Callable[[str], None]
) -> None:
    """Say what is unusual in a dataset. other: as `other_teacher` returns it."""
    if other is not None:
        name = dataset.settings.teacher_name
        tell(
            f"{dataset.folder}: was collected from {name}, not from {teacher_folder}, which has the same tokenizer: the"
            f" draft learns to agree with {name}, and is kept as a draft for it"
        )
    for part in dataset.parts:
        if not part.complete:
            asked = f" of {part.settings.values['tokens']:,}" if "tokens" in part.settings.values else ""
            tell(f"{part.folder}: is not complete: trained on the {part.tokens:,}{asked} tokens that are there")


def _check_teacher(config: DraftConfig, dataset: Datasets, teacher: dict[str, Any], folder: Path, read: bool) -> None:
    """UserError where a teacher does not have the tokens of a dataset, or not what a draft is to read of it.

    teacher: its config.json; read: the dataset says what this teacher says.
    """
    check_layers(config.taps, int(teacher["num_hidden_layers"]), str(folder))
    if config.taps and not read:
        raise UserError(
            f"{dataset.folder}: was collected from {dataset.settings.teacher_name}, not from {folder}; a draft that"
            " reads its teacher is trained on what that one says"
        )
    if config.vocab_size != dataset.settings.vocab_size:
        raise UserError(
            f"{dataset.folder}: has a vocabulary of {dataset.settings.vocab_size},"
            f" {folder / 'config.json'} one of {config.vocab_size}"
        )


def check_start(first: Draft, folder: Path, out: Path, teacher_hash: str, teacher: Path) -> None:
    """UserError where a draft cannot be gone on from: it would be overwritten, its tokens are not the teacher's, or it
    reads another one. folder: the draft's; out: that of the new one."""
    if folder.resolve() == out.resolve():
        raise UserError(f"--init {folder}: is the folder of the new draft too, which takes its place; give another")
    if tokenizer_hash(folder) != tokenizer_hash(teacher):
        raise UserError(f"--init {folder}: its tokenizer is not that of {teacher}")
    made_for = first.provenance.get("teacher")
    if first.config.taps and not isinstance(made_for, dict):
        raise UserError(f"--init {folder}: has no draft.json that says which teacher's states it reads")
    if first.config.taps and isinstance(made_for, dict) and made_for.get("hash") != teacher_hash:
        raise UserError(f"--init {folder}: reads the states of {made_for.get('name')}, not of {teacher}")


def check_room(
    settings: TrainSettings, config: DraftConfig, teacher: Path, batch: int, seq_len: int, decodes: bool = True
) -> None:
    """UserError where memory does not hold the training of a draft, and beside it the teacher where that runs too.

    teacher: its folder; decodes: it is the one that the dataset is of.
    """
    hidden = int(read_json(teacher / "config.json")["hidden_size"]) if settings.teacher_embedding or config.taps else 0
    runs = bool(config.taps) or (decodes and settings.live_prompts > 0)
    beside = sum(path.stat().st_size for path in teacher.glob("model*.safetensors")) if runs else 0
    check_memory(config, batch, seq_len, hidden, settings.dtype, settings.unroll, beside)


@contextmanager
def working_on_draft(out: Path, config: DraftConfig) -> Iterator[None]:
    """Hold the folder of a draft that is to be trained, after all that can be found wrong with it before the work."""
    with working_in(out, room=disk_bytes(config) - stored_bytes(out / STATE)):
        check_draft_folder(out)
        check_shown(out)
        yield


def default_folder(
    settings: TrainSettings, data: Sequence[Path], teacher: str, teacher_hash: str, init: Path | None = None
) -> Path:
    """Where a draft goes that was given no folder: the same command finds it again. teacher: its name."""
    named = ", ".join(str(folder.resolve()) for folder in [*data, *([] if init is None else [init])])
    name = repr((sorted(settings.naming().items()), named, teacher_hash))
    digest = hashlib.sha256(name.encode()).hexdigest()[:8]
    return RUNS / f"draft-{Path(teacher).name}-{settings.layers}x{settings.hidden}-{digest}"


def other_teacher(dataset: Dataset | Datasets, teacher_folder: Path) -> dict[str, Any] | None:
    """What is known of a teacher that the dataset was not collected from; None where it was.

    Refuses one with another tokenizer: the dataset's token ids are not its own.
    """
    if not has_tokenizer(teacher_folder, dataset.settings.tokenizer_hash):
        raise UserError(
            f"{dataset.folder}: was collected from {dataset.settings.teacher_name}, whose tokenizer"
            f" is not that of {teacher_folder}"
        )
    teacher = Checkpoint(teacher_folder, teacher_folder.resolve().name, {})
    if teacher.weights_hash == dataset.settings.teacher_hash:
        return None
    return {"name": teacher.name, "hash": teacher.weights_hash} | origin(teacher_folder)


def _check_template(dataset: Dataset, teacher_folder: Path, files: dict[str, str]) -> None:
    """Refuse a teacher that writes prompts in another way than those of the dataset: its draft gets its template."""
    recorded = dataset.settings.values.get("teacher_files")
    collected = completed(recorded, files) if recorded else {}
    for name in FORMS_PROMPTS if collected else ():
        if collected.get(name) != files.get(name):
            raise UserError(f"{dataset.folder}: was collected with another {name} than that of {teacher_folder}")


def finished_run(out: Path, fingerprint: dict[str, Any]) -> Summary | None:
    """What an earlier run with the same settings, data and teacher has finished in a folder; None if nothing is.

    UserError where the finished draft there is another's, or damaged.
    """
    path = out / "draft.json"
    about = read_json(path) if path.is_file() else {}
    if not about.get("complete"):
        return None
    try:
        training = about["training"]
        begun = of_finished(training) | {"data": training["data"]["sha256"]}
        if "started_from" in training:
            begun["teacher"] = training["started_from"]["hash"]
        parameters = DraftConfig.from_record(about["config"]).parameters
        figures = {name: training[name] for name in ("steps", "tokens", "best_step", *MEASURED)}
    except (KeyError, TypeError):
        raise UserError(f"{out}: holds a finished draft of another make; give another --out or delete it") from None
    if text := difference(begun, fingerprint):
        raise UserError(f"{out}: holds a finished draft that was trained with {text}; give another --out or delete it")
    check_files(out, about)
    discard(out / STATE)
    log = out / LOG
    lines = read_json_lines(log) if log.is_file() else []
    evals = [line for line in lines if isinstance(line, dict) and line.get("kind") == "eval"]
    best = [line for line in evals if line.get("step") == figures["best_step"]]
    return Summary(
        out=out,
        parameters=parameters,
        batch=training.get("batch", training["settings"].get("batch")),  # an older version kept what was asked for
        seconds=0.0,
        tok_per_s=0.0,
        held_out_loss_float=best[-1].get("held_out_loss") if best else None,
        vocabulary=about.get("vocabulary"),
        tokens_per_verification=training.get("tokens_per_verification"),
        log=log,
        plot=out / CURVES,
        done_before=True,
        **figures,
    )
