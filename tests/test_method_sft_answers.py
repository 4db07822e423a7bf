import pytest
import torch

from diffdistill.draws import Draws
from diffdistill.projection import dense
from diffdistill.text.sft_answers import AnswerSFT
from tests.conftest import START
from tests.toy_answers import Network, Questions, question_batch
from tests.toy_texts import only_loss, student_gradients


def make() -> AnswerSFT:
    return AnswerSFT(family=Questions(), draws=Draws(0), student=Network(1).double())


def test_the_loss_is_torchs_cross_entropy_of_the_answers_tokens() -> None:
    method, batch = make(), question_batch(4)
    loss = only_loss(method, batch)
    answers = method.family.given(batch)
    found = dense(method.student(method.family.state(answers), method.family.condition(batch)))
    expected = torch.nn.functional.cross_entropy(found[answers.mask], answers.tokens[answers.mask])
    torch.testing.assert_close(loss.value, expected)
    assert loss.count == answers.mask.sum()
    assert loss.role == "student"
    assert method.solutions() == "learned"


def test_nobody_answers_and_the_student_is_asked_once_without_privilege() -> None:
    method, batch = make(), question_batch(3)
    list(method.losses(batch, START))
    assert method.family.rollouts == []
    assert [call["exposure"] for call in method.student.calls] == [None]


def test_micro_batches_take_the_step_of_their_batch() -> None:
    method = make()
    whole = student_gradients(method, [question_batch(4)])
    parts = student_gradients(method, [question_batch(1), question_batch(3, first_id=1)])
    torch.testing.assert_close(parts, whole)


@pytest.mark.parametrize("option", ["temperature", "max_tokens", "num_answers"])
def test_there_is_nothing_to_sample(option: str) -> None:
    assert option not in AnswerSFT.__dataclass_fields__
