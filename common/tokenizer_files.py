"""The tokenizer's part of a model folder, read: any bytes in it give an answer or a UserError."""

import hashlib
import json
from pathlib import Path
from typing import NamedTuple

from tokenizers import Tokenizer

from common.errors import UserError
from common.template import one_line

NAMES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
         "chat_template.jinja", "generation_config.json")
LARGEST = 2**28  # bytes of a file


class Files(NamedTuple):
    tokenizer: Tokenizer   # with truncation and padding of its own switched off
    template: str | None   # source of the chat template
    template_file: Path    # where it stands, for messages
    special_tokens: dict   # {"bos_token": "<s>", ...} as the template sees them
    stop_ids: set          # ids at which generation ends: generation_config's eos, the tokenizer's
    eos_id: int | None     # appended to plain text
    vocab_size: int        # largest id + 1 (the model may have more rows)
    fingerprint: str       # SHA-256 of all that decides about ids and masks


def read_tokenizer(folder):
    """The `Files` of a folder, whichever of NAMES are there; tokenizer.json must be."""
    folder = Path(folder)
    raw = {name: _read(folder / name) for name in NAMES}
    if raw["tokenizer.json"] is None:
        raise UserError(f"{folder}: no tokenizer.json; a folder with a fast tokenizer is needed "
                        "(a lone tokenizer.model is not read)")
    tokenizer = call(f"{folder / 'tokenizer.json'}: not a tokenizer",
                     Tokenizer.from_buffer, raw["tokenizer.json"])
    tokenizer.no_truncation()  # the file can carry limits and padding of someone's pipeline
    tokenizer.no_padding()
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)

    config = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):  # the second has precedence
        config.update(_json(raw[name], folder / name))
    special_tokens = {}
    for name, token in config.items():
        content = token.get("content") if isinstance(token, dict) else token
        if name.endswith("_token") and isinstance(content, str):
            special_tokens[name] = content
    eos = special_tokens.get("eos_token")
    if eos is not None and eos not in vocabulary:
        raise UserError(f"{folder / 'tokenizer_config.json'}: eos_token {one_line(repr(eos))} is "
                        "not in tokenizer.json")
    eos_id = vocabulary.get(eos)

    template, where = _template(config, raw, folder)
    return Files(tokenizer, template, where, special_tokens, _stop_ids(raw, folder, eos_id), eos_id,
                 vocab_size=max(vocabulary.values(), default=-1) + 1,
                 fingerprint=hashlib.sha256(repr(sorted(raw.items())).encode()).hexdigest())


def _template(config, raw, folder):
    """(source or None, file): chat_template.jinja, else tokenizer_config's text or named list."""
    where = folder / "chat_template.jinja"
    if raw["chat_template.jinja"] is not None:
        return _text(raw["chat_template.jinja"], where), where
    where = folder / "tokenizer_config.json"
    template = config.get("chat_template")
    if isinstance(template, list):
        named = [one.get("template") for one in template
                 if isinstance(one, dict) and one.get("name") == "default"]
        template = named[0] if named else template
    if not (template is None or isinstance(template, str)):
        raise UserError(f"{where}: chat_template must be text, or a list with one named 'default'")
    return template, where


def _stop_ids(raw, folder, eos_id):
    where = folder / "generation_config.json"
    stops = _json(raw["generation_config.json"], where).get("eos_token_id")
    stops = stops if isinstance(stops, list) else [] if stops is None else [stops]
    if not all(type(stop) is int and 0 <= stop < 2**31 for stop in stops):
        raise UserError(f"{where}: eos_token_id must be an id or a list of ids, "
                        f"not {one_line(stops)}")
    return {*stops} if eos_id is None else {*stops, eos_id}


def call(what, function, *arguments, **keywords):
    """Call into the tokenizers library, which reports by Exception and by pyo3's PanicException."""
    try:
        return function(*arguments, **keywords)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        raise UserError(f"{what}: {one_line(error)}") from None


def _read(path):
    try:
        if path.exists() and not path.is_file():  # say, a link to a device
            raise UserError(f"{path}: not a regular file")
        if path.stat().st_size > LARGEST:
            raise UserError(f"{path}: larger than {LARGEST >> 20} MiB; is it the right file?")
        return path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None


def _text(raw, path):
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 (byte {error.start})") from None


def _json(raw, path):
    if raw is None:
        return {}
    try:
        value = json.loads(_text(raw, path))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON ({one_line(error)})") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: a JSON object was expected, not {type(value).__name__}")
    return value
