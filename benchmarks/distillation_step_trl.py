"""One measured process of TRL's GKDTrainer, off-policy, on the same rows; needs TRL's environment alone; prints one JSON line."""

import argparse
import json
import sys
import tempfile
from typing import Any

import torch

from benchmarks.distillation_inputs import ALPHA, RANK, Marks, same_adapters


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--settings", type=json.loads, required=True)
    settings = parser.parse_args().settings
    answers, sys.stdout = sys.stdout, sys.stderr  # libraries print on import
    torch.set_num_threads(settings["threads"])
    import pyarrow.parquet as pq
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    table, checkpointing = pq.read_table(settings["rows"]).to_pylist(), settings["system"] == "trl-checkpointing"
    dataset = Dataset.from_list([{name: table[index][name] for name in ("input_ids", "labels")} for index in settings["order"]])
    place = {"attn_implementation": "sdpa", "device_map": {"": settings["device"]}}
    student = AutoModelForCausalLM.from_pretrained(settings["student"], dtype=torch.float32, **place)
    teacher = AutoModelForCausalLM.from_pretrained(settings["teacher"], dtype=getattr(torch, settings["dtype"]), **place)
    marks = Marks()

    class MarkSteps(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            marks()

    lora = LoraConfig(r=RANK, lora_alpha=ALPHA, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM")
    with tempfile.TemporaryDirectory() as folder:
        trainer = GKDTrainer(
            model=student,
            teacher_model=teacher,
            args=GKDConfig(
                output_dir=folder,
                lmbda=0.0,
                beta=0.0,
                seq_kd=False,
                max_length=settings["length"],
                train_sampling_strategy="sequential",
                per_device_train_batch_size=settings["micro_batch_size"],
                max_steps=settings["steps"],
                learning_rate=settings["learning_rate"],
                lr_scheduler_type="constant",
                warmup_steps=0,
                weight_decay=0.0,
                max_grad_norm=1.0,
                optim="adamw_torch_fused",
                gradient_checkpointing=checkpointing,
                gradient_checkpointing_kwargs={"use_reentrant": False} if checkpointing else None,
                use_cpu=settings["device"] == "cpu",
                bf16=settings["dtype"] == "bfloat16",
                report_to=[],
                save_strategy="no",
                logging_steps=1,
                disable_tqdm=True,
                dataloader_num_workers=0,
            ),
            data_collator=collate,
            train_dataset=dataset,
            processing_class=AutoTokenizer.from_pretrained(settings["tokenizer"]),
            peft_config=lora if settings["method"] == "lora" else None,
            callbacks=[MarkSteps()],
        )
        same_adapters(trainer.model)
        trainer.train()
    steps = [line for line in trainer.state.log_history if "loss" in line]
    found = {"losses": [line["loss"] for line in steps], "grad_norms": [line["grad_norm"] for line in steps]}
    print(json.dumps({**marks.result(), **found}), file=answers)


def collate(rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    """Return rows of equal length as the tensors that GKDTrainer reads; nothing is padded."""
    ids_BT, labels_BT = (torch.tensor([row[name] for row in rows]) for name in ("input_ids", "labels"))
    return {"input_ids": ids_BT, "attention_mask": torch.ones_like(ids_BT), "labels": labels_BT}


if __name__ == "__main__":
    main()
