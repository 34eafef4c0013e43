import json
import os

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from jaxmm.data.tokenizers import TextTokenizer, load_tokenizer, word_tokenizer
from jaxmm.errors import InputError

CAPTIONS = ("a zero", "a one", "a red circle", "a blue square, a red circle.", "do not stop!")
WORDS = ("a", "blue", "circle", "do", "not", "one", "red", "square", "stop", "zero")

# of a sentencepiece model, as T5 has them: a piece that begins a word begins with a low line
PIECES = ["▁", "▁a", "▁red", "▁circle", "s", "r", "e", "d", "c", "i", "l", ",", "a", "b", "u"]


@pytest.fixture(scope="module")
def t5_folder(tmp_path_factory):
    """A folder as transformers writes it, of a tiny T5 tokenizer."""
    folder = tmp_path_factory.mktemp("t5")
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    vocabulary = special + [(piece, -2.0 - i / 8) for i, piece in enumerate(PIECES)]
    tokenizer = tokenizers.Tokenizer(models.Unigram(vocabulary, unk_id=2))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.add_special_tokens(["<pad>", "</s>", "<unk>", "<extra_id_0>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"tokenizer_class": "T5Tokenizer", "extra_ids": 1, "additional_special_tokens": ["<extra_id_0>"]}
    names |= {"eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>", "clean_up_tokenization_spaces": False}
    (folder / "tokenizer_config.json").write_text(json.dumps(names))
    return folder


def bpe():
    """Byte-level, trained on the captions, with one special token."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=280, initial_alphabet=alphabet, special_tokens=["<end>"], show_progress=False
    )
    tokenizer.train_from_iterator(CAPTIONS, trainer)
    return tokenizer


def same(one, other):
    attributes = ("size", "bos_id", "eos_id", "pad_id")
    return [getattr(one, name) for name in attributes] == [getattr(other, name) for name in attributes]


def test_ids_of_words():
    tokenizer = word_tokenizer(reversed(WORDS))
    assert (tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id, tokenizer.size) == (0, 1, 2, 13)
    assert tokenizer.encode(" ".join(WORDS)) == list(range(3, 13))
    assert tokenizer.encode("A  Zero\n") == [3, 12]
    assert tokenizer.encode("") == []


def test_captions_come_back():
    tokenizer = word_tokenizer(CAPTIONS)
    assert tokenizer.size == 3 + len(WORDS) + 3
    for caption in CAPTIONS:
        assert tokenizer.decode(tokenizer.encode(caption)) == caption


@hypothesis.settings(deadline=None)
@hypothesis.given(st.lists(st.sampled_from(WORDS), max_size=12))
def test_known_words_come_back(words):
    tokenizer = word_tokenizer(WORDS)
    ids = tokenizer.encode(" ".join(words))
    assert len(ids) == len(words) and all(3 <= i < 13 for i in ids)
    assert tokenizer.decode(ids) == " ".join(words)


def test_special_and_foreign_ids_are_left_out():
    tokenizer = word_tokenizer(WORDS)
    assert tokenizer.decode([1, 3, 12, 2, 0, 0]) == "a zero"
    assert tokenizer.decode(np.array([13, 3, 500, -1, 12], np.int32)) == "a zero"
    assert tokenizer.decode([]) == ""


def test_unknown_words_are_named():
    tokenizer = word_tokenizer(WORDS)
    with pytest.raises(InputError, match="unknown word 'zeros' in 'a Zeros'; of the 10 known words .* are: zero, "):
        tokenizer.encode("a Zeros")
    with pytest.raises(InputError, match="unknown word ','"):
        tokenizer.encode("a zero, a one")
    with pytest.raises(InputError, match=r"is not Unicode: surrogates not allowed"):
        tokenizer.encode("a \ud800")


def test_special_tokens_cannot_be_written_in_text():
    with pytest.raises(InputError, match="unknown word '<' in 'a </s> zero'"):
        word_tokenizer(WORDS).encode("a </s> zero")
    tokenizer = word_tokenizer([*WORDS, "</s>"])
    assert tokenizer.size == 17 and min(tokenizer.encode("a </s>")) > 2


def test_words_must_be_there():
    for words in ([], ["", " "]):
        with pytest.raises(InputError, match="needs words"):
            word_tokenizer(words)
    with pytest.raises(InputError, match="a list of words, not the one string 'a zero'"):
        word_tokenizer("a zero")


def test_word_tokenizers_are_saved_and_loaded(tmp_path):
    tokenizer = word_tokenizer(CAPTIONS)
    tokenizer.save(tmp_path / "new" / "folder")
    loaded = load_tokenizer(tmp_path / "new" / "folder")
    assert same(tokenizer, loaded)
    assert [loaded.encode(c) for c in CAPTIONS] == [tokenizer.encode(c) for c in CAPTIONS]
    assert [loaded.decode(loaded.encode(c)) for c in CAPTIONS] == list(CAPTIONS)
    with pytest.raises(InputError, match="unknown word '<'"):
        loaded.encode("<s>")
    loaded.save(tmp_path)
    files = ("special_tokens_map.json", "tokenizer.json")
    assert [(tmp_path / f).read_bytes() for f in files] == [(tmp_path / "new/folder" / f).read_bytes() for f in files]
    assert sorted(os.listdir(tmp_path)) == ["new", *files]


def test_plain_tokenizers_of_other_kinds(tmp_path):
    tokenizer = TextTokenizer(bpe(), {"eos": "<end>"})
    assert (tokenizer.eos_id, tokenizer.bos_id, tokenizer.pad_id, tokenizer.size) == (0, None, None, 280)
    text = "a réd circle  <end>\n"
    tokenizer.save(tmp_path)
    loaded = load_tokenizer(str(tmp_path))
    assert same(tokenizer, loaded) and loaded.encode(text) == tokenizer.encode(text)
    assert loaded.decode(loaded.encode(text)) == text and 0 not in loaded.encode(text)
    (tmp_path / "special_tokens_map.json").write_text('{"pad_token": {"content": "<end>", "lstrip": false}}')
    assert (load_tokenizer(tmp_path).eos_id, load_tokenizer(tmp_path).pad_id) == (None, 0)
    (tmp_path / "special_tokens_map.json").unlink()
    assert load_tokenizer(tmp_path).eos_id is None


def test_tokenizers_of_transformers(t5_folder, tmp_path):
    tokenizer = load_tokenizer(t5_folder)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id, tokenizer.size) == (None, 1, 0, 19)
    text = "a red  circles, a cube"
    ids = tokenizer.encode(text)
    assert ids == [4, 5, 6, 7, 14, 4, 3, 11, 17, 16, 9]
    assert tokenizer.decode([*ids, 1, 0, -1, 99]) == "a red circles, a cube"
    assert tokenizer.encode("") == [] and tokenizer.encode("<extra_id_0>") == [18]
    assert tokenizer.decode([18, 4, 1]) == "a"
    tokenizer.save(tmp_path / "one")
    loaded = load_tokenizer(tmp_path / "one")
    assert same(tokenizer, loaded) and loaded.encode(text) == ids and loaded.decode(ids) == tokenizer.decode(ids)
    loaded.save(tmp_path / "two")
    files = os.listdir(tmp_path / "one")
    assert sorted(files) == sorted(os.listdir(tmp_path / "two")) and "tokenizer.json" in files
    assert all((tmp_path / "one" / f).read_bytes() == (tmp_path / "two" / f).read_bytes() for f in files)


def test_a_folder_can_be_saved_over(t5_folder, tmp_path):
    load_tokenizer(t5_folder).save(tmp_path)
    word_tokenizer(WORDS).save(tmp_path)
    assert load_tokenizer(tmp_path).encode("a zero") == [3, 12]
    load_tokenizer(t5_folder).save(tmp_path)
    assert load_tokenizer(tmp_path).size == 19


def test_no_code_of_a_folder_is_run(t5_folder, tmp_path):
    load_tokenizer(t5_folder).save(tmp_path)
    names = json.loads((tmp_path / "tokenizer_config.json").read_text())
    names |= {"tokenizer_class": "Mine", "auto_map": {"AutoTokenizer": ["mine.Mine", None]}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(names))
    (tmp_path / "mine.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Mine: pass\n")
    with pytest.raises(InputError, match="can be loaded: .*contains custom code"):
        load_tokenizer(tmp_path)
    assert not (tmp_path / "ran").exists()


def test_names_that_are_no_tokenizer(tmp_path):
    problem = "is neither a folder nor can it be loaded from the Hugging Face hub: "
    for name in (str(tmp_path / "none"), "no such name!"):
        with pytest.raises(InputError, match=problem) as caught:
            load_tokenizer(name)
        assert name in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(InputError, match="is a folder without a tokenizer that can be loaded"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(InputError, match=f"tokenizer {tmp_path} cannot be loaded"):
        load_tokenizer(tmp_path)


def test_a_hub_out_of_reach(monkeypatch):
    import transformers

    def offline(name, trust_remote_code):
        assert trust_remote_code is False
        raise OSError("We couldn't connect to the hub.\nCheck your internet connection.")

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", offline)
    with pytest.raises(InputError) as caught:
        load_tokenizer("someone/something")
    problem = "is neither a folder nor can it be loaded from the Hugging Face hub: We couldn't connect to the hub."
    assert str(caught.value) == f"tokenizer 'someone/something' {problem}"


def test_folders_that_cannot_be_written_to(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="cannot write a tokenizer to .*file: File exists"):
        word_tokenizer(WORDS).save(tmp_path / "file")
    with pytest.raises(InputError, match="cannot write a tokenizer to .*below: Not a directory"):
        word_tokenizer(WORDS).save(tmp_path / "file" / "below")
