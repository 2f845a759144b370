"""One measured process of TRL's SFTTrainer on the same packed rows; needs TRL's environment alone; prints one JSON line."""

import argparse
import json
import re
import tempfile
import time
from pathlib import Path
from typing import Any


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--settings", type=json.loads, required=True)
    settings = parser.parse_args().settings
    import torch

    torch.set_num_threads(settings["threads"])
    import pyarrow.parquet as pq
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    table = pq.read_table(settings["rows"]).to_pylist()
    rows = [table[index] for index in settings["order"]]
    dataset = Dataset.from_list(
        [{"input_ids": row["input_ids"], "labels": row["labels"], "seq_lengths": row["segment_lengths"]} for row in rows]
    )
    torch.manual_seed(0)
    quantization = None
    if settings["method"] == "nf4":
        quantization = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.bfloat16
        )
    model = AutoModelForCausalLM.from_pretrained(
        settings["model"], dtype=torch.bfloat16, attn_implementation="sdpa", quantization_config=quantization, device_map={"": "cpu"}
    )
    before = memory("VmRSS")
    marks: list[tuple[float, float]] = []

    class Marks(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            marks.append((time.perf_counter(), time.process_time()))

    with tempfile.TemporaryDirectory() as folder:
        trainer = SFTTrainer(
            model=model,
            args=SFTConfig(
                output_dir=folder,
                packing=True,
                packing_strategy="bfd",
                dataset_kwargs={"skip_prepare_dataset": True},
                train_sampling_strategy="sequential",
                max_length=settings["length"],
                per_device_train_batch_size=settings["micro_batch_size"],
                gradient_accumulation_steps=settings["accumulation"],
                max_steps=settings["steps"],
                learning_rate=settings["learning_rate"],
                lr_scheduler_type="constant",
                warmup_steps=0,
                weight_decay=0.0,
                max_grad_norm=1.0,
                optim="adamw_torch_fused",
                gradient_checkpointing=settings["checkpointing"],
                gradient_checkpointing_kwargs={"use_reentrant": False} if settings["checkpointing"] else None,
                use_cpu=True,
                bf16=True,
                report_to=[],
                save_strategy="no",
                logging_steps=1,
                disable_tqdm=True,
                dataloader_num_workers=0,
            ),
            train_dataset=dataset,
            processing_class=AutoTokenizer.from_pretrained(settings["model"]),
            peft_config=LoraConfig(
                r=settings["rank"], lora_alpha=settings["alpha"], lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM"
            ),
            callbacks=[Marks()],
        )
        trainer.train()
    (wall, cpu), (end_wall, end_cpu) = marks[0], marks[-1]
    steps = len(marks) - 1
    print(
        json.dumps(
            {
                "wall_s": (end_wall - wall) / steps,
                "cpu_s": (end_cpu - cpu) / steps,
                "peak_bytes": memory("VmHWM")["VmHWM"],
                "losses": [line["loss"] for line in trainer.state.log_history if "loss" in line],
                **before,
            }
        )
    )


def memory(field: str) -> dict[str, int]:
    status = Path("/proc/self/status").read_text()
    return {field: int(re.search(rf"{field}:\s*(\d+) kB", status)[1]) * 1024}


if __name__ == "__main__":
    main()
