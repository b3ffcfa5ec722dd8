"""The tokenizer's part of a model folder: any bytes in it give an answer or a UserError."""

import codecs
import hashlib
import json
from pathlib import Path
from typing import NamedTuple

from tokenizers import AddedToken, Tokenizer

from common.errors import UserError, one_line, writing
from common.files.json_files import read_json

NAMES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
         "chat_template.jinja", "generation_config.json")
LARGEST = 2**28  # bytes of a file
FLAGS = ("content", "single_word", "lstrip", "rstrip", "normalized", "special")  # of a token
STANDARD = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token",
            "mask_token")  # in the order in which transformers adds them


class Files(NamedTuple):
    tokenizer: Tokenizer   # with all added tokens, and truncation and padding switched off
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
                     Tokenizer.from_buffer, raw["tokenizer.json"].removeprefix(codecs.BOM_UTF8))
    tokenizer.no_truncation()  # the file can carry limits and padding of someone's pipeline
    tokenizer.no_padding()

    config, special_tokens = _add_tokens(tokenizer, raw, folder)
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    eos_id = vocabulary.get(special_tokens.get("eos_token"))
    template, where = _template(config, raw, folder)
    return Files(tokenizer, template, where, special_tokens, _stop_ids(raw, folder, eos_id), eos_id,
                 vocab_size=max(vocabulary.values(), default=-1) + 1,
                 fingerprint=hashlib.sha256(repr(sorted(raw.items())).encode()).hexdigest())


def _add_tokens(tokenizer, raw, folder):
    """Add the tokens that tokenizer.json lacks, as transformers does, with the same ids and flags.

    Gives (tokenizer_config.json, {"eos_token": text, ...}). Raises UserError where a new token does
    not get the id that a file states; transformers gives it another without a word.
    """
    files = {name: _json(raw[name], folder / name) for name in
             ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")}
    config, mapped, ids = files.values()
    complete = config.get("added_tokens_decoder") is not None
    where = folder / ("tokenizer_config.json" if complete else "added_tokens.json")
    if complete:
        mapped, ids = {}, {}  # then transformers reads neither
    broken = f"{folder}: its added tokens cannot be read"
    named, extra, stated = call(broken, _declared, config, mapped, ids)

    before = tokenizer.get_vocab(with_added_tokens=True)
    special_tokens = {name: _content(token) for name, token in named.items()}
    eos = special_tokens.get("eos_token")
    if not (eos is None or eos in before or "eos_token" in mapped
            or eos in map(_content, stated.values())):
        raise UserError(f"{folder / 'tokenizer_config.json'}: eos_token {one_line(repr(eos))} is "
                        "not in tokenizer.json")
    call(broken, _add, tokenizer, named, extra, stated, complete)
    for id, token in stated.items():
        new = tokenizer.token_to_id(token.content)
        if token.content not in before and new != id:
            got = "has another token there" if new is None else f"leads to {new}"
            raise UserError(f"{where}: {one_line(repr(token.content))} is said to be token {id}, "
                            f"but tokenizer.json {got}: are they of the same model?")
    return config, special_tokens


def _declared(config, mapped, ids):
    """(named, extra, stated) tokens of tokenizer_config.json, special_tokens_map.json, which has
    precedence over it, and added_tokens.json: {"eos_token": token, ...}, a list, {id: AddedToken}.
    A token is text or an AddedToken. What is not as it should be raises."""
    own = {name: value for name, value in config.items()  # a model's, say image_token
           if isinstance(value, str) and name not in STANDARD}
    values = {**{name: value for name, value in config.items() if name not in own},
              **{name: _token(value, special=True) for name, value in mapped.items()}, **own}
    order = sorted(values, key=lambda name: (*STANDARD, name).index(name))
    named = {name: _token(values[name]) for name in order
             if name.endswith("_token") and isinstance(_content(values[name]), str)}

    extra = config.get("extra_special_tokens") or config.get("additional_special_tokens") or []
    more = mapped.get("extra_special_tokens") or []
    # Of added_tokens.json these are special, as transformers 5 has it, and no others.
    special = {_content(named[name]) for name in STANDARD if name in named and (
        name in mapped or isinstance(config.get(name), str))}
    special |= {token for token in extra if isinstance(token, str)} | {*map(_content, more)}
    stated = {int(id): AddedToken(content, normalized=content not in special,
                                  special=content in special) for content, id in ids.items()}
    stated |= {int(id): _token(token) for id, token in
               (config.get("added_tokens_decoder") or {}).items()}

    if not more and (isinstance(extra, dict) or not (
            config.keys() & {"extra_special_tokens", "additional_special_tokens"})):
        more = mapped.get("additional_special_tokens") or []
    unnamed = []
    for given, flags in ((extra, {}), (more, {"special": True})):
        if isinstance(given, dict):
            named |= {name: _token(value, **flags) for name, value in given.items()}
        elif isinstance(given, list):
            unnamed += [_token(value, **flags) for value in given]
    for tokens, kinds in (((*named.values(), *unnamed), (str, AddedToken)),
                          (stated.values(), AddedToken)):
        for token in tokens:
            if not isinstance(token, kinds):
                raise ValueError(f"{token!r} is not a token")
    return named, unnamed, stated


def _add(tokenizer, named, extra, stated, complete):
    """Add the tokens that `_declared` gives, those that are stated in the order of their ids.

    Some are there already: of those the flags change. Where the files are not `complete`, the
    tokenizer's own are among the stated ones; whatever has a name becomes special.
    """
    own = tokenizer.get_added_tokens_decoder()
    stated = stated if complete else {**stated, **own}
    adding = [stated[id] for id in sorted(stated)]
    have = {token.content for token in (*own.values(), *adding)}
    for token in (*named.values(), *extra):
        if _content(token) not in have and token not in adding:
            adding.append(token)
    adding = [AddedToken(token, special=True) if isinstance(token, str) else token
              for token in adding]
    for token in adding:
        token.special = token.special or token.content in map(_content, named.values())
    tokenizer.add_tokens(adding)


def _content(token):
    """The text of a token: of text, of an AddedToken, or of one as JSON has it."""
    if isinstance(token, dict):
        return token.get("content")
    return token.content if isinstance(token, AddedToken) else token


def _token(value, **flags):
    """What stands in JSON for a token, as an AddedToken if it is an object; all else as it is."""
    if not isinstance(value, dict) or not isinstance(value.get("content"), str):
        return value
    return AddedToken(**{name: value[name] for name in FLAGS if name in value} | flags)


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


def read_template(file):
    """The text of a chat template's file, given apart from the folder (--chat-template)."""
    raw = _read(Path(file))
    if raw is None:
        raise UserError(f"{file}: no such file; --chat-template is a file with a Jinja template, "
                        "which --resume wants again")
    return _text(raw, file)


def _stop_ids(raw, folder, eos_id):
    where = folder / "generation_config.json"
    stops = _json(raw["generation_config.json"], where).get("eos_token_id")
    stops = stops if isinstance(stops, list) else [] if stops is None else [stops]
    if not all(type(stop) is int and 0 <= stop < 2**31 for stop in stops):
        raise UserError(f"{where}: eos_token_id must be an id or a list of ids, "
                        f"not {one_line(stops)}")
    return {*stops} if eos_id is None else {*stops, eos_id}


def complete(folder, template, stop_ids):
    """Write into `folder` a chat template (None: it has its own), and what `stop_ids` its
    generation_config.json lacks: without them other programs would let the model run on."""
    folder = Path(folder)
    if template is not None:
        file = folder / "chat_template.jinja"
        with writing(file):
            file.write_text(template, encoding="utf-8")
    file, settings = folder / "generation_config.json", {}
    if file.exists():
        settings = read_json(file)
    elif (folder / "config.json").exists():  # what transformers would take in its absence
        config = read_json(folder / "config.json")
        settings = {name: config[name] for name in (
            "bos_token_id", "eos_token_id", "pad_token_id") if config.get(name) is not None}
    stops = settings.get("eos_token_id")
    stops = stops if isinstance(stops, list) else [] if stops is None else [stops]
    missing = sorted(stop_ids.difference(stops))
    if missing:
        settings["eos_token_id"] = [*stops, *missing]
        with writing(file):
            file.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n",
                            encoding="utf-8")


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
        return raw.decode("utf-8-sig")
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
