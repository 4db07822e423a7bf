import json
import random
from typing import Any

import pytest
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

from diffdistill.alignment import Spelling, common_chunks
from diffdistill.errors import UserError
from diffdistill.pipelines.byte_spans import Speller, byte_alphabet
from diffdistill.vocabularies import matched_ids

TEXTS = [
    "def compute(the, total):\n    return the + total  # computes the total\n",
    "The quick brown fox; la fille na\u00efve, \u00fcber alles, 12345 67890",
    "\u6f22\u5b57\u304b\u306a  \U0001f642 \U0001f469\u200d\U0001f467 e\u0301 \u00e9\n\n\n\t\t",
] * 3
MARKS = ["<eos>", "<pad>", "<mask>"]


def byte_level(*, use_regex: bool = True, size: int = 400, **options: Any) -> Tokenizer:
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(
        **({"add_prefix_space": False} | options), use_regex=use_regex
    )
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator(
        TEXTS,
        trainers.BpeTrainer(
            vocab_size=size, initial_alphabet=alphabet, special_tokens=MARKS, show_progress=False
        ),
    )
    return core


def metaspace(*, prepend: str = "never") -> Tokenizer:
    """Return a Unigram tokenizer with spaces as U+2581, and bytes for what it has never seen."""
    core = Tokenizer(models.Unigram())
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=prepend)
    core.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    fallback = [f"<0x{byte:02X}>" for byte in range(256)]
    core.train_from_iterator(
        TEXTS[:2],
        trainers.UnigramTrainer(
            vocab_size=400, special_tokens=["<unk>", *MARKS], unk_token="<unk>", show_progress=False
        ),
    )
    state = json.loads(core.to_str())
    state["model"]["byte_fallback"] = True
    state["model"]["vocab"] += [[piece, -20.0] for piece in fallback]
    return Tokenizer.from_str(json.dumps(state))


def llama_like() -> Tokenizer:
    """Return a BPE of characters whose normalizer, not its pre-tokenizer, writes U+2581."""
    letters = sorted(set("".join(TEXTS[:2]).replace(" ", "\u2581")))
    fallback = [f"<0x{byte:02X}>" for byte in range(256)]
    vocabulary = {piece: i for i, piece in enumerate(["<unk>", *fallback, *letters, "th", "the"])}
    core = Tokenizer(
        models.BPE(vocabulary, [("t", "h"), ("th", "e")], unk_token="<unk>", byte_fallback=True)
    )
    core.normalizer = normalizers.Replace(" ", "\u2581")
    core.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return core


def characters() -> Tokenizer:
    core = Tokenizer(models.WordLevel({"<unk>": 0, "a": 1, "b": 2, " ": 3}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return core


def check(speller: Speller, text: str) -> Spelling:
    """Check that the spans tile the text and that each token decodes to its bytes."""
    spelling = speller(text)
    assert spelling.text == text.encode()
    position = 0
    for start, stop in spelling.spans:
        assert start == position
        position = stop
    assert position == len(spelling.text)
    return spelling


def random_texts(count: int, seed: int) -> list[str]:
    rng = random.Random(seed)
    words = [word for text in TEXTS for word in text.split(" ")] + ["  ", "\n", "<", "\U0001f469"]
    return [
        " ".join(
            rng.choice(words) if rng.random() < 0.8 else chr(rng.randrange(0x21, 0x2000))
            for _ in range(rng.randrange(1, 10))
        )
        for _ in range(count)
    ]


SPELLERS = {
    "byte-level": byte_level,
    "byte-level without regex": lambda: byte_level(use_regex=False, size=350),
    "metaspace": metaspace,
    "llama-like": llama_like,
    "characters": characters,
}


@pytest.fixture(scope="module", params=SPELLERS)
def speller(request: pytest.FixtureRequest) -> Speller:
    return Speller(SPELLERS[request.param]())


def test_the_alphabet_of_bytes_is_the_librarys() -> None:
    alphabet = byte_alphabet()
    assert sorted(alphabet.values()) == list(range(256))
    assert set(alphabet) == set(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab=dict(alphabet), merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    text = "".join(chr(c) for c in range(0x250)) + "\U0001f642"
    assert bytes(core.encode(text).ids) == text.encode()


def test_the_tokens_of_random_texts_spell_them_byte_by_byte(speller: Speller) -> None:
    for text in [*TEXTS, *random_texts(200, 0), ""]:
        check(speller, text)


def test_each_token_spells_what_the_vocabulary_says(speller: Speller) -> None:
    vocabulary = speller.vocabulary()
    known = 0
    for text in random_texts(50, 1):
        spelling = speller(text)
        for token, (start, stop) in zip(spelling.tokens, spelling.spans, strict=True):
            if vocabulary[token] is not None:
                assert spelling.text[start:stop] == vocabulary[token]
                known += 1
    assert known > 50


@pytest.mark.parametrize("name", ["byte-level", "llama-like"])
def test_added_words_that_are_not_special_spell_what_they_are(name: str) -> None:
    core = SPELLERS[name]()
    run = "\u2581\u2581" if name == "llama-like" else "  "
    core.add_tokens(
        [AddedToken(run, normalized=name == "byte-level"), AddedToken("o", lstrip=True)]
    )
    core.add_special_tokens(["<end>"])
    vocabulary = Speller(core).vocabulary()
    assert vocabulary[core.token_to_id(run)] == b"  "
    assert vocabulary[core.token_to_id("<end>")] is None
    assert vocabulary[core.token_to_id("o")] is None  # it may have spaces before it
    speller = Speller(core)
    spelling = check(speller, "the  the")
    for token, (start, stop) in zip(spelling.tokens, spelling.spans, strict=True):
        assert vocabulary[token] == spelling.text[start:stop]


def test_ids_that_no_token_has_spell_nothing_and_hide_none_after_them() -> None:
    core = Tokenizer(models.BPE(vocab={"a": 0, "b": 4}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    assert Speller(core).vocabulary() == [b"a", None, None, None, b"b"]


def test_a_character_over_several_tokens_is_parted_into_its_bytes() -> None:
    for core in (byte_level(), metaspace(), llama_like()):
        spelling = check(Speller(core), "a\u0905b")  # never seen
        sizes = [stop - start for start, stop in spelling.spans]
        assert sizes == [1, 1, 1, 1, 1]


def test_any_two_tokenizers_have_common_chunks_of_all_of_a_text() -> None:
    spellers = [Speller(make()) for make in (byte_level, metaspace, llama_like)]
    spellers.append(Speller(byte_level(use_regex=False, size=350)))
    uneven = 0
    for text in random_texts(100, 2):
        for student in spellers:
            for teacher in spellers:
                pair = student(text), teacher(text)
                chunks = common_chunks(*pair)
                for side in range(2):
                    flat = [i for c in chunks for i in range(*c[side])]
                    assert flat == list(range(len(pair[side].tokens)))
                uneven += any(b - a != d - c for (a, b), (c, d) in chunks)
    assert uneven > 100


def test_special_tokens_are_marked_and_spell_their_own_string() -> None:
    fast = PreTrainedTokenizerFast(tokenizer_object=byte_level(), eos_token="<eos>")
    fast.add_tokens(["<think>"])
    spelling = check(Speller(fast), "a<eos>b<think>c")
    spelled = [spelling.text[slice(*span)] for span in spelling.spans]
    assert spelled == [b"a", b"<eos>", b"b", b"<think>", b"c"]
    assert spelling.special == (False, True, False, False, False)


def test_what_the_tokenizer_puts_around_a_text_is_left_out() -> None:
    core = byte_level()
    core.post_processor = processors.TemplateProcessing("<eos> $A <eos>", None, [("<eos>", 0)])
    assert core.encode("ab").tokens[0] == "<eos>"
    assert 0 not in Speller(core)("ab").tokens


def test_truncation_and_padding_of_earlier_calls_change_nothing_and_stay() -> None:
    core = byte_level()
    plain = Speller(core)("one two three four five")
    core.enable_truncation(2)
    core.enable_padding(length=90, pad_token="<pad>", pad_id=1)
    assert Speller(core)("one two three four five") == plain
    assert core.truncation["max_length"] == 2
    assert core.padding["length"] == 90


@pytest.mark.parametrize(
    ("normalizer", "text", "match"),
    [
        (normalizers.NFC(), "caf e\u0301!", r"from character 3 on it spells .* \(NFC\) rewrites"),
        (normalizers.Lowercase(), "to Be", r"from character 3 on .*'B.*\(Lowercase\) rewrites"),
        (normalizers.StripAccents(), "na\u00efve", "does not keep the text"),
        (normalizers.Strip(), " a ", "does not keep the text"),
    ],
)
def test_a_normalizer_that_changes_the_text_is_refused(
    normalizer: Any, text: str, match: str
) -> None:
    core = byte_level()
    if isinstance(normalizer, normalizers.StripAccents):
        normalizer = normalizers.Sequence([normalizers.NFD(), normalizer])
    core.normalizer = normalizer
    with pytest.raises(UserError, match=match):
        Speller(core)(text)
    check(Speller(core), "plain ascii")


def test_a_space_in_front_is_refused_with_the_remedy() -> None:
    for core in (byte_level(add_prefix_space=True), metaspace(prepend="always")):
        with pytest.raises(UserError, match=r"space in front: .* does not \(add_prefix"):
            Speller(core)("the total")
        check(Speller(core), " the total")


def test_a_tokenizer_that_drops_text_is_refused() -> None:
    core = Tokenizer(models.WordLevel({"<unk>": 0, "a": 1}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    with pytest.raises(UserError, match="from character 1 on"):
        Speller(core)("a a")
    lossy = Tokenizer(models.BPE(vocab={"a": 0}, merges=[]))
    lossy.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    with pytest.raises(UserError, match="from character 1 on it spells '' where"):
        Speller(lossy)("ab")


def test_a_literal_metaspace_is_refused_where_it_would_become_a_space() -> None:
    with pytest.raises(UserError, match="from character 1 on"):
        Speller(metaspace())("a\u2581b")


def test_a_tokenizer_without_its_bytes_is_refused() -> None:
    with pytest.raises(UserError, match="str does not say which bytes"):
        Speller("gpt2")


def test_vocabularies_of_two_kinds_meet_in_bytes() -> None:
    spellers = Speller(byte_level()), Speller(metaspace())
    vocabularies = [s.vocabulary() for s in spellers]
    ours, theirs = matched_ids(*vocabularies)
    assert len(ours) > 200
    spelled = [vocabularies[0][int(i)] for i in ours]
    assert spelled == [vocabularies[1][int(i)] for i in theirs]
    assert any(piece is not None and piece.startswith(b" ") for piece in spelled)
    assert all(vocabularies[0][i] is None for i in range(len(MARKS)))
