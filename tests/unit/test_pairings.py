"""Strategies with optimizers and storages: what is refused says why and what works; what works is let through."""

import itertools

import pytest

from ray_jobs.core.errors import ConfigError
from ray_jobs.training.pairings import Pairing, refuse_pairing

SHARDED = [Pairing(strategy="fsdp"), *(Pairing(strategy="deepspeed", zero_stage=stage) for stage in (1, 2, 3))]


@pytest.mark.parametrize("optimizer", ["adamw_8bit", "paged_adamw_8bit"])
@pytest.mark.parametrize("sharded", SHARDED)
def test_eight_bit_moments_cannot_be_sharded(sharded, optimizer):
    with pytest.raises(ConfigError, match=r"256 numbers .* use optimizer = \"adamw\"") as caught:
        refuse_pairing(sharded._replace(optimizer=optimizer))
    assert sharded.strategy in str(caught.value)
    assert optimizer in str(caught.value)


@pytest.mark.parametrize(("strategy", "zero_stage"), [("fsdp", 2), ("deepspeed", 3)])
def test_an_int8_base_cannot_be_sharded(strategy, zero_stage):
    with pytest.raises(ConfigError, match=r"int8 weights and their scales .* zero_stage = 2"):
        refuse_pairing(Pairing(strategy=strategy, zero_stage=zero_stage, method="qlora", storage="int8"))


def test_dora_on_a_quantized_base_cannot_be_cut_by_zero_3():
    with pytest.raises(ConfigError, match=r"zero_stage = 3.* cannot work with finetune.lora.dora = true .*zero_stage = 2"):
        refuse_pairing(Pairing("deepspeed", 3, "adamw", "qlora", "nf4", True))
    for works in (Pairing("fsdp", 2, "adamw", "qlora", "nf4", True), Pairing("deepspeed", 3, "adamw", "lora", "nf4", True)):
        refuse_pairing(works)


def test_everything_else_is_let_through():
    for sharded, storage in itertools.product(SHARDED, ["nf4", "fp4"]):
        refuse_pairing(sharded._replace(method="qlora", storage=storage))
    for stage in (1, 2):
        refuse_pairing(Pairing(strategy="deepspeed", zero_stage=stage, method="qlora", storage="int8"))
    for method, optimizer in itertools.product(["full", "lora", "qlora"], ["adamw", "adamw_8bit", "paged_adamw_8bit"]):
        refuse_pairing(Pairing(method=method, optimizer=optimizer, storage="int8"))
    refuse_pairing(Pairing(strategy="fsdp", method="lora", storage="int8"))  # the storage is qlora's alone
