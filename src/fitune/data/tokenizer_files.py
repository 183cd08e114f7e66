"""The files of a model folder that make up its tokenizer, read and put together.

`tokenizer.json` is the tokenizer; `tokenizer_config.json` and the others name its special tokens, may add tokens and
carry the chat template. What transformers would do with them is done here with the tokenizers library alone, so that
`fitune data` needs neither torch nor transformers.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import tokenizers

from fitune.data import chatglm, ice_text
from fitune.data.sentencepiece_model import read_model, tokenizer_json
from fitune.errors import ConfigError, MissingDependencyError
from fitune.plan.chatglm import Blank, is_original, is_version_1

MODEL_FILES = ("generation_config.json", "config.json")
FILES = (
    "tokenizer.json",
    "tokenizer.model",
    ice_text.FILE,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    *MODEL_FILES,
)
# Of slower tokenizers; nothing here reads them, other programs may.
OTHER_FILES = ("added_tokens.json", "vocab.json", "merges.txt")
NAMES = ("bos_token", "eos_token", "pad_token", "unk_token", "sep_token", "cls_token", "mask_token")


@dataclass(frozen=True, slots=True)
class TokenizerFiles:
    """What a folder says about its tokenizer, nothing interpreted yet.

    Attributes:
        contents: file name -> bytes; of an original ChatGLM2 or 3 folder those that it is converted to.
        note: what of the folder is not used, for people.
    """

    folder: Path
    contents: Mapping[str, bytes]
    note: str | None = None

    @classmethod
    def read(cls, folder: Path) -> TokenizerFiles:
        """Read all of FILES that are there.

        Raises:
            ConfigError: the folder has no tokenizer, or a file cannot be read.
        """
        if not folder.is_dir():
            raise ConfigError(f"{folder}: no such folder; a tokenizer is loaded from a model's folder")
        try:
            contents = {name: (folder / name).read_bytes() for name in FILES if (folder / name).is_file()}
        except OSError as error:
            raise ConfigError(f"{error.filename}: cannot be read: {error.strerror}") from error
        found = cls(folder, contents)
        config = found.json("config.json")
        if is_original(config) and not is_version_1(config):
            return found._converted()
        if is_original(config) and ice_text.FILE not in contents:  # transformers would ask whether to run code
            raise ConfigError(
                f"{folder}: has no {ice_text.FILE}, with which ChatGLM-6B is published; download it again"
            )
        if not contents.keys() & {"tokenizer.json", "tokenizer.model", ice_text.FILE}:
            raise ConfigError(f"{folder}: has no tokenizer; expected tokenizer.json (or tokenizer.model)")
        return found

    def _converted(self) -> TokenizerFiles:
        config, published = self.json("config.json"), self.json("tokenizer_config.json")
        contents = chatglm.converted_files(self.folder, config, published, self.contents.get("tokenizer.model"))
        return TokenizerFiles(self.folder, contents, chatglm.TEMPLATE_NOTE if published.get("chat_template") else None)

    def with_tokens(self, texts: Sequence[str]) -> TokenizerFiles:
        """The same tokenizer in which each of these texts is one token, with ids after all others.

        Raises:
            ConfigError: one of them is a token already, or nothing to it, or the tokenizer takes no more.
        """
        if not texts:
            return self
        backend = self.backend()
        if isinstance(backend, ice_text.IceText):
            raise ConfigError(f"method.new_tokens: the tokenizer of {self.folder} takes no more tokens")
        known = [text for text in texts if backend.token_to_id(text) is not None]
        if known:
            raise ConfigError(
                f"method.new_tokens: {known[0]!r:.60} is a token of {self.folder} already (id "
                f"{backend.token_to_id(known[0])}); leave it out"
            )
        lost = [text for text in texts if not backend.encode(text, add_special_tokens=False).ids]
        if lost:
            raise ConfigError(
                f"method.new_tokens: the tokenizer of {self.folder} drops {lost[0]!r:.60} from a text, so there are no "
                "tokens whose rows its row could start as; leave it out"
            )
        added = [tokenizers.AddedToken(text, special=False, normalized=False) for text in texts]
        backend.add_tokens(added)
        contents = {**self.contents, "tokenizer.json": backend.to_str().encode("utf-8")}
        config = self.json("tokenizer_config.json")
        decoder = config.get("added_tokens_decoder")
        if isinstance(decoder, dict):
            flags = dict.fromkeys(("lstrip", "rstrip", "single_word", "normalized", "special"), False)
            entries = {str(backend.token_to_id(text)): {"content": text, **flags} for text in texts}
            config = {**config, "added_tokens_decoder": {**decoder, **entries}}
            contents["tokenizer_config.json"] = json.dumps(config, indent=2, ensure_ascii=False).encode("utf-8")
        return TokenizerFiles(self.folder, contents, self.note)

    def save(self, target: Path) -> None:
        """Write what makes up the tokenizer into another model folder; the model's own configuration stays out."""
        for name, content in self.contents.items():
            if name not in MODEL_FILES:
                (target / name).write_bytes(content)
        for name in OTHER_FILES:
            if (self.folder / name).is_file():
                shutil.copyfile(self.folder / name, target / name)

    def json(self, name: str) -> dict[str, object]:
        """One file as an object; empty if it is not there."""
        if name not in self.contents:
            return {}
        try:
            value = json.loads(self.contents[name].decode("utf-8"))
        except ValueError as error:
            raise ConfigError(f"{self.folder / name}: is not JSON: {error}") from error
        if not isinstance(value, dict):
            raise ConfigError(f"{self.folder / name}: must hold an object")
        return value

    def hash(self) -> str:
        """A sha256 over names and contents; of the model's configuration only the token ids count."""
        digest = hashlib.sha256()
        for name, content in sorted(self.contents.items()):
            if name in MODEL_FILES:  # the rest of them says nothing about tokens, and changes when a model is exported
                ids = {key: value for key, value in self.json(name).items() if key.endswith("_token_id")}
                content = json.dumps(ids, sort_keys=True).encode()
            digest.update(f"{name}\0{len(content)}\0".encode())
            digest.update(content)
        return digest.hexdigest()

    def named_tokens(self) -> dict[str, str]:
        """Texts of bos_token, eos_token and so on; tokenizer_config.json goes before special_tokens_map.json."""
        found: dict[str, str] = {}
        for source in (self.json("tokenizer_config.json"), self.json("special_tokens_map.json")):
            for name in NAMES:
                text = _token_text(source.get(name))
                if text and name not in found:
                    found[name] = text
        return found

    def chat_template(self) -> str | None:
        """The model's own chat template; chat_template.jinja goes before the one in tokenizer_config.json."""
        if "chat_template.jinja" in self.contents:
            try:
                return self.contents["chat_template.jinja"].decode("utf-8")
            except UnicodeDecodeError as error:
                raise ConfigError(f"{self.folder / 'chat_template.jinja'}: is not UTF-8: {error}") from error
        value = self.json("tokenizer_config.json").get("chat_template")
        if isinstance(value, list):  # several named ones
            named = {item.get("name"): item.get("template") for item in value if isinstance(item, dict)}
            value = named.get("default")
        return value if isinstance(value, str) and value else None

    def backend(self) -> tokenizers.Tokenizer | ice_text.IceText:
        """The tokenizer itself, with the tokens that tokenizer_config.json adds; no padding, no truncation."""
        if ice_text.FILE in self.contents:
            return self._ice_text()
        if "tokenizer.json" in self.contents:
            backend = _parse(self.contents["tokenizer.json"], self.folder / "tokenizer.json")
        else:
            backend = _parse(self._from_sentencepiece(), self.folder / "tokenizer.model")
        backend.no_truncation()
        backend.no_padding()
        self._add_tokens(backend)
        return backend

    def _ice_text(self) -> ice_text.IceText:
        images = self.json("tokenizer_config.json").get("num_image_tokens", 0)
        if type(images) is not int or not 0 <= images <= 1_000_000:
            raise ConfigError(f"{self.folder / 'tokenizer_config.json'}: num_image_tokens is {images!r:.60}")
        backend = ice_text.IceText(self.contents[ice_text.FILE], images, str(self.folder / ice_text.FILE))
        config = self.json("config.json")
        if config and Blank.of(config) != backend.blank:
            raise ConfigError(
                f"{self.folder}: the tokenizer marks a blank by {tuple(backend.blank)}, config.json by "
                f"{tuple(Blank.of(config))}; they do not belong together (num_image_tokens in tokenizer_config.json is "
                f"{images})"
            )
        return backend

    def _from_sentencepiece(self) -> bytes:
        model = read_model(self.contents["tokenizer.model"], str(self.folder / "tokenizer.model"))
        return tokenizer_json(model, {}) if model.unsupported is None else _convert(self.folder)

    def _add_tokens(self, backend: tokenizers.Tokenizer) -> None:
        config = self.json("tokenizer_config.json")
        decoder = config.get("added_tokens_decoder")
        known = backend.get_added_tokens_decoder()
        for key, value in sorted((decoder if isinstance(decoder, dict) else {}).items(), key=lambda item: int(item[0])):
            token = _added_token(value)
            if token is None or (int(key) in known and known[int(key)].special == token.special):
                continue
            backend.add_tokens([token])
            if backend.token_to_id(token.content) != int(key):
                raise ConfigError(
                    f"{self.folder / 'tokenizer_config.json'}: token {token.content} should get id {key}, "
                    f"but the vocabulary gives it {backend.token_to_id(token.content)}; these files do not fit together"
                )
        special = list(self.named_tokens().values()) + [
            text
            for source in (config, self.json("special_tokens_map.json"))
            for name in ("additional_special_tokens", "extra_special_tokens")
            for text in _texts(source.get(name))
        ]
        marked = {token.content for token in backend.get_added_tokens_decoder().values() if token.special}
        for text in special:
            # A named token that is not in the vocabulary is left out: the model has no embedding for it.
            if text not in marked and backend.token_to_id(text) is not None:
                backend.add_special_tokens([tokenizers.AddedToken(text, special=True, normalized=False)])


def _parse(content: bytes, path: Path) -> tokenizers.Tokenizer:
    try:
        return tokenizers.Tokenizer.from_str(content.decode("utf-8"))
    except Exception as error:  # tokenizers raises bare Exception for every kind of bad file
        raise ConfigError(f"{path}: is not a tokenizer that this version of tokenizers reads: {error}") from error


def _convert(folder: Path) -> bytes:
    """Let transformers make a tokenizer.json out of a sentencepiece model; no code of the folder is run."""
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        raise MissingDependencyError(f"{folder}: has no tokenizer.json; pip install transformers") from error
    advice = f"{folder}: has only tokenizer.model, which transformers could not convert"
    try:
        made = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False, local_files_only=True)
    except ImportError as error:
        raise MissingDependencyError(f"{advice}; pip install sentencepiece protobuf") from error
    except (ValueError, OSError, RuntimeError, AttributeError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{advice}: {str(error).strip().splitlines()[0]} Try `pip install sentencepiece protobuf`, or put a "
            "tokenizer.json into the folder."
        ) from error
    backend = getattr(made, "backend_tokenizer", None)
    if backend is None:
        raise ConfigError(f"{advice}; put a tokenizer.json into the folder")
    text: str = backend.to_str()
    return text.encode("utf-8")


def _added_token(value: object) -> tokenizers.AddedToken | None:
    if not isinstance(value, dict) or not isinstance(value.get("content"), str):
        return None
    flags = {
        name: bool(value.get(name, False)) for name in ("lstrip", "rstrip", "single_word", "normalized", "special")
    }
    return tokenizers.AddedToken(value["content"], **flags)


def _token_text(value: object) -> str | None:
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else None


def _texts(value: object) -> list[str]:
    items = list(value.values()) if isinstance(value, dict) else value if isinstance(value, list) else []
    return [text for item in items if (text := _token_text(item))]
