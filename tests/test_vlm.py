"""The family of vision-language models: against transformers' own calls, and part by part."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
from PIL import Image
from pyarrow import parquet
from torch import Tensor
from transformers import AutoProcessor

from diffdistill.data.problems import Problem
from diffdistill.data.questions import read_questions
from diffdistill.data.settings import DataSettings
from diffdistill.draws import Draws
from diffdistill.errors import UserError
from diffdistill.pipelines.causal_lm import CausalLM
from diffdistill.pipelines.picture_questions import PictureQuestions
from diffdistill.pipelines.questions import Asking, Questions
from diffdistill.pipelines.vlm import VLM
from diffdistill.projection import dense
from diffdistill.rollouts import Sampling
from diffdistill.types import Example, State
from tests import tiny
from tests.conftest import CPU
from tests.tiny_text import save_lm
from tests.tiny_vlm import picture, save_onevision, save_seeing_world


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save_seeing_world(tmp_path_factory.mktemp("seeing"))
    tiny.save_vlm(folder / "qwen")
    save_onevision(folder / "onevision")
    return folder


def family_of(world: Path, name: str = "student", **options: Any) -> VLM:
    return VLM(path=str(world / name), device=CPU, **options)


def asked(world: Path, **settings: Any) -> list[Example]:
    path = str(world / "questions.jsonl")
    given = DataSettings(**{"path": path, "solution_column": "answer"} | settings)
    problems: list[Problem] = []
    found = list(read_questions(given, Path(), problems))
    assert not problems
    return found


def reader_of(world: Path, name: str = "student", teacher: str = "", **asking: Any) -> Any:
    student = family_of(world, name)
    other = family_of(world, teacher) if teacher else student
    return PictureQuestions(student, other, Asking(**asking))


def own_inputs(folder: Path, examples: Sequence[Example]) -> Any:
    """Return what transformers' own processor makes of questions with their pictures."""
    processor = AutoProcessor.from_pretrained(str(folder))
    chats = [
        [{"role": "user", "content": [
            *({"type": "image", "image": p.image()} for p in e.pictures),
            {"type": "text", "text": e.prompt},
        ]}]
        for e in examples
    ]  # fmt: skip
    return processor.apply_chat_template(
        chats,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        processor_kwargs={"padding": True, "padding_side": "left", "return_tensors": "pt"},
    )


@pytest.mark.parametrize("name", ["student", "onevision", "qwen"])
def test_logits_about_answers_are_those_of_the_networks_own_call(name: str, world: Path) -> None:
    read, examples = reader_of(world, name), asked(world)
    network: Any = read.student.network()
    batch = read.collate(examples, range(4))
    answers = read.given(batch)
    with torch.no_grad():
        found = dense(read.student.predict(network, read.state(answers), read.condition(batch)))
    for row, example in enumerate(examples):
        inputs = own_inputs(world / name, [example])
        start, count = inputs["input_ids"].shape[1], int(answers.mask[row].sum())
        inputs["input_ids"] = torch.cat([inputs["input_ids"], answers.tokens[row : row + 1]], 1)
        inputs.pop("attention_mask")
        if "mm_token_type_ids" in inputs:
            blank = torch.zeros_like(answers.tokens[:1])
            inputs["mm_token_type_ids"] = torch.cat([inputs["mm_token_type_ids"], blank], 1)
        with torch.no_grad():
            logits = network(**inputs).logits[0, start - 1 : -1]
        torch.testing.assert_close(found[row, :count], logits[:count], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["student", "onevision", "qwen"])
def test_greedy_answers_are_those_of_transformers(name: str, world: Path) -> None:
    read, examples = reader_of(world, name), asked(world)
    network: Any = read.student.network()
    batch, sampling = read.collate(examples, range(4)), Sampling(5, temperature=0.0)
    found = read.student.sample(
        network, read.condition(batch), batch["ids"], sampling, Draws(0), purpose="x"
    )
    inputs = own_inputs(world / name, examples)
    rows = network.generate(
        **inputs,
        max_new_tokens=5,
        do_sample=False,
        eos_token_id=read.student.end_ids,
        pad_token_id=read.student.pad_id,
    )
    for row, tokens in enumerate(rows[:, inputs["input_ids"].shape[1] :]):
        kept = found.tokens[row][found.mask[row]]
        assert kept.tolist() == tokens[: len(kept)].tolist()


@pytest.mark.parametrize("name", ["student", "onevision", "qwen"])
def test_a_token_that_stands_for_a_picture_is_never_written(name: str, world: Path) -> None:
    read = reader_of(world, name)
    network: Any = read.student.network()
    token = read.student.processor.image_token_id
    assert token in read.student.placeholders
    batch = read.collate(asked(world), range(4))

    def likely(module: Any, inputs: Any, logits: Tensor) -> Tensor:
        logits[..., token] = 1e4
        return logits

    hook = network.lm_head.register_forward_hook(likely)
    for temperature in (0.0, 1.0):
        answers = read.student.sample(
            network,
            read.condition(batch),
            batch["ids"],
            Sampling(5, temperature=temperature),
            Draws(0),
            purpose="x",
        )
        assert not (answers.tokens == token).any()
        assert answers.logprobs.isfinite().all()
    hook.remove()


def test_a_solution_that_has_such_a_token_is_read_with_a_pad_token_there(world: Path) -> None:
    read = reader_of(world)
    network = read.student.network()
    first = asked(world)[0]
    for question in (first, first._replace(pictures=())):
        batch = read.collate([question._replace(solution="3<image>9")], [0])
        answers = read.given(batch)
        assert (answers.tokens == 2).sum() == 1
        told, state = read.condition(batch), read.state(answers)
        plain = state._replace(x=torch.where(state.x == 2, read.student.pad_id, state.x))
        with torch.no_grad():
            found, expected = (
                dense(read.student.predict(network, at, told)) for at in (state, plain)
            )
        torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_an_answer_depends_on_the_picture_and_not_on_its_batch(world: Path) -> None:
    read, examples = reader_of(world), asked(world)
    network = read.student.network()
    first = examples[0]
    other = first._replace(pictures=examples[1].pictures)
    answers = read.given(read.collate([first], [0]))

    def logits(rows: Sequence[Example]) -> Tensor:
        told = read.condition(read.collate(rows, range(len(rows))))
        state = State(answers.tokens.repeat(len(rows), 1), torch.zeros(len(rows)))
        with torch.no_grad():
            return dense(read.student.predict(network, state, told))

    alone = logits([first])[0]
    torch.testing.assert_close(logits([first, examples[1], other])[0], alone, rtol=1e-4, atol=1e-5)
    assert (logits([other])[0] - alone).abs().max() > 1e-2


def both(world: Path, teacher: str = "teacher") -> tuple[Any, Any, Any, Any]:
    """Return readers, both networks, and a batch."""
    read = reader_of(world, teacher=teacher)
    batch = read.collate(asked(world), range(4))
    return read, read.student.network(), read.teacher.network(), batch


def test_the_switched_route_is_the_teachers_parts_on_the_students_features(world: Path) -> None:
    read, student, teacher, batch = both(world)
    told, theirs = read.condition(batch), read.condition(batch, reader="teacher")
    sight = read.student.look(student, told)
    switched = read.seeing(theirs, sight.through(read.teacher.look(teacher, theirs)))
    answers = read.given(batch)
    found = dense(read.teacher.predict(teacher, read.state(answers), switched))
    # by hand, from the modules
    pixels = own_inputs(world / "student", asked(world))["pixel_values"]
    hidden = student.model.vision_tower(pixels, output_hidden_states=True).hidden_states[-1]
    places = teacher.model.multi_modal_projector(hidden[:, 1:])
    tokens = torch.cat([theirs["prompt"], answers.tokens], 1)[:, :-1]
    words = teacher.get_input_embeddings()(tokens)
    words = words.masked_scatter((tokens == 2)[..., None], places)
    mask = torch.arange(tokens.shape[1]) >= theirs["pads"][:, None]
    hidden = teacher.model.language_model(inputs_embeds=words, attention_mask=mask.long())
    logits = teacher.lm_head(hidden.last_hidden_state)[:, theirs["prompt"].shape[1] - 1 :]
    torch.testing.assert_close(found, logits, rtol=1e-4, atol=1e-5)
    own = dense(read.teacher.predict(teacher, read.state(answers), theirs))
    assert (found - own).abs().max() > 1e-2


@pytest.mark.parametrize("name", ["student", "onevision"])
def test_a_networks_own_sight_gives_its_own_prediction_without_its_encoder(
    name: str, world: Path
) -> None:
    read = reader_of(world, name)
    student, batch = read.student.network(), read.collate(asked(world), range(4))
    told, state = read.condition(batch), read.state(read.given(batch))
    looks: list[int] = []
    student.model.vision_tower.register_forward_hook(lambda *_: looks.append(1))
    layers: list[int] = []
    student.model.language_model.layers[0].register_forward_hook(lambda *_: layers.append(1))
    plain = dense(read.student.predict(student, state, told))
    sight = read.student.look(student, told)
    assert (len(looks), len(layers)) == (2, 1)  # the language model is not asked to encode
    again = dense(read.student.predict(student, state, read.seeing(told, sight)))
    torch.testing.assert_close(again, plain, rtol=0, atol=0)
    after = dense(read.student.predict(student, state, told))  # and nothing stays behind
    torch.testing.assert_close(after, plain, rtol=0, atol=0)


def test_gradients_go_through_the_frozen_teacher_to_the_students_encoder(world: Path) -> None:
    read, student, teacher, batch = both(world)
    student.requires_grad_(True)
    told, theirs = read.condition(batch), read.condition(batch, reader="teacher")
    with torch.no_grad():
        at = read.teacher.look(teacher, theirs)
    sight = read.student.look(student, told)
    switched = read.seeing(theirs, sight.through(at))
    state = read.state(read.given(batch))
    dense(read.teacher.predict(teacher, state, switched)).square().mean().backward()
    reached = {n for n, p in student.named_parameters() if p.grad is not None and p.grad.any()}
    assert reached
    assert all("vision_tower" in name for name in reached)
    assert any("layers.0" in name for name in reached)
    assert all(p.grad is None for p in teacher.parameters())


@pytest.mark.parametrize(
    ("teacher", "told"),
    [
        ("wide", r"gives 9 places of 16 channels .* takes 9 places of 24 channels"),
        ("fine", r"gives 9 places of 16 channels .* takes 16 places of 16 channels"),
    ],
)
def test_encoders_of_another_width_or_grid_are_refused(
    teacher: str, told: str, world: Path
) -> None:
    read, student, other, batch = both(world, teacher)
    ours = read.student.look(student, read.condition(batch))
    theirs = read.teacher.look(other, read.condition(batch, reader="teacher"))
    with pytest.raises(UserError, match=told):
        ours.through(theirs)


def test_another_vocabulary_or_a_teacher_without_eyes_is_refused(world: Path) -> None:
    with pytest.raises(UserError, match=r"another vocabulary than the student .*513 tokens differ"):
        reader_of(world, teacher="foreign")
    blind = CausalLM(path=str(world / "student"), device=CPU)
    with pytest.raises(UserError, match="a family that reads no pictures: take vlm"):
        PictureQuestions(family_of(world), blind, Asking())


def test_weights_of_another_processor_need_a_family_of_their_own(world: Path) -> None:
    family = family_of(world)
    assert family.network(str(world / "teacher"))
    with pytest.raises(UserError, match="has another processor than"):
        family.network(str(world / "fine"))


def test_models_without_the_parts_say_what_they_consist_of(world: Path) -> None:
    read = reader_of(world, "qwen")
    told = read.condition(read.collate(asked(world), range(4)))
    with pytest.raises(UserError, match=r"0 modules called 'vision_tower'.*visual, language_model"):
        read.student.look(read.student.network(), told)
    network = family_of(world).network()
    wrong = family_of(world, projector="nowhere")
    with pytest.raises(UserError, match=r"name one in family\.projector"):
        wrong.look(network, reader_of(world).condition(read.collate(asked(world), range(4))))
    text = CausalLM(path="", device=CPU)
    with pytest.raises(UserError, match="CausalLM has no vision encoder to switch"):
        text.look(network, {})


def test_a_column_of_pictures_that_is_named_must_be_there(tmp_path: Path) -> None:
    rows = [{"img": "0.png", "text": "a?"}, {"text": "b?"}]
    (tmp_path / "0.png").write_bytes(picture(0))
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(json.dumps(row) for row in rows))

    def read(column: str) -> tuple[list[int], list[Problem]]:
        problems: list[Problem] = []
        settings = DataSettings(path=str(file), image_column=column)
        found = list(read_questions(settings, Path(), problems))
        return [len(example.pictures) for example in found], problems

    assert read("image") == ([0, 0], [])  # the default: the column, if there
    counts, [problem] = read("img")
    assert counts == [1]
    assert "there is no 'img' in ['text']" in str(problem)


def test_a_batch_without_pictures_cannot_be_switched_but_can_be_answered(world: Path) -> None:
    read, network = reader_of(world), family_of(world).network()
    batch = read.collate(asked(world, image_column=None), range(4))
    told = read.condition(batch)
    assert (
        dense(read.student.predict(network, read.state(read.given(batch)), told)).isfinite().all()
    )
    with pytest.raises(UserError, match="there is no picture in this batch"):
        read.student.look(network, told)


def test_a_text_model_cannot_be_asked_about_pictures(world: Path, tmp_path: Path) -> None:
    save_lm(tmp_path, is_causal=True)
    text = CausalLM(path=str(tmp_path), device=CPU)
    with pytest.raises(UserError, match=r"jsonl:1: a question about a picture.*family vlm"):
        Questions(text, text, Asking()).usable(asked(world)[0])
    with pytest.raises(
        UserError, match=r"needs an image-text-to-text model, found Qwen3ForCausalLM"
    ):
        VLM(path=str(tmp_path), device=CPU).network()


def test_pictures_are_read_from_files_cells_and_lists(world: Path, tmp_path: Path) -> None:
    cell = {"bytes": picture(0), "path": None}
    rows = [{"image": [cell, {"bytes": picture(1), "path": None}], "text": "a?", "answer": "1"}]
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    (example,) = asked(world, path=str(tmp_path / "rows.parquet"))
    first, second = (p.image() for p in example.pictures)
    assert first.tobytes() == asked(world)[0].pictures[0].image().tobytes()
    assert isinstance(second, Image.Image)
    read = reader_of(world)
    prompt = read.prompt(example)
    assert prompt.count(2) == 2 * 9
    assert read.student.tokenizer.decode(prompt).startswith("[user]<image>")


@pytest.mark.parametrize(
    ("cell", "told"),
    [
        ("nowhere.png", r"jsonl:1: missing picture: .*nowhere\.png does not exist"),
        (3, "malformed picture: neither a path nor an image: 3"),
    ],
)
def test_a_picture_that_is_not_there_is_a_bad_example(cell: Any, told: str, tmp_path: Path) -> None:
    (tmp_path / "q.jsonl").write_text(json.dumps({"image": cell, "text": "a?", "answer": "1"}))
    problems: list[Problem] = []
    assert not list(read_questions(DataSettings(path=str(tmp_path / "q.jsonl")), Path(), problems))
    (problem,) = problems
    assert re.search(told, str(problem))


def test_a_damaged_picture_and_a_long_prompt_are_named(world: Path) -> None:
    (world / "broken.png").write_bytes(b"no picture")
    file = world / "broken.jsonl"
    file.write_text('{"image": "broken.png", "text": "a?", "answer": "1"}')
    (example,) = asked(world, path=str(file))
    with pytest.raises(UserError, match=r"broken\.jsonl:1: cannot read a picture: cannot identify"):
        reader_of(world).usable(example)
    with pytest.raises(
        UserError, match=r"student's prompt has \d+ tokens, and data.max_prompt is 9"
    ):
        reader_of(world, max_prompt=9).usable(asked(world)[0])


def test_an_answer_ends_as_the_template_ends_a_turn(world: Path) -> None:
    read = reader_of(world)
    assert read.student.turn_ends == [0]
    assert read.student.end_ids == [0]
    answers = read.given(read.collate(asked(world), range(4)))
    assert read.spelled(answers) == ["3", "12", "3 9", "7"]
