"""The vocabulary rule: equal maps go, padded columns are cut, anything else is refused by its first token."""

import pytest
import torch
from test_student import batch, llama

from ray_jobs.core.errors import ConfigError
from ray_jobs.distillation.divergence import Divergence
from ray_jobs.distillation.loss import DistillLoss
from ray_jobs.distillation.targets import WorkerTeacher
from ray_jobs.distillation.vocabulary import check_vocabulary, shared_tokens

QWEN = {f"t{i}": i for i in range(151669)}


def test_the_first_differing_token_is_named_with_the_way_out():
    check_vocabulary({"a": 0, "b": 1}, {"b": 1, "a": 0})
    with pytest.raises(ConfigError, match=r"token 'b' has id 1 in the student and 2 in the teacher.*distill\.vocabulary = .uld."):
        check_vocabulary({"a": 0, "b": 1, "c": 2}, {"a": 0, "c": 1, "b": 2})
    with pytest.raises(ConfigError, match="token 'c' has id None in the student and 2 in the teacher"):
        check_vocabulary({"a": 0, "b": 1}, {"a": 0, "b": 1, "c": 2})


@pytest.mark.parametrize(("student", "teacher", "compared"), [(151936, 152064, 151669), (152064, 151669, 151669), (151936, 151936, 151936)])
def test_padded_columns_are_cut_and_equal_heads_are_left_whole(student, teacher, compared):
    assert shared_tokens(QWEN, student_rows=student, teacher_rows=teacher) == compared


def test_a_head_without_rows_for_all_tokens_is_refused_by_the_first_of_them():
    with pytest.raises(ConfigError, match="token 't151000' with id 151000 has no row in the student"):
        shared_tokens(QWEN, student_rows=151000, teacher_rows=152064)


def test_padding_of_either_head_changes_neither_loss_nor_gradient():
    def loss_and_gradient(student_rows, teacher_rows):
        teacher, student, rows = llama(2, vocab_size=teacher_rows), llama(1, seed=5, vocab_size=student_rows), batch()
        for model, seed in ((teacher, 1), (student, 2)):
            torch.manual_seed(seed)
            for matrix in (model.get_input_embeddings().weight, model.get_output_embeddings().weight):
                matrix.data[:97] = torch.randn(97, 16)
            for layer in model.model.layers:
                for parameter in layer.parameters():
                    torch.nn.init.normal_(parameter, std=0.1) if parameter.ndim > 1 else None
        loss = DistillLoss(WorkerTeacher(teacher), divergence=Divergence(temperature=2.0), kd_weight=0.7, ce_weight=0.3, num_tokens=97)(
            student, rows
        )
        loss.total.backward()
        head = student.get_output_embeddings().weight.grad
        assert not head[97:].any()
        return loss.total.detach(), head[:97]

    plain, padded = loss_and_gradient(97, 97), loss_and_gradient(104, 112)
    torch.testing.assert_close(padded, plain)
