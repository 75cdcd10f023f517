"""The model card of a draft: what is in its folder, put into words. Nothing is asked of the network."""

from __future__ import annotations

import hashlib
import json
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from decode.models.checkpoint import DEFAULT_TEACHER
from distill.data.settings import CollectSettings
from distill.recipe import RECIPE_FILE
from distill.training.draft_config import DraftConfig
from distill.training.settings import TrainSettings
from kernels import UserError
from kernels.files import read_json, read_json_lines

EVALUATION = "evaluation.json"
CURVES = "curves.png"
Metadata = dict[str, Any]

# What a card takes from draft.json, outer parts first; each may be absent.
PARTS: dict[str, type] = {
    "teacher": dict,
    "training": dict,
    "training.settings": dict,
    "training.started_from": dict,
    "training.init": dict,
    "training.data": dict,
    "training.data.settings": dict,
    "training.data.settings.sources": list,
    "training.data.settings.exclude": list,
    "vocabulary": dict,
    "made_with": dict,
    "made_with.versions": dict,
}


@dataclass(frozen=True)
class Subject:
    """A draft that a card is about.

    repo: owner/name it goes to; about: draft.json; config, description: config.json, parsed and as it is;
    evaluation: what `distill evaluate` found, {} if it was not run; log: the lines of log.jsonl; recipe: the text of
    its recipe, empty if it was made by single commands; licence: `license` and, for one that is not standard,
    `license_name` and `license_link`; base_model: the teacher's name on the Hub.
    """

    repo: str
    about: Metadata
    config: DraftConfig
    description: Metadata
    evaluation: Metadata
    log: list[Metadata]
    curves: bool
    recipe: str
    licence: Metadata = field(default_factory=dict)
    base_model: str | None = None

    @classmethod
    def read(cls, folder: Path, repo: str) -> Subject:
        """UserError naming the file that is damaged, and which part of it."""
        description, about = read_json(folder / "config.json"), read_json(folder / "draft.json")
        _check_parts(about, folder / "draft.json")
        try:
            config = DraftConfig.from_json(description)
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"{folder / 'config.json'}: not a draft's ({error})") from error
        log = read_json_lines(folder / "log.jsonl") if (folder / "log.jsonl").is_file() else []
        for line in log:
            if not isinstance(line, dict):
                raise UserError(f"{folder / 'log.jsonl'}: is damaged (holds {line!r}, not an object)")
        try:
            recipe = (folder / RECIPE_FILE).read_text(encoding="utf-8-sig") if (folder / RECIPE_FILE).is_file() else ""
        except UnicodeDecodeError as error:
            raise UserError(f"{folder / RECIPE_FILE}: is not valid UTF-8 (byte {error.start})") from error
        evaluation = read_json(folder / EVALUATION) if (folder / EVALUATION).is_file() else {}
        return cls(repo, about, config, description, evaluation, log, (folder / CURVES).is_file(), recipe)

    def get(self, *path: str) -> Any:
        """A value inside draft.json, None where it is not there."""
        value: Any = self.about
        for key in path:
            value = value.get(key) if isinstance(value, dict) else None
        return value

    @property
    def embedded(self) -> bool:
        """Whether its teacher is the one that bitdraft uses when none is named."""
        return self.base_model is None and self.get("teacher", "name") == DEFAULT_TEACHER.name

    @property
    def teacher(self) -> str:
        """What to give as `--teacher`."""
        name = _cell(self.get("teacher", "name") or "teacher")
        return self.base_model or f"{'checkpoints' if self.embedded else 'path/to'}/{name}"

    @property
    def started_from(self) -> str | None:
        """The teacher that `distill train` was given, where the data were another's."""
        return self.get("training", "started_from", "repo") or self.get("training", "started_from", "name")

    @property
    def option(self) -> list[str]:
        return [] if self.embedded else ["--teacher", self.teacher]

    @property
    def bits(self) -> int | None:
        quantization = self.description.get("quantization")
        return quantization.get("bits") if isinstance(quantization, dict) else None


def _check_parts(about: Metadata, path: Path) -> None:
    """Refuse a draft.json whose parts are of other kinds than those that `distill train` writes."""
    for name, kind in PARTS.items():
        value: Any = about
        for key in name.split("."):
            value = value.get(key) if value is not None else None
        if value is not None and not isinstance(value, kind):
            raise UserError(f"{path}: is damaged ({name} is {value!r})")


def model_card(subject: Subject) -> str:
    """The README.md of a published draft: YAML front matter and Markdown."""
    parts = [_front_matter(subject), _opening(subject), _use(subject), _acceptance(subject), _training(subject)]
    parts += [_data(subject), _again(subject), _origin(subject), _licence(subject)]
    return _marked("\n\n".join(part for part in parts if part) + "\n")


def _marked(text: str) -> str:
    """A card with a line that nobody sees, by which `is_unchanged` knows it."""
    digest = hashlib.sha256(text.encode()).hexdigest()
    return f"{text}\n<!-- written by bitdraft, which replaces this card unless it is edited: {digest} -->\n"


def is_unchanged(card: str) -> bool:
    """Whether a card is one of bitdraft's that nobody has edited."""
    text, _, _ = card.replace("\r\n", "\n").rpartition("\n<!-- ")
    return bool(text) and _marked(text) == card.replace("\r\n", "\n")


def _front_matter(subject: Subject) -> str:
    values: Metadata = dict(subject.licence)
    if subject.base_model:
        # Of the Hub's four relations (adapter, merge, quantized, finetune) the only one that is not plainly wrong.
        values |= {"base_model": subject.base_model, "base_model_relation": "finetune"}
    # The Hub shows how to load what a library is named for.
    values["library_name"] = "mlx" if subject.config.is_stock else "bitdraft"
    values["pipeline_tag"] = "text-generation"
    values["tags"] = ["bitdraft", "draft-model", "speculative-decoding", "knowledge-distillation", "bitnet"]
    # JSON values are YAML too, and quote whatever needs it.
    return "\n".join(["---", *(f"{key}: {json.dumps(value)}" for key, value in values.items()), "---"])


def _opening(subject: Subject) -> str:
    c, name = subject.config, _cell(subject.get("teacher", "name") or "an unnamed teacher")
    teacher = f"[{subject.base_model}](https://huggingface.co/{subject.base_model})" if subject.base_model else name
    trimmed = "" if c.draft_vocab_size is None else f", of which its head proposes {c.draft_vocab_size:,}"
    stored = f"{subject.bits} bits" if subject.bits else "bfloat16"
    if c.ternary:
        stored = f"BitNet's ternary weights{'' if c.taps else f', the embedding in {stored}'}"
    kind = "decoder" if c.taps else "BitNet" if c.ternary else "Llama"
    text = (
        f"# {subject.repo.split('/')[-1]}\n\n"
        f"A draft model for {teacher}: it proposes tokens, the teacher verifies them in one pass, and the text is"
        f" the teacher's own. {c.layers} {kind} layer{'s' if c.layers > 1 else ''}, hidden {c.hidden},"
        f" {c.parameters / 1e6:.2f} M parameters in {stored}, the teacher's vocabulary of {c.vocab_size:,}{trimmed}."
    )
    if c.taps:
        layers = ", ".join(map(str, c.taps))
        text += (
            f" It reads what the teacher thinks: the hidden states that leave its layers {layers} (from 0; after"
            " EAGLE-3, arXiv:2503.01840). Embedding and head are the teacher's, and not in this repository."
        )
    text += " Made with bitdraft."
    if subject.about.get("complete") is not True:
        text += "\n\n**Its training was stopped before its end.**"
    return text


def _use(subject: Subject) -> str:
    repo = subject.repo
    command = shlex.join(["decode", "spec", *subject.option, "--draft", repo, "--compare"])
    text = "## Use\n\nWith bitdraft, whose greedy output is the teacher's token for token:\n\n" + _code(command, "sh")
    if not subject.config.is_stock:
        why = "it reads its teacher's hidden states" if subject.config.taps else "its head is trimmed"
        return text + f"\n\nmlx-lm and transformers cannot load it: {why}, and they know no such model."
    text += "\n\nWith mlx-lm, on a Mac:\n\n" + _code(
        f"mlx_lm.generate --model {shlex.quote(subject.teacher)} --draft-model {repo} --num-draft-tokens 3 \\\n"
        "    --prompt 'Why is the sky blue?'",
        "sh",
    )
    if subject.config.ternary:
        return text
    if subject.bits:
        return text + f"\n\ntransformers cannot load it: its weights are in MLX's {subject.bits}-bit format."
    return (
        text
        + "\n\nWith transformers, PyTorch and accelerate, as the assistant of its teacher:\n\n"
        + _code(assisted_generation(subject.teacher, repo), "python")
    )


def assisted_generation(teacher: str, draft: str) -> str:
    """A program for transformers, complete. All is float32: BitNets mix float types, and PyTorch does not."""
    return f"""import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

def load(name):
    return torch.nn.Module.float(AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32))

teacher, draft = load({json.dumps(teacher)}), load({json.dumps(draft)})
tokenizer = AutoTokenizer.from_pretrained({json.dumps(teacher)})
question = [{{"role": "user", "content": "Why is the sky blue?"}}]
prompt = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
output = teacher.generate(**prompt, assistant_model=draft, do_sample=False, max_new_tokens=64)
print(tokenizer.decode(output[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True))"""


def _acceptance(subject: Subject) -> str:
    found = subject.evaluation
    if not found:
        return "## Acceptance\n\nNot evaluated."
    outputs = [entry for entry in found.get("outputs") or [] if isinstance(entry, dict)]
    same = sum(entry.get("identical") is True for entry in outputs)
    rows = [
        ("prompts", _number(found.get("prompts"))),
        ("their file", _cell(found.get("prompts_file"))),
        ("of each category, at most", _number(found.get("limit"))),
        ("new tokens a prompt, at most", _number(found.get("max_tokens"))),
        ("the teacher's head", _cell(found.get("head"))),
        ("outputs identical to plain decoding", f"{same} of {len(outputs)}" if outputs else ""),
        ("tokens drafted a round (k)", _cell(found.get("k"))),
        ("acceptance rate (accepted / drafted)", _rate(found, "acceptance_rate", 3)),
        ("tokens a verification", _rate(found, "mean_acceptance_length", 2)),
        ("accepted, by position", _positions(found)),
        ("speculative, tok/s", _number(found.get("tok_per_s"), 1)),
        ("plain, tok/s, same engine and run", _number(found.get("baseline_tok_per_s"), 1)),
        ("speed-up", _number(found.get("speedup"))),
        ("a verification, in plain steps", _number(found.get("verify_ratio"))),
        ("replies that end in a loop (they flatter acceptance)", _number(found.get("looping"))),
        ("device", _cell(found.get("device"))),
        ("backend", _cell(found.get("backend"))),
        ("date", _cell(found.get("date"))),
    ]
    stopped = "" if found.get("complete", True) else ", stopped before its last prompt"
    text = "## Acceptance\n\n" + _table((f"measured by `distill evaluate`{stopped}", ""), rows)
    categories = found.get("categories")
    if isinstance(categories, list) and categories:
        head = ("category", "prompts", "acceptance rate", "tokens a verification", "by position", "speed-up", "loops")
        lines = [
            (
                _cell(one.get("category")),
                _number(one.get("prompts")),
                _rate(one, "acceptance_rate", 3),
                _rate(one, "mean_acceptance_length", 2),
                _positions(one),
                _number(one.get("speedup")),
                _number(one.get("looping")),
            )
            for one in categories
            if isinstance(one, dict)
        ]
        text += "\n\n" + _table(head, lines, sparse=True)
    return text


def _training(subject: Subject) -> str:
    rows = [(_cell(key), _cell(value)) for key, value in (subject.get("training", "settings") or {}).items()]
    vocabulary = subject.get("vocabulary") or {}
    results = [
        ("gone on from", _begun_from(subject)),
        ("steps", _number(subject.get("training", "steps"))),
        ("tokens trained on", _number(subject.get("training", "tokens"))),
        ("rows a step", _number(subject.get("training", "batch"))),
        ("best step, whose weights these are", _number(subject.get("training", "best_step"))),
        ("held-out loss, nats a token", _number(subject.get("training", "held_out_loss"), 3)),
        ("agreement with the teacher's first choice", _number(subject.get("training", "agreement"), 3)),
        ("agreement, by step on its own states", _shares(subject.get("training", "agreement_by_step"))),
        ("tokens a verification, held-out prompts", _number(subject.get("training", "tokens_per_verification"))),
        ("expected acceptance, sum of min(p, q)", _number(subject.get("training", "expected_acceptance"), 3)),
        ("share of the targets that the head keeps", _number(vocabulary.get("coverage"), 4)),
        ("device", _cell(subject.get("made_with", "device"))),
        ("tok/s, median", _number(_median([x["tok_per_s"] for x in subject.log if "tok_per_s" in x]), 0)),
    ]
    sampled = subject.get("training", "data", "settings", "sampled")
    learnt = "the teacher's top logits" if sampled is None else "ids drawn from the teacher's distribution"
    text = f"## Training\n\nKnowledge distillation from {learnt}, by bitdraft's `distill train`."
    text += "\n\n" + _table(("result", ""), results)
    evals = [line for line in subject.log if line.get("kind") == "eval"]
    if len(evals) > 1:
        shown = evals if len(evals) <= 6 else [evals[i * (len(evals) - 1) // 5] for i in range(6)]
        lines = [
            (
                _number(line.get("step")),
                _number(line.get("tokens")),
                _number(line.get("held_out_loss"), 3),
                _number(line.get("agreement"), 3),
                _number(line.get("expected_acceptance"), 3),
            )
            for line in shown
        ]
        text += "\n\n" + _table(("step", "tokens", "held-out loss", "agreement", "expected acceptance"), lines, True)
    if subject.curves:
        text += f"\n\n![Loss, agreement and learning rate over the tokens trained on]({CURVES})"
    return text + ("\n\n" + _table(("setting", ""), rows) if rows else "")


def _data(subject: Subject) -> str:
    if isinstance(parts := subject.get("training", "data", "datasets"), list):
        hashes = [(_number(x.get("tokens")) + _whether_whole(x), _hash(x.get("sha256"))) for x in parts
                  if isinstance(x, dict)]  # fmt: skip
        return "## Data\n\n" + _table(("tokens of a dataset", "sha256 of its manifest"), hashes)
    settings = subject.get("training", "data", "settings") or {}
    rows = [
        ("tokens", _number(subject.get("training", "data", "tokens")) + _unfinished(subject)),
        ("sha256 of the dataset's manifest", _hash(subject.get("training", "data", "sha256"))),
        ("logits kept a token", _number(settings.get("k"))),
        ("ids drawn a token", _number(settings.get("sampled"))),
        ("tokens a row", _number(settings.get("seq_len"))),
    ]
    if (reply := settings.get("reply")) is not None:
        temperatures = ", ".join(f"{t:g}" for t in settings.get("reply_temperatures") or [])
        rows.append(("prompts", f"answered by the teacher, at temperature {temperatures}" if reply else "not answered"))
    if (told := settings.get("template_time")) is not None:
        rows.append(("time that the chat template was told", _cell(told)))
    text = "## Data\n\n" + _table(("", ""), rows)
    for title, key in (("source", "sources"), ("held out: no prompt of", "exclude")):
        entries = [entry for entry in settings.get(key) or [] if isinstance(entry, dict)]
        lines = [(_cell(x.get("name")), _cell(x.get("kind")), _hash(x.get("sha256"))) for x in entries]
        if lines:
            text += "\n\n" + _table((title, "kind", "sha256"), lines)
    return text


def _begun_from(subject: Subject) -> str:
    """The draft that training went on from."""
    name, digest = (_cell(subject.get("training", "init", key)) for key in ("name", "sha256"))
    if not digest:
        return ""
    unfinished = subject.get("training", "init", "complete") is False
    return f"{name or 'a draft'}{', whose training was not finished' if unfinished else ''}, sha256 {digest[:12]}"


def _unfinished(subject: Subject) -> str:
    """What to add to the tokens of a dataset that was not complete."""
    return _whether_whole(subject.get("training", "data") or {})


def _whether_whole(data: Metadata) -> str:
    """The same of what draft.json says of a dataset."""
    if data.get("complete") is not False:
        return ""
    settings = data.get("settings")
    asked = _number(settings.get("tokens")) if isinstance(settings, dict) else ""
    return f"{f' of {asked}' if asked else ''}: its collection was not finished"


def _again(subject: Subject) -> str:
    """The recipe, or the commands that make the same draft, as far as draft.json knows their options."""
    if subject.recipe:
        text = f"## Making it again\n\n`distill run {RECIPE_FILE}`, with the recipe that made it:\n\n"
        return text + _code(subject.recipe.strip(), "toml")
    data, training = subject.get("training", "data", "settings"), subject.get("training", "settings")
    if not (isinstance(data, dict) and isinstance(training, dict) and data.get("sources")):
        return ""
    files = {key: [str(entry.get("name")) for entry in data.get(key) or []] for key in ("sources", "exclude")}
    collected = {**data, "top_k": data.get("k"), **files}
    collect = ["distill", "collect", *subject.option, *CollectSettings.command_line(collected)]
    start = subject.started_from
    teacher = ["--teacher", start] if start else subject.option
    start_from = subject.get("training", "init", "name")
    init = ["--init", str(start_from)] if start_from else []
    train = ["distill", "train", *teacher, "--data", "runs/data", *init, *TrainSettings.command_line(training)]
    text = "## Making it again\n\nSources are named without their folders; their hashes are above."
    if _unfinished(subject):
        text += " These collect the whole dataset, of which this draft saw a part."
    text += "\n\n"
    return text + _code("\n".join((_wrapped([*collect, "--out", "runs/data"]), _wrapped(train))), "sh")


def _origin(subject: Subject) -> str:
    versions = subject.get("made_with", "versions") or {}
    rows = [
        ("teacher", _cell(subject.get("teacher", "name"))),
        ("its revision on the Hub", _hash(subject.get("teacher", "revision"))),
        ("sha256 over its weights", _hash(subject.get("teacher", "hash"))),
        ("that of the weights they were converted from", _hash(subject.get("teacher", "converted_from"))),
        ("given to `distill train` in its place, for its embedding", _cell(subject.started_from)),
        ("sha256 over the weights of that", _hash(subject.get("training", "started_from", "hash"))),
        ("sha256 of its tokenizer", _hash(subject.get("tokenizer_hash"))),
        ("bitdraft's commit", _hash(subject.get("made_with", "commit"))),
        *((_cell(name), _cell(version)) for name, version in versions.items()),
    ]
    logged = ", `log.jsonl` every step" if subject.log else ""
    text = f"`draft.json` holds every setting and the sha256 of each file{logged}."
    return "## Where it comes from\n\n" + _table(("", ""), rows) + "\n\n" + text


def _licence(subject: Subject) -> str:
    name = subject.licence.get("license_name") or subject.licence.get("license")
    if name is None:
        return "## Licence\n\nNot stated. A draft is derived from its teacher, whose licence applies to it."
    link = subject.licence.get("license_link")
    return f"## Licence\n\n{f'[{_cell(name)}]({link})' if link else _cell(name)}. A draft is derived from its teacher."


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]], sparse: bool = False) -> str:
    """Markdown; rows of two without a value are left out, sparse ones keep their empty cells."""
    shown = [row for row in rows if sparse or row[-1]]
    lines = [head, ("---",) * len(head), *shown]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _code(text: str, language: str) -> str:
    return f"```{language}\n{text}\n```"


def _wrapped(words: list[str], width: int = 96) -> str:
    """A shell command over as many lines as it needs."""
    lines, line = [], shlex.quote(words[0])
    for word in map(shlex.quote, words[1:]):
        if len(line) + len(word) >= width and word.startswith("-"):
            lines.append(line + " \\")
            line = "   "
        line += f" {word}"
    return "\n".join([*lines, line])


def _cell(value: Any) -> str:
    """Text that stays in its table cell and is no markup; empty for None."""
    text = "" if value is None else " ".join(str(value).split())
    return text.replace("&", "&amp;").replace("<", "&lt;").replace("|", "\\|")


def _hash(value: Any) -> str:
    return f"`{_cell(value)}`" if value else ""


def _number(value: Any, digits: int = 2) -> str:
    """Whole numbers as they are, others rounded; empty for what is no number."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return ""
    return f"{value:,}" if isinstance(value, int) else f"{value:,.{digits}f}"


def _rate(found: Metadata, name: str, digits: int) -> str:
    """A figure of acceptance: none where nothing was drafted; empty where the evaluation does not have it."""
    return "none" if found.get(name, ...) is None else _number(found.get(name), digits)


def _positions(found: Metadata) -> str:
    return _shares(found.get("acceptance_per_position"))


def _shares(values: Any) -> str:
    return " ".join(map(_number, values)) if isinstance(values, list) else ""


def _median(values: list[float]) -> float | None:
    return sorted(values)[len(values) // 2] if values else None
