"""What cannot be trained together, refused before anything starts: a strategy with an optimizer or a storage of the base."""

from typing import NamedTuple

from ray_jobs.core.errors import ConfigError


class Pairing(NamedTuple):
    """What one worker's training consists of, as the config's fields of the same names say it."""

    strategy: str = "ddp"
    zero_stage: int = 2
    optimizer: str = "adamw"
    method: str = "full"
    storage: str = "none"
    """How the base is stored where `method` is qlora: nf4, fp4 or int8."""
    dora: bool = False
    """Whether magnitudes are trained beside the adapter."""

    @property
    def shards(self) -> str:
        """The setting by which optimizer state is cut into pieces; empty where each worker holds all of it."""
        return {"fsdp": 'strategy = "fsdp"', "deepspeed": f'strategy = "deepspeed" (zero_stage = {self.zero_stage})'}.get(self.strategy, "")

    @property
    def shards_parameters(self) -> bool:
        """Whether the frozen base is cut into pieces too."""
        return self.strategy == "fsdp" or (self.strategy == "deepspeed" and self.zero_stage == 3)


def refuse_pairing(pairing: Pairing) -> None:
    """Refuse what cannot work.

    Raises:
        ConfigError: names both settings, the reason, and what works instead.
    """
    if pairing.shards and pairing.optimizer != "adamw":
        raise ConfigError(
            f'[workers] {pairing.shards} cannot work with optimizer = "{pairing.optimizer}": its 8-bit moments have one scale for each '
            '256 numbers of a whole parameter, and shards cut through them; use optimizer = "adamw", whose moments are shared out '
            'over the workers, or strategy = "ddp"'
        )
    if pairing.shards_parameters and pairing.method == "qlora" and pairing.storage == "int8":
        raise ConfigError(
            f'[workers] {pairing.shards} cannot work with quantization.type = "int8": bitsandbytes keeps int8 weights and their scales '
            "on the weight object beside what is cut, so FSDP2 loses them, and ZeRO 3 leaves a whole copy on each worker; use "
            'quantization.type = "nf4", strategy = "ddp", or strategy = "deepspeed" with zero_stage = 2'
        )
    if pairing.strategy == "deepspeed" and pairing.zero_stage == 3 and pairing.method == "qlora" and pairing.dora:
        raise ConfigError(
            f"[workers] {pairing.shards} cannot work with finetune.lora.dora = true on a quantized base: DeepSpeed's hooks fail on "
            'its weights (no attribute ds_id); use strategy = "fsdp", zero_stage = 2, or dora = false'
        )
