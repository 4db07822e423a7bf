"""Models that go on with a text that another may have written."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import AddedToken
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from diffdistill.draws import Draws
from diffdistill.errors import UserError
from diffdistill.pipelines.causal_lm import CausalLM
from diffdistill.pipelines.prompts import prompt_tokens
from diffdistill.pipelines.questions import Questions
from diffdistill.pipelines.server import Server
from diffdistill.pipelines.writing import Format, LocalWriter, ServedWriter, Writer
from diffdistill.rollouts import Sampling
from diffdistill.synthesis.cooperation import Cooperation
from diffdistill.synthesis.drafts import PLANS, Draft
from diffdistill.tessy_settings import TessySettings
from diffdistill.types import Example
from tests.conftest import CPU
from tests.test_byte_spans import llama_like
from tests.tiny import tokenizer
from tests.tiny_server import TinyServer, serving
from tests.tiny_text import causal_lm, words

QUESTION = Example("2+2?", messages=({"role": "user", "content": "2+2?"},))
MARKS = Format("<think>\n", "</think>\n\n", ("</think>", "<mask>"))


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("writers")
    for kind in ("student", "teacher"):
        save_ascii(words(kind), folder / kind)
    save_ascii(tokenizer(), folder / "bytes")
    return folder


def save_ascii(tokens: Any, folder: Path) -> None:
    """Save a tokenizer with a random model to which nothing but ASCII is likely."""
    network = causal_lm(vocab_size=len(tokens), is_causal=True, eos_token_id=tokens.eos_token_id)
    added = tokens.get_added_vocab().values()
    for token in range(len(tokens)):
        text = tokens.decode([token])
        if not (text.isascii() and text.isprintable()) or token in added:
            network.lm_head.weight.data[token] = 0.0
    network.save_pretrained(str(folder))
    tokens.save_pretrained(str(folder))


def writer(world: Path, kind: str, temperature: float = 1.0, **options: Any) -> LocalWriter:
    family = CausalLM(path=str(world / kind), device=CPU)
    parts: dict[str, Any] = {"format": MARKS, "draws": Draws(3)}
    return LocalWriter(
        family=family,
        network=family.network().eval(),
        read=Questions(family, family),
        sampling=Sampling(1, temperature),
        **parts | options,
    )


@pytest.mark.parametrize("kind", ["student", "teacher"])
def test_a_prompt_is_the_chat_and_then_the_text_in_the_tokens_of_the_writer(
    kind: str, world: Path
) -> None:
    own = writer(world, kind)
    asked = prompt_tokens(own.family, QUESTION.messages or ())
    text = "na\u00efve 12 \U0001f642"
    found = own.prompt(QUESTION, text)
    assert found[: len(asked)] == asked
    assert own.family.decoded(found[len(asked) :]) == f"<think>\n{text}"
    closed = own.prompt(QUESTION, text, answer="it")
    assert own.family.decoded(closed[len(asked) :]) == f"<think>\n{text}</think>\n\nit"


@pytest.mark.parametrize("kind", ["student", "teacher"])
def test_a_text_that_is_spelled_from_tokens_is_the_text(kind: str, world: Path) -> None:
    own = writer(world, kind)
    for text in ("def f(x):\n    return x", " lead", "\u00e9\u4e2d\U0001f642", "", "a  b\n\n"):
        assert own.spelled(own.tokens(text)) == text


def test_a_character_of_which_a_part_is_missing_is_left_out(world: Path) -> None:
    own = writer(world, "student")
    tokens = own.tokens("a\U0001f600")  # of four bytes that nothing joined
    texts = [own.spelled(tokens[:n]) for n in range(1, len(tokens) + 1)]
    assert texts[-1] == "a\U0001f600"
    assert set(texts[:-1]) == {"a"}


def test_added_runs_of_a_metaspace_are_spaces_unless_they_end_the_thinking(world: Path) -> None:
    core, run = llama_like(), "\u2581\u2581"
    core.add_tokens([AddedToken(run, normalized=True), AddedToken("o\u2581", lstrip=True)])
    fast = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>", pad_token="<pad>")
    save_ascii(fast, world / "metaspace")
    own = writer(world, "metaspace")
    tokens = own.tokens("a  b")
    assert core.token_to_id(run) in tokens
    assert own.spelled(tokens) == "a  b"
    assert own.spelled([own.family.tokenizer.convert_tokens_to_ids("o\u2581")]) == "o "
    ending = writer(world, "metaspace", format=Format(ends=(run,)))
    assert ending.spelled(tokens) == f"a{run}b"


def test_special_tokens_are_no_text_unless_they_end_the_thinking(world: Path) -> None:
    own = writer(world, "student")
    ids = [own.family.tokenizer.convert_tokens_to_ids(t) for t in ("<pad>", "<mask>", "<|start|>")]
    assert own.spelled(ids) == "<mask>"
    plain = writer(world, "student", format=Format())
    assert plain.spelled(ids) == ""


@pytest.mark.parametrize("kind", ["student", "teacher"])
def test_greedy_writing_is_what_generate_of_transformers_writes(kind: str, world: Path) -> None:
    own = writer(world, kind, temperature=0.0)
    prompts = [own.prompt(QUESTION, text) for text in ("", "so it")]
    found = own.go_on(prompts, [0, 1], [7, 7])
    words_of = AutoTokenizer.from_pretrained(world / kind)
    network = AutoModelForCausalLM.from_pretrained(world / kind).eval()
    for prompt, new in zip(prompts, found, strict=True):
        rows = network.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=7,
            do_sample=False,
            pad_token_id=words_of.pad_token_id,
        )
        expected = words_of.decode(rows[0, len(prompt) :], skip_special_tokens=True)
        assert len(expected) > 4
        assert new.text == expected


def test_what_is_written_depends_on_the_number_and_not_on_the_batch(world: Path) -> None:
    own = writer(world, "student")
    prompts = [own.prompt(QUESTION, text) for text in ("", "so", "12 and")]
    limits = (9, 20, 4)
    together = own.go_on(prompts, [5, 6, 7], limits)
    rows = zip(prompts, (5, 6, 7), limits, strict=True)
    assert together == [own.go_on([p], [i], [limit])[0] for p, i, limit in rows]
    assert own.go_on(prompts[:1], [8], [9]) != together[:1]


class Never:
    def cuts(self, texts: Any, starts: Any, style: bool) -> list[int | None]:
        return [None for _ in texts]


def thought(writers: dict[str, Writer], mode: Any, **options: Any) -> Draft:
    settings = TessySettings(
        **{"max_tokens": 60, "ends": list(MARKS.ends), "retries": 0, "mode": mode} | options
    )
    draft = Draft(0, QUESTION, PLANS[settings.mode][0])
    boundaries: Any = dict.fromkeys(writers, Never())
    parties: Any = writers
    found = list(Cooperation(parties, boundaries, settings).run(iter([draft])))
    return found[0]


def test_without_boundaries_a_cooperation_is_the_student_alone_whatever_the_steps(
    world: Path,
) -> None:
    writers: dict[str, Writer] = {
        "student": writer(world, "bytes", 0.0),
        "teacher": writer(world, "teacher", 0.0),
    }
    alone = thought(writers, "student-only")
    for step in (4, 7, 60):
        both = thought(writers, "tessy", student_step=step)
        length = min(len(both.text), len(alone.text))
        assert length > 8
        assert both.text[:length] == alone.text[:length]
        assert {span.author for span in both.spans} == {"student"}


def test_texts_are_exchanged_between_two_vocabularies(world: Path) -> None:
    class Alternate:
        def cuts(self, texts: Any, starts: Any, style: bool) -> list[int | None]:
            pairs = zip(texts, starts, strict=True)
            return [start + 3 if len(text) > start + 3 else None for text, start in pairs]

    writers = {kind: writer(world, kind) for kind in ("student", "teacher")}
    settings = TessySettings(max_tokens=40, student_step=6, teacher_step=6, retries=0,
                             boundary="exact")  # fmt: skip
    draft = Draft(0, QUESTION, PLANS["tessy"][0])
    boundaries: Any = dict.fromkeys(writers, Alternate())
    parties: Any = writers
    (found,) = Cooperation(parties, boundaries, settings).run(iter([draft]))
    assert {span.author for span in found.spans} == {"student", "teacher"}
    assert "".join(found.text[s.start : s.end] for s in found.spans) == found.text


def test_how_likely_a_text_is_is_the_mean_over_its_tokens(world: Path) -> None:
    own = writer(world, "student")
    prompts = [own.prompt(QUESTION, ""), own.prompt(QUESTION, "so 12")]
    texts = [own.tokens("is 4."), own.tokens("x = [1, 2]\n")]
    found = own.mean_logprobs(prompts, texts)
    network = AutoModelForCausalLM.from_pretrained(world / "student").eval()
    for prompt, text, value in zip(prompts, texts, found, strict=True):
        with torch.no_grad():
            logits = network(input_ids=torch.tensor([prompt + text])).logits[0]
        logprobs = logits[:, : own.family.words].log_softmax(-1)
        rows = logprobs[len(prompt) - 1 : -1].gather(1, torch.tensor(text)[:, None])
        assert value == pytest.approx(rows.mean().item(), rel=1e-4)


def test_a_server_writes_what_its_model_writes_at_hand(world: Path) -> None:
    own = writer(world, "teacher", temperature=0.0)
    network = AutoModelForCausalLM.from_pretrained(world / "teacher").eval()
    with serving(TinyServer(network, own.family.tokenizer)) as server:
        family = Server(path=server.url, device=CPU, tokenizer_path=str(world / "teacher"), top_k=3)
        reads: Any = family
        far = ServedWriter(
            family=family, read=Questions(reads, family), format=MARKS, sampling=own.sampling,
            draws=Draws(3),
        )  # fmt: skip
        prompts = [far.prompt(QUESTION, text) for text in ("", "so it")]
        assert prompts == [own.prompt(QUESTION, text) for text in ("", "so it")]
        served, local = far.go_on(prompts, [0, 1], [6, 7]), own.go_on(prompts, [0, 1], [6, 7])
        assert served == local
        assert len(served[0].text) > 4
        texts = [own.tokens("is 4."), own.tokens("x = [1, 2]\n")]
        expected = own.mean_logprobs(prompts, texts)
        assert far.mean_logprobs(prompts, texts) == pytest.approx(expected, rel=1e-4)
        bodies = [body for body in server.asked if body["max_tokens"] > 1]
        assert sorted(body["max_tokens"] for body in bodies) == [6, 7]
        assert len({body["seed"] for body in bodies}) == 2
        server.replies.append((200, {"choices": [{"text": "x", "finish_reason": "abort"}]}))
        with pytest.raises(UserError, match="no reason why it ends"):
            far.go_on(prompts[:1], [0], [6])


def test_a_marker_that_is_a_special_token_is_asked_of_a_server(world: Path) -> None:
    network = AutoModelForCausalLM.from_pretrained(world / "student").eval()
    tokens = AutoTokenizer.from_pretrained(world / "student")
    with serving(TinyServer(network, tokens)) as server:
        parts: dict[str, Any] = {"path": server.url, "device": CPU}
        family = Server(**parts, tokenizer_path=str(world / "student"))
        reads: Any = family
        parts = {"read": Questions(reads, family), "sampling": Sampling(1, 0.0), "draws": Draws(3)}
        far = ServedWriter(family=family, format=MARKS, **parts)
        prompt = far.prompt(QUESTION, "")
        assert family.served == "tiny"
        reply = {"choices": [{"text": "7.<mask><|start|>", "finish_reason": "stop"}]}
        server.replies.append((200, reply))
        assert far.go_on([prompt], [0], [6])[0].text == "7.<mask>"
        assert server.asked[-1]["skip_special_tokens"] is False
        plain = ServedWriter(family=family, format=Format("<think>\n"), **parts)
        plain.go_on([prompt], [0], [6])
        assert "skip_special_tokens" not in server.asked[-1]
        other = replace(family, protocol="openai")
        with pytest.raises(UserError, match="leaves special tokens out of its texts"):
            ServedWriter(family=other, format=MARKS, **parts).go_on([prompt], [0], [6])
