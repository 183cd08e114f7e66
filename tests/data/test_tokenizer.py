"""Ids of text, special tokens kept apart, and what a folder says about itself."""

import json

import pytest

from fitune.data.tokenizer import Tokenizer
from fitune.errors import ConfigError

SPECIAL = "a <|im_end|> b <|eot_id|> c <|user|> [gMASK] <eos> d <|endoftext|>"


@pytest.mark.parametrize("name", ["llama3", "qwen2.5", "qwen3", "chatglm3"])
def test_special_tokens_in_text_stay_text(real, name):
    tokenizer = real(name)
    assert len(tokenizer.special_in(SPECIAL)) >= 1
    ids = tokenizer.encode(SPECIAL)
    assert not set(ids) & set(tokenizer.special_tokens.values())
    assert tokenizer.decode(ids) == SPECIAL
    assert [i for i in tokenizer.split(SPECIAL) if isinstance(i, int)]


def test_tokens_that_are_added_but_not_special_follow_the_tokenizer(real):
    assert real("qwen2.5").encode("<tool_call>") == [151657]
    assert real("qwen3").encode("<think>") == [151667]


@pytest.mark.parametrize("name", ["llama3", "qwen2.5", "qwen3"])
def test_same_as_transformers(real, theirs, name):
    ours, theirs = real(name), theirs(name)
    assert ours.vocab_size == len(theirs)
    assert (ours.bos_id, ours.eos_id, ours.pad_id) == (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id)
    assert ours.chat_template == theirs.chat_template
    assert [*ours.prefix_ids, *ours.encode("a")] == theirs("a")["input_ids"]
    for text in ("hello  world\n\n", "你好，世界。１２３", "x = {'a': 1}\t# déjà vu 🙂", ""):
        assert ours.encode(text) == theirs(text, add_special_tokens=False)["input_ids"]
        assert ours.decode(ours.encode(text)) == theirs.decode(ours.encode(text))


def test_what_real_tokenizers_say(real):
    llama, qwen, glm = real("llama3"), real("qwen2.5"), real("chatglm3")
    assert (llama.bos_id, llama.eos_id, llama.pad_id, llama.prefix_ids) == (128000, 128009, None, (128000,))
    assert set(llama.stop_ids) == {128001, 128008, 128009}
    assert (qwen.bos_id, qwen.eos_id, qwen.pad_id, qwen.prefix_ids) == (None, 151645, 151643, ())
    assert set(qwen.stop_ids) == {151643, 151645}
    assert set(glm.stop_ids) == {2, 64795, 64797}
    assert (llama.vocab_size, qwen.vocab_size, glm.vocab_size) == (128256, 151665, 64798)
    assert llama.hash != qwen.hash


def test_bytes_of_unknown_characters(real, toy):
    assert len(real("llama3").byte_ids()) == 128
    assert len(real("chatglm3").byte_ids()) == 256
    assert len(toy.byte_ids()) == 128
    assert set(toy.encode("你")) <= toy.byte_ids()
    assert not set(toy.encode("abc ~")) & toy.byte_ids()


def test_batch_is_the_same_as_one_by_one(toy):
    texts = ["a", "", "你好 <eos>"]
    assert toy.encode_batch(texts) == [toy.encode(text) for text in texts]


def test_prefix_follows_the_configuration(make_tokenizer):
    assert make_tokenizer(bos_first=True).prefix_ids == (1,)
    assert make_tokenizer(bos_first=True, add_bos_token=False).prefix_ids == ()
    assert make_tokenizer(add_bos_token=True).prefix_ids == (1,)
    assert make_tokenizer().prefix_ids == ()


def test_no_end_of_sequence_is_none(make_tokenizer):
    tokenizer = make_tokenizer(eos_token=None, pad_token=None, special=())
    assert (tokenizer.eos_id, tokenizer.pad_id, tokenizer.stop_ids) == (None, None, (2,))


def test_names_may_come_from_other_files(tmp_path, write_tokenizer):
    folder = write_tokenizer(tmp_path / "m", bos_token=None, eos_token=None)
    (folder / "config.json").write_text(json.dumps({"bos_token_id": 1, "eos_token_id": [2, 4]}))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 5]}))
    (folder / "chat_template.jinja").write_text("own")
    tokenizer = Tokenizer.load(folder)
    assert (tokenizer.bos_id, tokenizer.eos_id) == (1, 2)
    assert tokenizer.stop_ids[:2] == (2, 5)
    assert tokenizer.named_tokens["eos_token"] == "<eos>"
    assert tokenizer.chat_template == "own"


def test_a_list_of_templates_has_a_default(make_tokenizer):
    named = [{"name": "tools", "template": "x"}, {"name": "default", "template": "y"}]
    assert make_tokenizer(chat_template=named).chat_template == "y"


def test_truncation_and_padding_of_the_file_are_off(tmp_path, write_tokenizer):
    from tokenizers import Tokenizer as Backend

    folder = write_tokenizer(tmp_path / "m")
    plain = Tokenizer.load(folder)
    backend = Backend.from_file(str(folder / "tokenizer.json"))
    backend.enable_truncation(4)
    backend.enable_padding(length=16)
    backend.save(str(folder / "tokenizer.json"))
    assert Tokenizer.load(folder).encode("more than four") == plain.encode("more than four")
    assert Tokenizer.load(folder).hash != plain.hash


def test_tokens_of_the_configuration_are_added(make_tokenizer):
    token = {"content": "<new>", "lstrip": False, "rstrip": True, "single_word": False, "normalized": False}
    size = make_tokenizer().vocab_size
    tokenizer = make_tokenizer(added_tokens_decoder={str(size): token | {"special": True}})
    assert tokenizer.special_tokens["<new>"] == size
    assert tokenizer.vocab_size == size + 1
    assert tokenizer.split("a<new> \n b") == ["a", size, "b"]
    with pytest.raises(ConfigError, match=r"<new> should get id 9000.*do not fit together"):
        make_tokenizer(added_tokens_decoder={"9000": token | {"special": True}})


def test_metaspace_adds_its_space_at_the_start_only(tmp_path):
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, pre_tokenizers

    vocab = {text: i for i, text in enumerate(["<s>", "</s>", "▁", "a", "b"])}
    backend = Backend(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    backend.decoder = decoders.Metaspace(prepend_scheme="first")
    backend.add_special_tokens(["<s>", "</s>"])
    backend.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer.encode("ab") == [2, 3, 4]
    assert tokenizer.encode("ab", at_start=False) == [3, 4]
    assert [*tokenizer.encode("a"), 1, *tokenizer.encode("b", at_start=False)] == backend.encode("a</s>b").ids


def test_folders_without_a_usable_tokenizer(tmp_path, write_tokenizer):
    with pytest.raises(ConfigError, match="no such folder"):
        Tokenizer.load(tmp_path / "missing")
    with pytest.raises(ConfigError, match=r"has no tokenizer; expected tokenizer\.json"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"tokenizer\.json: is not a tokenizer"):
        Tokenizer.load(tmp_path)
    write_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("[")
    with pytest.raises(ConfigError, match=r"tokenizer_config\.json: is not JSON"):
        Tokenizer.load(tmp_path)


def test_hash_follows_tokens_not_the_model(tmp_path, write_tokenizer):
    folder = write_tokenizer(tmp_path / "m")

    def hash_with(config):
        (folder / "config.json").write_text(json.dumps(config))
        return Tokenizer.load(folder).hash

    base = hash_with({"eos_token_id": 2, "dtype": "float32"})
    assert hash_with({"dtype": "bfloat16", "eos_token_id": 2}) == base
    assert hash_with({"eos_token_id": 3}) != base
