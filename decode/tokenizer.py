"""A model folder's tokenizer and chat template, at the engine's door."""

from __future__ import annotations

import hashlib
import json
import random
import re
import shutil
import tempfile
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from datetime import datetime
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any

from decode.prompts import Message, Prompt, called_functions, text_of
from kernels.errors import UserError, first_line
from kernels.files import BOM, begins_with_bom, json_hash, read_json

# Put before a chat template that asks for the time: transformers' own function looks at the clock at each call.
STRFTIME_NOW = """\
{%- macro strftime_now(format) -%}
{%- set at = namespace(text=format) -%}
{%- for directive, value in template_time.items() -%}{%- set at.text = at.text | replace(directive, value) -%}
{%- endfor -%}{{ at.text }}
{%- endmacro %}
"""
DIRECTIVES = [f"%{dash}{letter}" for letter in "aAwdbBmyYHIlkpMSfzZjUWcxXFTDReGuVhCsP" for dash in ("", "-")]
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")
MORE_FILES = ("special_tokens_map.json", "added_tokens.json")  # which a folder may have beside them
TOLD = ("system", "developer", "user", "tool")  # whose words a template keeps: of an assistant's, thoughts may go
UNUSED = ("version", "truncation", "padding")  # in a tokenizer.json: each call says what it wants of them
LINE_END = re.compile("\r\n|\r")
PLACE = "bitdraft-holds-this-place"  # stands for a text that is still to be written
# Shows how text is normalised, split and begun: words, numbers, white space, other scripts, what may be special tokens.
PROBE = "It's a probe:  1,234.5 naïve ﬁles,\tdon't\r\n\n def f_2(x): «Äpfel» два 東京 \u0301🙂 </s> <s> HTTPServer "


@contextmanager
def _same_draws() -> Iterator[None]:
    """What Jinja's `random` and `lipsum` draw is the same each time: a prompt is one text."""
    before = random.getstate()
    random.seed(0)
    try:
        yield
    finally:
        random.setstate(before)


class Tokenizer:
    """A model folder's tokenizer and chat template, through mlx-lm."""

    def __init__(self, folder: Path, template_time: str | None = None) -> None:
        """template_time: the time that a chat template which asks for it is told, as the property of that name has it;
        that of this call by default."""
        from huggingface_hub.errors import StrictDataclassError
        from mlx_lm.utils import load_tokenizer
        from transformers.utils import logging

        if not folder.is_dir():  # mlx-lm would look for it on the Hub
            raise UserError(f"{folder}: is not there, or not any more")
        logging.set_verbosity_error()  # it warns of prompts beyond the context, which we refuse
        declared = _declared_ends(folder)  # first: mlx-lm reads these files too, without a check
        try:
            with _readable(folder) as readable:
                self._wrapped = load_tokenizer(readable)
        except UserError:
            raise
        except StrictDataclassError as error:  # transformers reads the model's config too, and checks its types
            raise UserError(f"{folder / 'config.json'}: {first_line(error)}") from error
        except Exception as error:  # several libraries read the files; `tokenizers` raises Exception itself
            _check_files(folder)
            raise UserError(f"{folder}: the tokenizer cannot be loaded: {first_line(error)}") from error
        template = self._template
        if isinstance(template, str) and not template.strip():
            own = folder / "chat_template.jinja"  # goes before the one in the other file
            raise UserError(f"{own if own.exists() else folder / TOKENIZER_FILES[1]}: its chat template is empty")
        self.folder = folder
        self._time = (
            datetime.now().replace(microsecond=0) if template_time is None else datetime.fromisoformat(template_time)
        )
        config = folder / "config.json"
        self._vocab_size = read_json(config).get("vocab_size") if config.exists() else None
        ends = set(self._wrapped.eos_token_ids) | declared
        # BitNet-2B's config names 128001 only, while its chat turns end with <|eot_id|>.
        vocab = self._wrapped.get_vocab()
        ends |= {vocab[token] for token in ("<|eot_id|>", "<|im_end|>") if token in vocab}
        self.end_tokens = frozenset(int(token) for token in ends if self._known(int(token)))

    @cached_property
    def _template(self) -> Any:
        """The chat template, of several by name the one that forms prompts; None where there is none."""
        template = self._wrapped.chat_template if self._wrapped.has_chat_template else None
        return template.get("default", template) if isinstance(template, dict) else template

    @property
    def template_hash(self) -> str | None:
        """sha256 of the chat template, without what a file of its own may add: how it writes line ends, and one at its
        end, which Jinja leaves out. None where there is no template."""
        text = LINE_END.sub("\n", str(self._template)).removesuffix("\n")
        return None if self._template is None else hashlib.sha256(text.encode()).hexdigest()

    @cached_property
    def spelling_hash(self) -> str:
        """sha256 of what decides, beside the table of tokens and the chat template, how text becomes tokens: the ids of
        a probe, and the special tokens that a template may name. Tools that save a tokenizer again write both
        otherwise, with what concerns only them."""
        ids = self._wrapped.encode(PROBE), self._wrapped.encode(PROBE, add_special_tokens=False)
        return json_hash([ids, self._wrapped.special_tokens_map])

    @cached_property
    def rules_hash(self) -> str:
        """sha256 of all else by which text becomes tokens and tokens text, as it was loaded, whatever its files leave
        out: normaliser, pre-tokeniser, post-processor, decoder, the model's options and the added tokens' flags."""
        rules = json.loads(self._wrapped.backend_tokenizer.to_str())
        model = {name: value for name, value in rules["model"].items() if name not in ("vocab", "merges")}
        return json_hash({name: value for name, value in rules.items() if name not in UNUSED} | {"model": model})

    @property
    def template_time(self) -> str | None:
        """The local time that the chat template is told, to the second; None where it asks for none."""
        return self._time.isoformat() if "strftime_now" in str(self._template) else None

    def encode_prompt(self, prompt: Prompt, *, raw: bool = False) -> list[int]:
        """Token ids of a prompt through the chat template, or of its bare text with `raw`."""
        if raw or not self._wrapped.has_chat_template:
            if any(map(called_functions, prompt.messages)):
                raise UserError(f"{prompt.place}: calls tools, which only a chat template can write")
            return self.encode_text("\n".join(map(text_of, prompt.messages)))
        return self._checked(self._encode(self._apply_template(prompt.messages, prompt.place)))

    def encode_text(self, text: str) -> list[int]:
        """Token ids of a text as it is, behind the BOS token where the tokenizer puts one; a text that begins with it
        does not get it twice. An end token that the tokenizer puts behind every text is left out: prompts, and parts of
        a text that was cut, go on."""
        ids, before = self._encode(text), self._put_before
        return self._checked(ids if ids[: len(before)] == before else before + ids)

    def encode_turns(self, turns: list[str], where: str = "a conversation") -> list[list[int]]:
        """What stands before each reply to a user's turns that are answered one after the other: the prompt of the
        first; for each other what the template puts behind the end token of a reply, up to where the next begins."""
        messages: list[Message] = [{"role": "user", "content": turns[0]}]
        chunks = [self.encode_prompt(Prompt(messages, "", where=where))]
        for turn in turns[1:]:
            messages += [{"role": "assistant", "content": PLACE}, {"role": "user", "content": turn}]
            ids = self._encode(self._text_of(messages, where).rpartition(PLACE)[2])
            chunks.append(self._checked(ids[self._ended(ids) :]))
        return chunks

    @cached_property
    def open_turn(self) -> tuple[list[int], list[int]]:
        """What stands before a user's first turn, and what between the end token of that and the reply. UserError where
        no chat template says so."""
        before, place, behind = self._text_of([{"role": "user", "content": PLACE}], str(self.folder)).partition(PLACE)
        ids = self._encode(behind)
        ended = self._ended(ids)
        if not (self._wrapped.has_chat_template and place and ended):
            raise UserError(f"{self.folder}: has no chat template that ends a user's turn with an end token")
        # A space there belongs to the first word: " Hello" is one token.
        return self._checked(self._encode(before.rstrip(" "))), ids[ended:]

    def _text_of(self, messages: list[Message], where: str) -> str:
        """Messages as the text of a prompt."""
        if not self._wrapped.has_chat_template:
            return "\n".join(map(text_of, messages))
        return self._apply_template(messages, where)

    def _ended(self, ids: list[int]) -> int:
        """How many tokens end a turn at the beginning of these: an end token and white space before it; else 0."""
        at = next((i for i, token in enumerate(ids) if token in self.end_tokens), None)
        return 0 if at is None or self.decode(ids[:at]).strip() else at + 1

    def encode_conversation(
        self, messages: list[Message], where: str = "a conversation"
    ) -> tuple[list[int], list[range]]:
        """Ids of a conversation up to the end token of its last message, a reply, and where the assistant's turns are
        in it, end tokens included. where: its place, for messages.

        Without a chat template, and where that writes an earlier turn otherwise than as a reply to what is before it,
        only the later ones are told. A token in which a turn begins, and what is before it ends, is not of the turn.
        """
        ids, start = self._encode_to_reply(messages, where)
        turns = [range(start, len(ids))]
        earlier = [i for i, message in enumerate(messages[:-1]) if message["role"] == "assistant"]
        if not earlier or not self._wrapped.has_chat_template:
            return ids, turns
        text = self._text_of(messages[:-1], where)
        encoded = self._backend.encode(text, add_special_tokens=False)
        if encoded.ids != ids[:start]:
            return ids, turns
        for i in reversed(earlier):
            try:
                before = self._text_of(messages[:i], where)
                whole = self._apply_template(messages[: i + 1], where, add_generation_prompt=False)
            except UserError:
                break
            if not (text.startswith(before) and text.startswith(whole)):
                break
            first = bisect_left(encoded.offsets, (len(before), 0))
            reply = range(first, max(first, bisect_left(encoded.offsets, (len(whole), 0))))
            end = next((at + 1 for at in reply if ids[at] in self.end_tokens), reply.stop)
            turns.insert(0, range(reply.start, end))
        return ids, turns

    def _encode_to_reply(self, messages: list[Message], where: str) -> tuple[list[int], int]:
        """Ids of a conversation up to the end token of its last message, and where that begins."""
        prompt = self.encode_prompt(Prompt(messages[:-1], "", where=where))
        whole: list[int] = []
        if self._wrapped.has_chat_template:
            whole = self._encode(self._apply_template(messages, where, add_generation_prompt=False))
        if whole[: len(prompt)] != prompt:  # no template, or one that writes a reply otherwise than it asks for it
            if called_functions(messages[-1]):
                raise UserError(
                    f"{where}: ends with calls of tools, which the chat template writes otherwise than text"
                )
            reply = self._encode(text_of(messages[-1]))
            whole = prompt + reply + self._reply_end
        reply_ids = range(len(prompt), len(whole))
        end = next((i + 1 for i in reply_ids if whole[i] in self.end_tokens), len(whole))
        return self._checked(whole[:end]), len(prompt)

    @cached_property
    def _backend(self) -> Any:
        """The tokenizer proper: a reply pass asks it thousands of times a second, and what transformers does around it
        takes longer."""
        self._wrapped.encode("")  # sets it up as the tokenizer's options say, without the truncation of its file
        return self._wrapped.backend_tokenizer

    def _encode(self, text: str) -> list[int]:
        """Token ids of a text that has all its special tokens."""
        ids: list[int] = self._backend.encode(text, add_special_tokens=False).ids
        return ids

    @cached_property
    def _put_before(self) -> list[int]:
        """What the tokenizer puts before every text: its BOS token, or nothing."""
        encoded = self._backend.encode(PROBE)
        return list(encoded.ids[: encoded.special_tokens_mask.index(0)])

    @property
    def _reply_end(self) -> list[int]:
        """The end token of a reply that no template ends: the tokenizer's own, else the lowest, if there is any."""
        own = self._wrapped.eos_token_id
        return [own] if own in self.end_tokens else sorted(self.end_tokens)[:1]

    def _apply_template(self, messages: list[Message], where: str, *, add_generation_prompt: bool = True) -> str:
        """What the chat template makes of messages. UserError where it refuses them, or leaves out or garbles a
        part."""
        try:
            if any(isinstance(message["content"], list) for message in messages) and not self._reads_parts:
                raise ValueError("it does not read content in parts; give it as one string")
            names = [name for message in messages for name in called_functions(message)]
            told = [(message["role"], text_of(message)) for message in messages if message["role"] in TOLD]
            text = self._templated(messages, add_generation_prompt)
            if missing := [name for name in names if name not in text]:
                raise ValueError(f"it leaves out calls of tools ({missing[0]})")
            if deaf := next((role for role, said in told if not _says(text, said)), None):
                raise ValueError(f"it leaves out what the {deaf} says")
            return text
        except Exception as error:  # it is a program of the checkpoint's: roles that do not take turns, or any mistake
            raise UserError(f"{where}: the chat template refuses it: {first_line(error)}") from error

    @cached_property
    def _reads_parts(self) -> bool:
        """Whether the chat template writes content in parts as it writes the same content in one string: others fail,
        or print the list as Python would."""
        try:
            whole, parts = (
                self._templated([{"role": "user", "content": content}], add_generation_prompt=False)
                for content in ("Hi", [{"type": "text", "text": "Hi"}])
            )
        except Exception:  # as above
            return False
        return bool(whole == parts)

    def _templated(self, messages: list[Message], add_generation_prompt: bool) -> str:
        """What mlx-lm's `apply_chat_template` gives, with the time of this tokenizer."""
        options: dict[str, Any] = {}
        if self.template_time is not None:
            options["chat_template"] = STRFTIME_NOW + self._wrapped.get_chat_template()
            options["template_time"] = {directive: self._time.strftime(directive) for directive in DIRECTIVES}
        with _same_draws() if self._draws else nullcontext():
            text = self._wrapped.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=add_generation_prompt, **options
            )
        return str(text)

    @cached_property
    def _draws(self) -> bool:
        """Whether the chat template may draw by chance."""
        return any(name in str(self._template) for name in ("random", "lipsum"))

    def _known(self, token: int) -> bool:
        """Whether the model has this token: tokenizers may have more, added after the model was trained."""
        return self._vocab_size is None or 0 <= token < self._vocab_size

    def _checked(self, ids: list[int]) -> list[int]:
        if not self._known(max(ids, default=0)):
            token = next(token for token in ids if not self._known(token))
            text = self._wrapped.convert_ids_to_tokens(token)
            raise UserError(
                f"{self.folder}: its tokenizer makes token {token} ({text!r}) of a text, and its model has a"
                f" vocabulary of {self._vocab_size}"
            )
        return ids

    def decode(self, tokens: list[int]) -> str:
        """The text of a reply; end tokens, special ones or not, and other special tokens are left out."""
        said = [token for token in tokens if token not in self.end_tokens]
        # Cleaning up would move spaces that a streamer has printed already.
        text: str = self._backend.decode(said, skip_special_tokens=True)
        return self._decode_bytes(said) if "\ufffd" in text and self._bytes else text

    @cached_property
    def _bytes(self) -> dict[int, int]:
        """The bytes that tokens stand for one by one, by the tokens' ids, where the tokenizer puts them together."""
        together = "ByteFallback" in repr(self._backend.decoder)
        ids = {byte: self._backend.token_to_id(f"<0x{byte:02X}>") for byte in range(256)} if together else {}
        return {token: byte for byte, token in ids.items() if token is not None}

    def _decode_bytes(self, tokens: list[int]) -> str:
        """The text of tokens with bytes among them that make no character: each of these is one U+FFFD. The tokenizer
        itself would give up every byte that stands beside them, also those of characters that were printed already."""
        special = {token for token, added in self._backend.get_added_tokens_decoder().items() if added.special}
        pieces: list[str] = []
        for is_byte, group in groupby((t for t in tokens if t not in special), key=self._bytes.__contains__):
            if not is_byte:
                pieces += filter(None, map(self._backend.id_to_token, group))
                continue
            for character in bytes(self._bytes[token] for token in group).decode(errors="surrogateescape"):
                wrong = "\udc80" <= character <= "\udcff"
                pieces += ["\ufffd"] if wrong else [f"<0x{byte:02X}>" for byte in character.encode()]
        text: str = self._backend.decoder.decode(pieces)
        return text

    def is_blank(self, tokens: list[int]) -> bool:
        """Whether the text of a reply is nothing but white space. Its first tokens mostly show that it is not; they may
        end within a character, of which nothing is known yet."""
        beginning = self.decode(tokens[:8]).replace("\ufffd", "")
        return not beginning.strip() and not self.decode(tokens).strip()

    def streamer(self, printed: Sequence[int] = ()) -> Streamer:
        """printed: tokens of a text that is gone on with, so that a space at the border is kept."""
        return Streamer(self, printed)


def _says(text: str, said: str) -> bool:
    """Whether a text has the lines of another, one after the other, whatever white space is between them; or all of it
    as a string of JSON, as templates write what a tool says."""
    if json.dumps(said, ensure_ascii=False) in text:
        return True
    at = 0
    for line in map(str.strip, said.splitlines()):
        if (at := text.find(line, at)) < 0:
            return False
        at += len(line)
    return True


def _declared_ends(folder: Path) -> set[int]:
    """The end tokens that config.json and generation_config.json name: either may know one that the other does not."""
    ends: set[int] = set()
    for path in (folder / "config.json", folder / "generation_config.json"):
        declared = read_json(path).get("eos_token_id") if path.exists() else None
        named = declared if isinstance(declared, list) else [] if declared is None else [declared]
        if any(type(token) is not int for token in named):
            raise UserError(f"{path}: eos_token_id is {declared!r}, not a token's id or a list of them")
        ends.update(named)
    return ends


def _check_files(folder: Path) -> None:
    """Say which of a tokenizer's files is no JSON object or no text, where one is not."""
    for name in (*TOKENIZER_FILES, *MORE_FILES):
        if (path := folder / name).exists():
            read_json(path)
    for path in (*folder.glob("*.jinja"), *folder.glob("additional_chat_templates/*.jinja")):
        try:
            path.read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise UserError(f"{path}: cannot be read: {first_line(error)}") from error


@contextmanager
def _readable(folder: Path) -> Iterator[Path]:
    """A tokenizer's folder, or a copy of it while there is code named in it, which transformers would ask to run, or a
    file that it would not read."""
    files = [file for file in (*folder.glob("*.json"), *folder.glob("*.jinja")) if file.is_file()]
    if not asks_for_code(folder / "tokenizer_config.json") and not any(map(begins_with_bom, files)):
        yield folder
        return
    with tempfile.TemporaryDirectory() as name:
        for file in files:
            if not file.name.endswith(".index.json"):
                copy_tokenizer_file(file, Path(name) / file.name)
        yield Path(name)


class Streamer:
    """Turns tokens into text as they come, never printing half a character."""

    def __init__(self, tokenizer: Tokenizer, printed: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._window = list(printed)  # the tokens that are decoded again as others come
        self._printed = tokenizer.decode(self._window)  # as much of their text as was printed
        self._restart()

    def push(self, tokens: Iterable[int]) -> str:
        """The new text these tokens complete, however many come at a time."""
        return "".join(map(self._push, tokens))

    def finish(self) -> str:
        """What is left, half a character too."""
        return self._print(self._tokenizer.decode(self._window))

    def _push(self, token: int) -> str:
        self._window.append(token)
        text = self._tokenizer.decode(self._window)
        return "" if text.endswith("\ufffd") else self._print(text)

    def _print(self, text: str) -> str:
        """What of the window's text is new."""
        new, self._printed = text[len(self._printed) :], text
        # Restart the window at line ends, so a long reply is not decoded again and again.
        if text.endswith("\n") and len(text) > 256:
            self._restart()
        return new

    def _restart(self) -> None:
        """Keep of the window only its last whole text: what begins a text may lose a space in decoding (Llama 2), so
        something that was printed stays before what comes."""
        for start in range(len(self._window) - 1, 0, -1):
            text = self._tokenizer.decode(self._window[start:])
            if text and "\ufffd" not in text:
                self._window, self._printed = self._window[start:], text
                return


def check_tokenizer(teacher_folder: Path) -> None:
    """UserError where a teacher lacks the files that its draft needs: better before hours of work than after."""
    for name in TOKENIZER_FILES:
        if not (teacher_folder / name).is_file():
            raise UserError(f"{teacher_folder / name}: not there, and a draft needs its teacher's tokenizer")


def asks_for_code(tokenizer_config: Path) -> bool:
    """Whether a tokenizer_config.json names Python code of the checkpoint's own, which is never run."""
    return tokenizer_config.is_file() and "auto_map" in read_json(tokenizer_config)


def copy_tokenizer_file(source: Path, target: Path) -> None:
    """Copy one of a tokenizer's files, without a byte order mark; a tokenizer_config.json without the code it names."""
    if source.name == "tokenizer_config.json" and asks_for_code(source):
        content = {key: value for key, value in read_json(source).items() if key != "auto_map"}
        target.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    elif begins_with_bom(source):
        target.write_bytes(source.read_bytes().removeprefix(BOM))
    else:
        shutil.copyfile(source, target)
