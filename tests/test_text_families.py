"""The same questions to the families of language models, and to the pairs they read texts in."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoTokenizer

from diffdistill.draws import Draws
from diffdistill.errors import UserError
from diffdistill.pipelines.bd3lm import BD3LM
from diffdistill.pipelines.block_diffusion import chat_tokens, lay_out_prompts
from diffdistill.pipelines.block_sampling import Past
from diffdistill.pipelines.chats import split_pair
from diffdistill.pipelines.language import LanguageFamily
from diffdistill.pipelines.masked_sampling import denoise_all
from diffdistill.pipelines.mdlm import MDLM
from diffdistill.pipelines.text_pair import TextPair
from diffdistill.projection import dense
from diffdistill.role_building import build_roles
from diffdistill.role_settings import RoleSettings
from diffdistill.roles import Roles, enable_checkpointing
from diffdistill.texts import Reader
from diffdistill.types import Example, State
from tests.conftest import CPU, disturb, gradients
from tests.text_run import chat, make_pair, save_world, text_batch
from tests.tiny_text import CODE, save_lm

KINDS: dict[str, type[LanguageFamily]] = {"bd3lm": BD3LM, "mdlm": MDLM}
READERS: tuple[Reader, ...] = ("student", "teacher")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_world(tmp_path_factory.mktemp("world"))


def family_of(kind: str, world: Path, model: str = "student", **options: Any) -> LanguageFamily:
    defaults = {"block": 4, "max_length": 64}
    return KINDS[kind](path=str(world / model), device=CPU, **(defaults | options))


def hidden_state(pair: TextPair, batch: dict[str, Any], reader: Reader) -> State:
    """Return a state with half of what may be hidden, the same for a sample in any batch."""
    text = pair.text(batch, reader=reader)
    rows = [
        torch.rand(text.tokens.shape[1], generator=Draws(0).generator("mask", number))
        for number in batch["ids"].tolist()
    ]
    mask = (torch.stack(rows) < 0.5) & text.maskable
    return pair.noised(batch, torch.full((len(mask),), 0.5), mask, reader=reader)


def predictions(pair: TextPair, batch: dict[str, Any], reader: Reader) -> Tensor:
    family = pair.student if reader == "student" else pair.teacher
    state = hidden_state(pair, batch, reader)
    with torch.no_grad():
        found = family.predict(family.network(), state, pair.condition(batch, reader=reader))
    return dense(found)


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_predicts_in_a_batch_what_it_predicts_alone(kind: str, world: Path) -> None:
    pair = TextPair(family_of(kind, world), family_of(kind, world, "moe", max_length=96))
    batch = text_batch(pair, 4)
    for reader in READERS:
        together = predictions(pair, batch, reader)
        for row in range(4):
            alone = predictions(pair, text_batch(pair, 1, first_id=row), reader)[0]
            kept = pair.text(batch, reader=reader).maskable[row, : len(alone)]
            torch.testing.assert_close(
                together[row, : len(alone)][kept], alone[kept], rtol=1e-4, atol=1e-5
            )


@pytest.mark.parametrize("kind", KINDS)
def test_the_mask_token_is_impossible_and_all_else_is_not(kind: str, world: Path) -> None:
    pair = TextPair(*[family_of(kind, world)] * 2)
    found = predictions(pair, text_batch(pair, 2), "student")
    impossible = found.isneginf().flatten(0, 1)
    assert impossible.all(0).nonzero().tolist() == [[pair.student.mask_id]]
    assert impossible.any(0).sum() == 1


def test_an_answer_is_trained_on_as_it_is_sampled(world: Path) -> None:
    """The first block of an answer sees its prompt alone, at the same positions and blocks."""
    pair = make_pair(world, cross=False)
    question = "what is the sum of these numbers?"
    batch = pair.collate(pair.encode([chat(CODE[0], question), chat(CODE[1])]))
    batch["ids"] = torch.arange(2)
    text = pair.text(batch)
    state = pair.noised(batch, torch.ones(2), text.maskable)
    network: Any = pair.student.network()
    with torch.no_grad():
        trained = dense(pair.student.predict(network, state, pair.condition(batch)))[0]
    start = int(text.maskable[0].long().argmax())
    assert start % 4 == 0
    messages = [{"role": "user", "content": question}]
    tokens, pads = lay_out_prompts(
        [chat_tokens(pair.student.tokenizer, messages)], block=4, pad_id=0, device=CPU
    )
    past = Past(network, 4, pads, "sdpa")
    with torch.no_grad():
        past.append(tokens)
        sampled = past.logits(torch.full((1, 4), pair.student.mask_id))[0]
    sampled[:, pair.student.mask_id] = -torch.inf
    torch.testing.assert_close(trained[start : start + 4], sampled, rtol=1e-4, atol=1e-5)


def test_dreams_shift_is_that_of_the_sampler(world: Path) -> None:
    plain, shifting = (family_of("mdlm", world, shift=shift) for shift in (False, True))
    pair = TextPair(shifting, shifting)
    batch = text_batch(pair, 2)
    network = shifting.network()
    state, condition = hidden_state(pair, batch, "student"), pair.condition(batch)
    with torch.no_grad():
        found = dense(shifting.predict(network, state, condition))
        own = dense(plain.predict(network, state, condition))
        expected = dense(denoise_all(network, state.x, padding=condition["padding"], shift=True))
    follows = ~condition["padding"][:, :-1]  # the first token has no text before it
    torch.testing.assert_close(found[:, 1:][follows], own[:, :-1][follows])
    expected[..., shifting.mask_id] = -torch.inf
    torch.testing.assert_close(found, expected)


# roles


def student_gradients(world: Path, *, recompute: bool, adapter: str) -> dict[str, Tensor]:
    pair = make_pair(world, cross=False)
    settings = {
        "student": RoleSettings(adapter=adapter, rank=2),  # type: ignore[arg-type]
        "teacher": RoleSettings(weights="ema"),
    }
    roles: Roles = build_roles(settings, pair.student)
    disturb(roles["student"], seed=1, scale=0.05)
    if recompute:
        for network in roles.networks():
            enable_checkpointing(network)
    batch = text_batch(pair, 2)
    state, condition = hidden_state(pair, batch, "student"), pair.condition(batch)
    prediction = roles["student"](state, condition)
    with torch.no_grad():
        roles["teacher"](state, condition)
    dense(prediction)[..., : pair.student.mask_id].square().mean().backward()
    return gradients(roles["student"])


@pytest.mark.parametrize("adapter", ["lora", "none"])
def test_recomputed_layers_give_the_same_gradients_under_the_adapter_of_the_call(
    adapter: str, world: Path
) -> None:
    expected = student_gradients(world, recompute=False, adapter=adapter)
    found = student_gradients(world, recompute=True, adapter=adapter)
    assert expected.keys() == found.keys()
    assert sum(gradient.abs().sum() > 0 for gradient in expected.values()) > 10
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-5, atol=1e-8)


def test_layers_are_recomputed_once_and_nothing_else_is_in_training(world: Path) -> None:
    pair = make_pair(world, cross=False)
    roles = build_roles({"student": RoleSettings()}, pair.student)
    network: Any = roles["student"].network
    enable_checkpointing(network)
    training = [module for module in network.modules() if module.training]
    assert training == [network.model, *network.model.layers]
    calls: list[int] = []
    for layer in network.model.layers:
        layer.mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    batch = text_batch(pair, 1)
    found = roles["student"](hidden_state(pair, batch, "student"), pair.condition(batch))
    assert len(calls) == 2
    dense(found)[..., 0].sum().backward()
    assert len(calls) == 4


def test_a_role_of_another_family_has_its_network_its_call_and_its_tokens(world: Path) -> None:
    pair = make_pair(world)
    settings = {"student": RoleSettings(adapter="lora"), "teacher": RoleSettings(weights="frozen")}
    roles = build_roles(settings, pair.student, others={"teacher": pair.teacher})
    assert roles["teacher"].family is pair.teacher
    assert roles["student"].family is pair.student
    assert type(roles["teacher"].network).__name__ == "Qwen3MoeForCausalLM"
    batch = text_batch(pair, 2)
    state = hidden_state(pair, batch, "teacher")
    found = dense(roles["teacher"](state, pair.condition(batch, reader="teacher")))
    torch.testing.assert_close(found, predictions(pair, batch, "teacher"))
    assert not roles["teacher"].parameters()


# texts


def shown(family: LanguageFamily, tokens: Tensor) -> str:
    decoded: str = family.tokenizer.decode(tokens)
    return decoded


def test_an_answer_begins_with_a_block_and_ends_with_learned_end_tokens(world: Path) -> None:
    pair = make_pair(world, cross=False)
    for question in ("a", "ab", "abc def", "return the sum of both"):
        batch = pair.collate(pair.encode([chat(CODE[1], question)]))
        text = pair.text(batch)
        places = text.maskable[0].nonzero()[:, 0]
        assert places[0] % 4 == 0
        assert (places[-1] + 1) % 4 == 0
        assert len(places) == int(places[-1] - places[0]) + 1
        learned = shown(pair.student, text.tokens[0, places])
        assert learned.replace("<eos>", "") == CODE[1] + "<|end|>"
        pads = int(pair.condition(batch)["pads"][0])
        assert shown(pair.student, text.tokens[0, pads : int(places[0])]) == (
            f"<|start|>user\n{question}<|end|>\n<|start|>assistant\n"
        )


def test_nothing_visible_follows_an_answer(world: Path) -> None:
    """The template's line break after the end of the turn would say where the answer ends."""
    pair = make_pair(world, cross=False)
    batch = pair.collate(pair.encode([chat(CODE[0])]))
    last = int(pair.text(batch).maskable[0].nonzero()[-1])
    assert pair.condition(batch)["padding"][0, last + 1 :].all()


def test_a_plain_text_is_learned_from_its_first_token_to_its_end(world: Path) -> None:
    pair = make_pair(world, cross=False)
    text = pair.text(pair.collate(pair.encode([Example("", text=CODE[3])])))
    assert text.maskable.all()
    assert shown(pair.student, text.tokens[0]).rstrip("<eos>") == CODE[3].rstrip("<eos>")
    assert int(text.tokens[0, -1]) == pair.student.eos_id


def test_with_one_reader_each_token_is_a_chunk_of_its_own(world: Path) -> None:
    pair = make_pair(world, cross=False)
    batch = text_batch(pair, 2)
    ours, theirs = (pair.text(batch, reader=reader) for reader in READERS)
    assert torch.equal(ours.tokens, theirs.tokens)
    assert torch.equal(ours.chunks, theirs.chunks)
    assert torch.equal(ours.chunks >= 0, ours.maskable)
    for row in ours.chunks:
        assert len(row[row >= 0].unique()) == int((row >= 0).sum())


def chunk_bytes(family: LanguageFamily, tokens: Tensor, chunks: Tensor) -> list[bytes]:
    spelled = family.speller.vocabulary()
    count = int(chunks.max()) + 1
    return [
        b"".join(spelled[token] or b"?" for token in tokens[chunks == number].tolist())
        for number in range(count)
    ]


def test_with_two_readers_a_chunk_spells_the_same_bytes_for_both(world: Path) -> None:
    pair = make_pair(world)
    batch = text_batch(pair, 4)
    ours, theirs = (pair.text(batch, reader=reader) for reader in READERS)
    for row in range(4):
        first = chunk_bytes(pair.student, ours.tokens[row], ours.chunks[row])
        second = chunk_bytes(pair.teacher, theirs.tokens[row], theirs.chunks[row])
        assert first == second
        assert b"".join(first).decode() == CODE[row].strip() if row % 2 else CODE[row]
        assert any(len(spelled) > 3 for spelled in first)
    assert not torch.equal(ours.tokens[:, :8], theirs.tokens[:, :8])


def test_each_reader_hides_behind_its_own_mask_token_and_is_shown_copies(world: Path) -> None:
    pair = make_pair(world)
    batch = text_batch(pair, 2)
    assert pair.student.mask_id != pair.teacher.mask_id
    for reader, family in (("student", pair.student), ("teacher", pair.teacher)):
        text = pair.text(batch, reader=reader)  # type: ignore[arg-type]
        mask = torch.cat([text.maskable, ~text.maskable])
        state = pair.noised(batch, torch.ones(4), mask, reader=reader)  # type: ignore[arg-type]
        assert torch.equal(state.x == family.mask_id, mask)
        assert torch.equal(state.x[:2][~text.maskable], text.tokens[~text.maskable])
        condition = pair.condition(batch, reader=reader, copies=2)  # type: ignore[arg-type]
        assert torch.equal(condition["clean"], text.tokens.repeat(2, 1))
        assert len(condition["pads"]) == 4


def test_a_text_that_is_too_long_is_cut_and_loses_the_chunks_that_either_side_lost(
    world: Path,
) -> None:
    short = TextPair(
        family_of("bd3lm", world, max_length=16), family_of("mdlm", world, "moe", max_length=32)
    )
    batch = short.collate(short.encode([Example("", text=CODE[0] * 3)]))
    ours, theirs = (short.text(batch, reader=reader) for reader in READERS)
    assert ours.tokens.shape == (1, 16)
    assert ours.maskable.all()
    assert ours.chunks.max() == theirs.chunks.max()
    first = chunk_bytes(short.student, ours.tokens[0], ours.chunks[0])
    assert first == chunk_bytes(short.teacher, theirs.tokens[0], theirs.chunks[0])
    assert (CODE[0] * 3).encode().startswith(b"".join(first))


@pytest.mark.parametrize("attention", ["sdpa", "flex_attention"])
def test_batches_are_whole_blocks_long_or_whole_tiles_of_flex_attention(
    attention: Any, world: Path
) -> None:
    family = family_of("bd3lm", world, attention=attention, max_length=192, block=6)
    pair = TextPair(family, family)
    found = pair.text(pair.collate(pair.encode([Example("", text="def")]))).tokens.shape[1]
    assert found == (6 if attention == "sdpa" else 192)


# packing


def test_packed_texts_follow_each_other_whole_with_end_tokens_between(world: Path) -> None:
    pair = make_pair(world, cross=False, packing=True)
    texts = [Example("", text=text) for text in (*CODE, CODE[0] * 6)]
    rows = list(pair.packed(pair.rows(text) for text in texts))
    batch = pair.collate([pair.tensors(row) for row in rows])
    text = pair.text(batch)
    assert text.tokens.shape[1] == 64
    everything = shown(pair.student, text.tokens[text.maskable])
    assert everything == "".join(f"{e.text}<eos>" for e in texts)
    assert not pair.condition(batch)["pads"].any()
    assert text.maskable[:-1].all()


def test_packed_pairs_hold_the_same_bytes_on_both_sides_and_lose_none(world: Path) -> None:
    pair = make_pair(world, packing=True)
    texts = [Example("", text=text) for text in (*CODE, CODE[0] * 6)]
    rows = list(pair.packed(pair.rows(text) for text in texts))
    assert len(rows) > 3
    seen = b""
    for row in rows:
        batch = pair.collate([pair.tensors(row)])
        ours, theirs = (pair.text(batch, reader=reader) for reader in READERS)
        assert ours.tokens.shape == (1, 64)
        assert theirs.tokens.shape == (1, 96)
        first = chunk_bytes(pair.student, ours.tokens[0], ours.chunks[0])
        assert first == chunk_bytes(pair.teacher, theirs.tokens[0], theirs.chunks[0])
        seen += b"".join(first)
    assert seen.decode() == "".join(e.text or "" for e in texts)


def test_a_long_pair_is_split_where_both_sides_have_a_boundary(world: Path) -> None:
    pair = make_pair(world, packing=True)
    found = pair.rows(Example("", text="".join(CODE)))
    whole = found["student"], found["teacher"]
    parts = list(split_pair(whole, (20, 30)))
    assert len(parts) > 4
    for side in (0, 1):
        joined = [token for part in parts for token in part[side].tokens]
        assert joined == whole[side].tokens
        assert all(len(part[side].tokens) <= (20, 30)[side] for part in parts)
        assert all(min(part[side].chunks) == 0 for part in parts)
    assert all(a.chunks[-1] == b.chunks[-1] for a, b in parts)
    assert list(split_pair(whole, (500, 500))) == [whole]


# errors


def edited(folder: Path, source: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """Copy a checkpoint with another tokenizer_config.json."""
    folder.mkdir()
    for file in source.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))
    return folder


def test_a_tokenizer_without_a_mask_token_is_refused_until_one_is_named(
    world: Path, tmp_path: Path
) -> None:
    folder = edited(tmp_path / "x", world / "student", lambda c: c.pop("mask_token"))
    family = BD3LM(path=str(folder), device=CPU)
    with pytest.raises(UserError, match="has no mask token: set mask_token to one of"):
        family.network()
    with pytest.raises(UserError, match=r"'<hole>' is no special token of the tokenizer; it has"):
        _ = BD3LM(path=str(folder), device=CPU, mask_token="<hole>").mask_id
    named = BD3LM(path=str(folder), device=CPU, mask_token="<mask>")
    assert named.mask_id == BD3LM(path=str(world / "student"), device=CPU).mask_id
    assert named.fingerprint() != family.fingerprint()


def test_a_chat_needs_a_template_that_may_be_in_a_file(world: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(str(world / "student"))
    template, tokenizer.chat_template = tokenizer.chat_template, None
    tokenizer.save_pretrained(str(tmp_path))
    options: dict[str, Any] = {"path": str(tmp_path), "device": CPU, "block": 4, "max_length": 64}
    family = BD3LM(**options)
    with pytest.raises(UserError, match=r"^here:3: the tokenizer of .* has no chat template"):
        TextPair(family, family).encode([chat("yes", origin="here:3")])
    (tmp_path / "chat.jinja.txt").write_text(template)
    family = BD3LM(**options, chat_template=str(tmp_path / "chat.jinja.txt"))
    found = TextPair(family, family).encode([chat("yes")])
    expected = make_pair(world, cross=False).encode([chat("yes")])
    assert torch.equal(found[0]["student/tokens"], expected[0]["student/tokens"])
    with pytest.raises(UserError, match=r"cannot read chat_template nowhere\.jinja"):
        _ = BD3LM(**options, chat_template="nowhere.jinja").speller


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot read .*config.json"),
        ({"architectures": ["BertModel"]}, r"needs a causal language model .*found BertModel"),
        ({}, "found none"),
    ],
)
def test_a_folder_without_a_causal_lm_is_refused(
    content: Any, message: str, world: Path, tmp_path: Path
) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=message):
        family_of("bd3lm", world).network(str(tmp_path))
    with pytest.raises(UserError, match="neither a folder nor a hub id"):
        family_of("bd3lm", world).network("no/such/folder")


def test_weights_that_go_with_another_tokenizer_are_refused(world: Path) -> None:
    family = family_of("bd3lm", world)
    family.network(str(world / "dense"))
    with pytest.raises(UserError, match=r"has another tokenizer than .*: give that role a family"):
        family.network(str(world / "moe"))


def test_a_mask_token_without_an_embedding_is_refused(world: Path, tmp_path: Path) -> None:
    save_lm(tmp_path / "small", vocab_size=260, eos_token_id=0)
    with pytest.raises(UserError, match="the mask token has id") as caught:
        BD3LM(path=str(tmp_path / "small"), device=CPU, mask_token="<|end|>").network()
    assert "260 embeddings" in str(caught.value)


def test_lengths_that_fit_no_blocks_are_refused(world: Path) -> None:
    with pytest.raises(UserError, match="max_length 62 must be a multiple of the block of 4"):
        family_of("bd3lm", world, max_length=62)
    with pytest.raises(UserError, match="flex_attention needs a max_length that is a multiple of"):
        family_of("bd3lm", world, max_length=96, attention="flex_attention")


@pytest.mark.parametrize("cross", [False, True])
def test_prompts_that_run_into_an_answer_are_counted_and_told_once(
    cross: bool, world: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Against the tokens of the prompt alone, with which the training row should begin."""
    pair = make_pair(world, cross=cross)
    answers = ["yes", "    return first", "\n\nyes", CODE[0], "    print(first)"]
    broken = 0
    for example in map(chat, answers):
        assert example.messages is not None
        prompt = chat_tokens(pair.student.tokenizer, example.messages[:-1])
        whole = chat_tokens(pair.student.tokenizer, example.messages, answer=False)
        broken += whole[: len(prompt)] != prompt
    assert 1 < broken < len(answers)
    pair.encode([*map(chat, answers), Example("", text="    return first")])
    pair.release()
    pair.release()
    [told] = caplog.messages
    assert told.startswith(f"in {broken} chats a token of")
    assert "set chat_template of the family" in told


def test_texts_that_cannot_be_used_say_where_they_are_or_are_left_out(
    world: Path, caplog: pytest.LogCaptureFixture
) -> None:
    bad = chat("yes", CODE[0] * 9, origin="file:7")
    with pytest.raises(UserError, match=r"^file:7: its prompt of \d+ tokens leaves no room for"):
        make_pair(world).encode([bad])
    strict = make_pair(world, truncate=False)
    with pytest.raises(UserError, match=r"^f:1: \d+ tokens, and the student's max_length is 64"):
        strict.encode([Example("", text=CODE[0] * 9, origin="f:1")])
    lenient = make_pair(world, skip=True)
    encoded = lenient.encode([bad, chat("yes")])
    lenient.release()
    assert "left out 1 texts that cannot be used, such as file:7: its prompt" in caplog.text
    batch = lenient.collate(encoded) | {"ids": torch.arange(2)}
    assert lenient.text(batch).maskable.any(1).tolist() == [False, True]
    assert predictions(lenient, batch, "teacher").isnan().sum() == 0
    assert predictions(lenient, batch, "student").isnan().sum() == 0
    alone = lenient.collate(encoded[:1])
    assert lenient.text(alone).tokens.shape == (1, 4)
