"""Named search spaces: each function returns a param_space of dotted config fields, each range with its source.

A space belongs to one job. To add one, write its function and name it in `SPACES`.
"""

from tune_spaces.distill import kd_temperature, soft_targets
from tune_spaces.finetune import lora_rank, lora_rank_and_learning_rate

SPACES = {
    "lora_rank": ("finetune", lora_rank),
    "lora_rank_and_learning_rate": ("finetune", lora_rank_and_learning_rate),
    "kd_temperature": ("distill", kd_temperature),
    "soft_targets": ("distill", soft_targets),
}
"""{name: (job, function)}."""
