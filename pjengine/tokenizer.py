"""Tokenizer: between text and token ids, on the Rust `tokenizers` library (importing transformers takes seconds)."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers
import tokenizers.decoders

from pjengine.chat_template import ChatTemplate, Message
from pjengine.errors import InvalidRequest, ModelError
from pjengine.models.gguf_tokenizer import set_template, tokenizer_config_of, tokenizer_of
from pjengine.models.sources import Source
from pjengine.request_checks import check_unicode

_SPECIAL_TOKENS = ("bos_token", "eos_token", "pad_token", "unk_token", "sep_token", "cls_token", "mask_token")


def load_tokenizer(source: Source) -> Tokenizer | None:
    """The tokenizer of a model; None where a directory brings none (then only token ids can be used)."""
    if source.gguf is None and not (source.path / "tokenizer.json").is_file():
        return None
    return Tokenizer.from_source(source)


class Tokenizer:
    """Text to token ids and back, and the model's chat template. Thread-safe.

    Args:
      backend: the vocabulary and its rules.
      config: as tokenizer_config.json: special tokens, chat templates as a list of {"name": …, "template": …}.

    Attributes:
      backend: for libraries that take a `tokenizers.Tokenizer`; not to be changed.
      bos_token_id, eos_token_id, pad_token_id: None where the model has none.
      special_ids: the tokens that `skip_special_tokens` leaves out.
      token_bytes: the bytes of a token id (b"" for an unknown one), in byte-level vocabularies; None in others, where
        they depend on the tokens around.
      chat_template: None where the model has none.
    """

    def __init__(self, backend: tokenizers.Tokenizer, config: Mapping[str, Any]):
        self.backend = backend
        special = {name: text for name in _SPECIAL_TOKENS if (text := _text_of(config.get(name)))}
        self.bos_token_id = self._id_of(special.get("bos_token"))
        self.eos_token_id = self._id_of(special.get("eos_token"))
        self.pad_token_id = self._id_of(special.get("pad_token"))
        self.special_ids = frozenset(i for i, token in backend.get_added_tokens_decoder().items() if token.special)
        byte_level = isinstance(backend.decoder, tokenizers.decoders.ByteLevel)
        self.token_bytes = functools.lru_cache(maxsize=None)(self._token_bytes) if byte_level else None
        templates = {entry["name"]: entry["template"] for entry in config.get("chat_template") or ()}
        self.chat_template = ChatTemplate(templates, special) if templates else None

    @classmethod
    def from_source(cls, source: Source) -> Tokenizer:
        """The model's tokenizer; ModelError where it has none or it cannot be read."""
        if source.gguf is not None:
            return cls(tokenizer_of(source.gguf), tokenizer_config_of(source.gguf))
        return cls.from_directory(source.path)

    @classmethod
    def from_directory(cls, path: Path) -> Tokenizer:
        """The tokenizer of a directory: its tokenizer.json, tokenizer_config.json and chat_template.jinja."""
        file = path / "tokenizer.json"
        if not file.is_file():
            raise ModelError(f"{path}: no tokenizer.json; transformers.AutoTokenizer's save_pretrained makes one")
        try:
            backend = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises bare Exception
            raise ModelError(f"{file}: not a tokenizer that can be read ({error}); fetch it again") from error
        # The file may keep the padding and cutting its author last used.
        backend.no_padding()
        backend.no_truncation()
        config = _json(path / "special_tokens_map.json") | _json(path / "tokenizer_config.json")
        config["chat_template"] = _named_templates(config.get("chat_template"), path)
        if "add_bos_token" in config or "add_eos_token" in config:
            _honour_bos_and_eos(backend, config)
        return cls(backend, config)

    @property
    def vocab_size(self) -> int:
        """Number of token ids, added ones included; a model's own vocab_size may be padded to more."""
        return self.backend.get_vocab_size()

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text; special tokens written in it are recognised.

        Args:
          add_special_tokens: put what the model wants around a text (bos, [CLS] … [SEP], …).
        Raises:
          InvalidRequest: the text is no valid Unicode (a lone surrogate).
        """
        check_unicode(text, "prompt")
        return self.backend.encode(text, add_special_tokens=add_special_tokens).ids

    def encode_batch(
        self,
        texts: Sequence[str],
        add_special_tokens: bool = True,
        max_tokens: int | None = None,
        fields: Sequence[str] | None = None,
    ) -> list[list[int]]:
        """As `encode` for each text, in parallel.

        Args:
          max_tokens: a text of more tokens, special ones included, loses its end; the special tokens stay.
          fields: what the user calls each text, for errors; None: "prompt".
        """
        for i, text in enumerate(texts):
            check_unicode(text, fields[i] if fields else "prompt")
        # A cut goes between a text's own tokens and the special ones. `encode` of one text would hold the GIL.
        special = add_special_tokens and max_tokens is None
        encoded = self.backend.encode_batch_fast(list(texts), add_special_tokens=special)
        if max_tokens is None:
            return [e.ids for e in encoded]
        added = self.backend.num_special_tokens_to_add(is_pair=False) if add_special_tokens else 0
        for encoding in encoded:
            if len(encoding) + added > max_tokens:
                if max_tokens <= added:
                    raise InvalidRequest(
                        f"truncate_prompt_tokens: {max_tokens} leaves no room beside the {added} special tokens; "
                        "ask for more",
                        field="truncate_prompt_tokens",
                    )
                encoding.truncate(max_tokens - added)
        return [self.backend.post_process(e, add_special_tokens=add_special_tokens).ids for e in encoded]

    def encode_pairs(
        self, first: str, seconds: Sequence[str], max_tokens: int | None = None, field: str = "query"
    ) -> list[tuple[list[int], list[int]]]:
        """Token ids and token types of the pair that a text makes with each of others, special tokens included.

        Args:
          max_tokens: longer pairs lose the end of their second text.
          field: what the user calls the first text, for errors.
        Raises:
          InvalidRequest: a text is no valid Unicode, or the first leaves the second no room.
        """
        check_unicode(first, field)
        for text in seconds:
            check_unicode(text, "documents")
        head, *bodies = self.backend.encode_batch([first, *seconds], add_special_tokens=False)
        if max_tokens is not None:
            taken = len(head) + self.backend.num_special_tokens_to_add(True)
            if taken >= max_tokens:
                raise InvalidRequest(
                    f"{field}: {taken} tokens with the special ones, so a pair of {max_tokens} tokens has no room for "
                    "a document; shorten it",
                    field=field,
                    code="context_length_exceeded",
                )
            for body in bodies:
                body.truncate(max_tokens - taken)
        pairs = [self.backend.post_process(head, body) for body in bodies]
        return [(pair.ids, pair.type_ids) for pair in pairs]

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of token ids; bytes that are no UTF-8 become U+FFFD. InvalidRequest for an id that cannot be one."""
        try:
            return self.backend.decode(token_ids, skip_special_tokens=skip_special_tokens)
        except (OverflowError, TypeError) as error:
            raise InvalidRequest(
                f"tokens: expected token ids from 0 to {self.vocab_size - 1} ({error})", field="tokens"
            ) from error

    def apply_chat_template(
        self,
        messages: Sequence[Message],
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **variables: Any,
    ) -> str:
        """The prompt of a conversation (see ChatTemplate.render); encode it with add_special_tokens=False.

        Raises:
          InvalidRequest: the model has no chat template, or it refuses the messages.
        """
        if self.chat_template is None:
            raise InvalidRequest(
                "messages: this model has no chat template; send a prompt as plain text", field="messages"
            )
        return self.chat_template.render(
            messages, add_generation_prompt=add_generation_prompt, tools=tools, **variables
        )

    def _token_bytes(self, token_id: int) -> bytes:
        token = self.backend.id_to_token(token_id) or ""
        alphabet = _byte_of_character()
        if all(character in alphabet for character in token):
            return bytes(alphabet[character] for character in token)
        return token.encode("utf-8")  # an added token

    def _id_of(self, token: str | None) -> int | None:
        return None if token is None else self.backend.token_to_id(token)


@functools.cache
def _byte_of_character() -> dict[str, int]:
    """The byte each character of a byte-level vocabulary stands for (GPT-2's bytes_to_unicode, inverted)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


def _honour_bos_and_eos(backend: tokenizers.Tokenizer, config: Mapping[str, Any]) -> None:
    """What tokenizer_config.json says of bos and eos overrides tokenizer.json, as in transformers."""
    wanted = {name: _text_of(config.get(f"{name}_token")) for name in ("bos", "eos") if config.get(f"add_{name}_token")}
    for name, token in wanted.items():
        if token is None or backend.token_to_id(token) is None:
            raise ModelError(
                f"tokenizer_config.json: add_{name}_token is set, but {name}_token is {token!r}, which is no token"
            )
    set_template(backend, wanted.get("bos"), wanted.get("eos"))


def _text_of(token: Any) -> str | None:
    """Special tokens are written as strings or as {"content": …}."""
    return token.get("content") if isinstance(token, dict) else token


def _named_templates(found: Any, path: Path) -> list[dict[str, str]]:
    """Chat templates by name: of tokenizer_config.json (text or a list of named ones), or of files, which override."""
    try:
        entries = [{"name": "default", "template": found}] if isinstance(found, str) else found or ()
        templates = {entry["name"]: entry["template"] for entry in entries}
    except (TypeError, KeyError) as error:
        raise ModelError(
            f"{path / 'tokenizer_config.json'}: chat_template: expected text or a list of named ones, got {found!r:.80}"
        ) from error
    for file in (path / "chat_template.jinja", *path.glob("additional_chat_templates/*.jinja")):
        if file.is_file():
            templates["default" if file.parent == path else file.stem] = file.read_text("utf-8")
    return [{"name": name, "template": template} for name, template in templates.items()]


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise ModelError(f"{path}: not readable as JSON ({error}); fetch it again") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path}: expected a JSON object, got {type(value).__name__}")
    return value
