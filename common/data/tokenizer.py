"""The tokenizer files of a model folder; whatever they contain, an error is a UserError."""

import codecs
import hashlib
import os
from pathlib import Path

from tokenizers import AddedToken, Tokenizer

from common.errors import UserError, one_line
from common.files.json_files import read_bytes, read_json

SETTINGS = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
            "generation_config.json")
LARGEST = 2**28  # bytes of a file
FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")  # of a token


def read_tokenizer(folder, template=None):
    """A folder's tokenizer files as a dict; the file `template` is used for chat_template.jinja."""
    folder = Path(folder)
    files = {name: folder / name for name in ("tokenizer.json", "chat_template.jinja", *SETTINGS)}
    if template is not None:
        files["chat_template.jinja"] = Path(template)
        if not os.path.exists(template):
            raise UserError(f"{template}: no such file; --chat-template is a file with a Jinja "
                            "template, which --resume wants again")
    raw = {name: read_bytes(file, LARGEST) for name, file in files.items() if file.exists()}
    if "tokenizer.json" not in raw:
        raise UserError(f"{folder}: no tokenizer.json; a folder with a fast tokenizer is needed "
                        "(a lone tokenizer.model is not read)")
    tokenizer = call(f"{folder / 'tokenizer.json'}: not a tokenizer",
                     Tokenizer.from_buffer, raw["tokenizer.json"].removeprefix(codecs.BOM_UTF8))
    tokenizer.no_truncation()  # the file may carry the limits and padding of someone's pipeline
    tokenizer.no_padding()

    config, mapped, ids, generation = (read_json(folder / name) if name in raw else {}
                                       for name in SETTINGS)
    special_tokens = call(f"{folder}: its added tokens cannot be read", _name_tokens, tokenizer,
                          config, mapped, ids, folder)
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    eos_id = vocabulary.get(special_tokens.get("eos_token"))
    stops = as_list(generation.get("eos_token_id"))
    if not all(type(stop) is int and 0 <= stop < 2**31 for stop in stops):
        raise UserError(f"{folder / 'generation_config.json'}: eos_token_id must be an id or a "
                        f"list of ids, not {one_line(stops)}")
    template, where = config.get("chat_template"), folder / "tokenizer_config.json"
    if "chat_template.jinja" in raw:
        where = files["chat_template.jinja"]
        template = call(f"{where}: not UTF-8", raw["chat_template.jinja"].decode, "utf-8-sig")
    elif isinstance(template, list):
        template = next((one.get("template") for one in template if isinstance(one, dict)
                         and one.get("name") == "default"), template)
    if not (template is None or isinstance(template, str)):
        raise UserError(f"{where}: chat_template must be text, or a list with one named 'default'")
    return {
        "tokenizer": tokenizer,  # with all added tokens, and truncation and padding switched off
        "template": template,  # source of the chat template, or None
        "template_file": where,  # where it stands, for messages
        "special_tokens": special_tokens,  # {"bos_token": "<s>", ...} as the template sees them
        "stop_ids": {*stops, eos_id} - {None},  # generation ends at them
        "eos_id": eos_id,  # appended to plain text; None: nothing is
        "vocab_size": max(vocabulary.values(), default=-1) + 1,  # the model may have more rows
        "fingerprint": hashlib.sha256(repr(sorted(raw.items())).encode()).hexdigest()}


def _name_tokens(tokenizer, config, mapped, ids, folder):
    """Give the tokens of tokenizer.json the flags that they have in transformers, where those with
    a name are special; gives {"eos_token": text, ...}. tokenizer_config.json's added_tokens_decoder
    wins over tokenizer.json, and stands alone; without it special_tokens_map.json wins over
    tokenizer_config.json. UserError if tokenizer.json lacks one: transformers would add it."""
    decoder = config.get("added_tokens_decoder")
    if decoder is not None:
        mapped, ids = {}, {}
    named = {name: _token(value) for name, value in (config | mapped).items()
             if name.endswith("_token") and isinstance(value, (str, dict))}
    extra = []
    for settings in (config, mapped):
        for key in ("extra_special_tokens", "additional_special_tokens"):
            tokens = settings.get(key) or []
            if isinstance(tokens, dict):
                named |= {name: _token(value) for name, value in tokens.items()}
            else:
                extra += map(_token, tokens)
    names = {token.content for token in named.values()}
    tokens = {token.content: token for token in (  # the last of the same text counts
        *map(AddedToken, ids), *extra, *named.values(),
        *tokenizer.get_added_tokens_decoder().values(),
        *(_token(dict(token)) for token in (decoder or {}).values()))}
    lacking = sorted(tokens.keys() - tokenizer.get_vocab().keys())
    if lacking:
        raise UserError(f"{folder}: tokenizer.json lacks {one_line(lacking)} of added_tokens.json, "
                        "special_tokens_map.json or tokenizer_config.json; save it anew with "
                        "transformers: AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR)")
    for token in tokens.values():
        token.special = token.special or token.content in names
    tokenizer.add_tokens([*tokens.values()])
    return {name: token.content for name, token in named.items()}


def _token(value):
    """An AddedToken from JSON: its text, or an object with its flags."""
    if isinstance(value, str):
        return AddedToken(value, special=True)
    return AddedToken(value["content"], **{flag: value[flag] for flag in FLAGS if flag in value})


def as_list(ids):
    """generation_config.json's eos_token_id, an id, a list of them or null, as a list."""
    return ids if isinstance(ids, list) else [] if ids is None else [ids]


def call(what, function, *arguments, **keywords):
    """Call the tokenizers library, which raises Exception or pyo3's PanicException."""
    try:
        return function(*arguments, **keywords)
    except (KeyboardInterrupt, SystemExit, UserError):
        raise
    except BaseException as error:
        raise UserError(f"{what}: {one_line(error)}") from None
